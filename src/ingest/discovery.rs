//! Who publishes: command-line pods, a watched file, and engines that are asked over HTTP.
//!
//! Everything ends in [`PodDeclaration`]s. An `http://` endpoint is not a publisher but an engine
//! that knows its publishers; [`resolve`] asks it and returns one declaration per rank.

use crate::ingest::fleet::PodDeclaration;

/// Bytes of a pod's name at most, wherever it is declared or announced.
pub const MAX_POD_ID_BYTES: usize = 512;
/// Largest rank that can be declared.
pub const MAX_RANK: u32 = 65_535;
/// Largest engine block size that is believed, in tokens. Hybrid models of vLLM align blocks with
/// their state pages and reach a few thousand.
pub const MAX_BLOCK_SIZE: u64 = 65_536;

mod address;
mod engine;
mod http;
mod pods_file;

pub use self::{
    address::{EndpointUse, check_endpoint},
    engine::{model_of, resolve},
    pods_file::PodsFile,
};

/// Parses a `--pod` flag: `ID=tcp://host:port[,replay=tcp://host:port][,model=NAME][,rank=N]` or
/// `ID=http://host:port[,model=NAME]`; `ipc://path` is as good as `tcp://host:port`.
///
/// The id may hold `:` and `=`; it ends before the first `=tcp://`, `=ipc://` or `=http://`. A model
/// name may hold `=` but no comma.
///
/// # Errors
///
/// A sentence that names the part that is wrong.
pub fn parse_pod_flag(flag: &str) -> Result<PodDeclaration, String> {
    let at = ["=tcp://", "=ipc://", "=http://"].iter().filter_map(|start| flag.find(start)).min();
    let Some((pod, rest)) = at.and_then(|at| flag.split_at_checked(at)) else {
        return Err(match flag.split_once('=') {
            None => format!("{flag:?}: want ID=tcp://host:port or ID=http://host:port"),
            Some((_, endpoint)) => {
                format!("endpoint {endpoint:?} starts with none of tcp://, ipc:// and http://")
            }
        });
    };
    if pod.is_empty() {
        return Err(format!("{flag:?}: the pod id before = is empty"));
    }
    let mut parts = rest.trim_start_matches('=').split(',');
    let endpoint = parts.next().unwrap_or_default();
    check("endpoint", endpoint, EndpointUse::ConnectOrAsk)?;
    let asked = endpoint.starts_with("http://");
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
            "replay" | "rank" if asked => {
                return Err(format!("{key}: an http:// engine announces it itself"));
            }
            "replay" => {
                check("replay", value, EndpointUse::Connect)?;
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

/// Checks an endpoint; the message names it.
fn check(what: &str, endpoint: &str, usage: EndpointUse) -> Result<(), String> {
    check_endpoint(endpoint, usage).map_err(|why| format!("{what} {endpoint:?}: {why}"))
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
            "a=ipc:///tmp/kv",
            &PodDeclaration {
                pod: "a".to_owned(),
                endpoint: "ipc:///tmp/kv".to_owned(),
                ..PodDeclaration::default()
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
        bad("a=h:1", r#"endpoint "h:1" starts with none of tcp://, ipc:// and http://"#);
        bad("=tcp://h:1", r#""=tcp://h:1": the pod id before = is empty"#);
        for (endpoint, why) in [
            ("tcp://h", "no port"),
            ("tcp://:1", "host is not a name or address"),
            ("tcp://h:0", "port is not in 1..=65535"),
            ("tcp://*:1", "* is an address to bind, not to connect to"),
            ("http://h:1/x", "a path"),
        ] {
            let forms = "must be tcp://host:port, ipc://path or http://host:port";
            bad(&format!("a={endpoint}"), &format!("endpoint {endpoint:?}: {why}; {forms}"));
        }
        bad("a=tcp://h:1,", r#"option "": want replay=, model= or rank="#);
        bad("a=tcp://h:1,rack=1", r#"option "rack" is none of replay, model, rank"#);
        bad("a=tcp://h:1,rank=-1", r#"rank "-1" is not a number"#);
        bad("a=tcp://h:1,rank=1,rank=1", "rank is given twice");
        bad("a=tcp://h:1,model=", "model is empty");
        for (replay, why) in [("h:2", "no scheme"), ("http://h:2", "scheme not supported here")] {
            let why = format!("replay {replay:?}: {why}; must be tcp://host:port or ipc://path");
            bad(&format!("a=tcp://h:1,replay={replay}"), &why);
        }
        bad("a=http://h:1,rank=1", "rank: an http:// engine announces it itself");
    }
}
