//! Who publishes: command-line pods, a watched file, and engines that are asked over HTTP.
//!
//! Everything ends in [`PodDeclaration`]s. An `http://` endpoint is not a publisher but an engine
//! that knows its publishers; [`resolve`] asks it and returns one declaration per rank.

use crate::ingest::fleet::PodDeclaration;

mod address;
mod engine;
mod http;
mod pods_file;

use self::address::{Scheme, split};
pub use self::{
    engine::{model_of, resolve},
    pods_file::PodsFile,
};

/// Parses a `--pod` flag: `ID=tcp://host:port[,replay=tcp://host:port][,model=NAME][,rank=N]` or
/// `ID=http://host:port[,model=NAME]`.
///
/// The id may hold `:` and `=`; it ends before the first `=tcp://` or `=http://`. A model name may
/// hold `=` but no comma.
///
/// # Errors
///
/// A sentence that names the part that is wrong.
pub fn parse_pod_flag(flag: &str) -> Result<PodDeclaration, String> {
    let at = ["=tcp://", "=http://"].iter().filter_map(|start| flag.find(start)).min();
    let Some((pod, rest)) = at.and_then(|at| flag.split_at_checked(at)) else {
        return Err(match flag.split_once('=') {
            None => format!("{flag:?}: want ID=tcp://host:port or ID=http://host:port"),
            Some((_, endpoint)) => {
                format!("endpoint {endpoint:?} starts with neither tcp:// nor http://")
            }
        });
    };
    if pod.is_empty() {
        return Err(format!("{flag:?}: the pod id before = is empty"));
    }
    let mut parts = rest.trim_start_matches('=').split(',');
    let endpoint = parts.next().unwrap_or_default();
    let scheme = check_endpoint("endpoint", endpoint)?;
    let mut declaration = PodDeclaration {
        pod: pod.to_owned(),
        endpoint: endpoint.to_owned(),
        ..PodDeclaration::default()
    };
    for part in parts {
        let Some((key, value)) = part.split_once('=') else {
            return Err(format!("option {part:?}: want replay=, model= or rank="));
        };
        let repeated = match key {
            "model" if value.is_empty() => return Err("model is empty".to_owned()),
            "model" => declaration.model.replace(value.to_owned()).is_some(),
            "replay" | "rank" if scheme == Scheme::Http => {
                return Err(format!("{key}: an http:// engine announces it itself"));
            }
            "replay" => {
                check_tcp("replay", value)?;
                declaration.replay_endpoint.replace(value.to_owned()).is_some()
            }
            "rank" => {
                let rank = value.parse().map_err(|_| format!("rank {value:?} is not a number"))?;
                declaration.rank.replace(rank).is_some()
            }
            _ => return Err(format!("option {key:?} is none of replay, model, rank")),
        };
        if repeated {
            return Err(format!("{key} is given twice"));
        }
    }
    Ok(declaration)
}

/// Checks an endpoint to connect to, and says which kind it is.
fn check_endpoint(what: &str, endpoint: &str) -> Result<Scheme, String> {
    let (scheme, host, port) = split(endpoint).map_err(|why| format!("{what} {why}"))?;
    if address::is_wildcard(host) {
        return Err(format!(
            "{what} {endpoint:?}: {host} is an address to bind, not to connect to"
        ));
    }
    if port == 0 {
        return Err(format!("{what} {endpoint:?}: port 0 cannot be connected to"));
    }
    Ok(scheme)
}

fn check_tcp(what: &str, endpoint: &str) -> Result<(), String> {
    match check_endpoint(what, endpoint)? {
        Scheme::Tcp => Ok(()),
        Scheme::Http => Err(format!("{what} {endpoint:?} does not start with tcp://")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn good(flag: &str, want: &PodDeclaration) {
        assert_eq!(parse_pod_flag(flag).as_ref(), Ok(want));
    }

    #[track_caller]
    fn bad(flag: &str, why: &str) {
        assert_eq!(parse_pod_flag(flag), Err(why.to_owned()));
    }

    #[test]
    fn pod_flags() {
        let pod = PodDeclaration {
            pod: "10.0.0.1:8000".to_owned(),
            endpoint: "tcp://10.0.0.1:5557".to_owned(),
            ..PodDeclaration::default()
        };
        good("10.0.0.1:8000=tcp://10.0.0.1:5557", &pod);
        good(
            "10.0.0.1:8000=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558,model=a/b=c,rank=3",
            &PodDeclaration {
                replay_endpoint: Some("tcp://10.0.0.1:5558".to_owned()),
                model: Some("a/b=c".to_owned()),
                rank: Some(3),
                ..pod
            },
        );
        good(
            "a=b=http://[::1]:8000,model=m",
            &PodDeclaration {
                pod: "a=b".to_owned(),
                endpoint: "http://[::1]:8000".to_owned(),
                model: Some("m".to_owned()),
                ..PodDeclaration::default()
            },
        );
    }

    #[test]
    fn pod_flags_that_are_wrong() {
        bad("", r#""": want ID=tcp://host:port or ID=http://host:port"#);
        bad("tcp://h:1", r#""tcp://h:1": want ID=tcp://host:port or ID=http://host:port"#);
        bad("a=ipc:///x", r#"endpoint "ipc:///x" starts with neither tcp:// nor http://"#);
        bad("=tcp://h:1", r#""=tcp://h:1": the pod id before = is empty"#);
        bad("a=tcp://h", r#"endpoint "tcp://h" has no port"#);
        bad("a=tcp://:1", r#"endpoint "tcp://:1" has no host"#);
        bad("a=tcp://h:x", r#"endpoint "tcp://h:x": port "x" is not in 0..=65535"#);
        bad("a=tcp://h:0", r#"endpoint "tcp://h:0": port 0 cannot be connected to"#);
        bad("a=tcp://*:1", r#"endpoint "tcp://*:1": * is an address to bind, not to connect to"#);
        bad("a=tcp://::1:1", r#"endpoint "tcp://::1:1": an IPv6 host needs brackets"#);
        bad("a=tcp://h:1/x", r#"endpoint "tcp://h:1/x" has a path"#);
        bad("a=tcp://h:1,", r#"option "": want replay=, model= or rank="#);
        bad("a=tcp://h:1,rack=1", r#"option "rack" is none of replay, model, rank"#);
        bad("a=tcp://h:1,rank=-1", r#"rank "-1" is not a number"#);
        bad("a=tcp://h:1,rank=1,rank=1", "rank is given twice");
        bad("a=tcp://h:1,model=", "model is empty");
        bad("a=tcp://h:1,replay=h:2", r#"replay "h:2" starts with neither tcp:// nor http://"#);
        bad("a=tcp://h:1,replay=http://h:2", r#"replay "http://h:2" does not start with tcp://"#);
        bad("a=http://h:1,rank=1", "rank: an http:// engine announces it itself");
    }
}
