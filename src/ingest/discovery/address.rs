//! Endpoints: `tcp://host:port`, `ipc://path` and `http://host:port`.

use std::net::Ipv6Addr;

/// What an endpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// A ZeroMQ socket.
    Tcp,
    /// An engine's HTTP server.
    Http,
}

/// What an endpoint is for, and so which forms it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointUse {
    /// We bind it; the host may be `*`, the port `*` or 0.
    Bind,
    /// We connect to it with ZeroMQ.
    Connect,
    /// As `Connect`, or `http://host:port` of an engine that is asked.
    ConnectOrAsk,
}

/// Checks the form of an endpoint that somebody wrote: `tcp://host:port`, `ipc://path`, and for
/// some uses `http://host:port`. User names and passwords are refused, so no endpoint holds a secret.
///
/// # Errors
///
/// What is wrong with it, and which forms are legal. The endpoint itself is not repeated.
pub fn check_endpoint(text: &str, usage: EndpointUse) -> Result<(), String> {
    let forms = match usage {
        EndpointUse::Bind | EndpointUse::Connect => "tcp://host:port or ipc://path",
        EndpointUse::ConnectOrAsk => "tcp://host:port, ipc://path or http://host:port",
    };
    let wrong = |why: &str| Err(format!("{why}; must be {forms}"));
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return wrong("white space");
    }
    let Some((scheme, rest)) = text.split_once("://") else { return wrong("no scheme") };
    let address = match scheme {
        "ipc" if rest.is_empty() => return wrong("no path"),
        "ipc" => return Ok(()),
        "tcp" => rest,
        "http" if usage == EndpointUse::ConnectOrAsk => rest.strip_suffix('/').unwrap_or(rest),
        _ => return wrong("scheme not supported here"),
    };
    if address.contains('/') {
        return wrong("a path");
    }
    let Some((host, port)) = address.rsplit_once(':').filter(|(_, port)| !port.contains(']'))
    else {
        return wrong("no port");
    };
    let bind = usage == EndpointUse::Bind;
    match port.parse::<u16>() {
        Ok(1..) => {}
        Ok(0) if bind => {}
        Err(_) if bind && port == "*" => {}
        _ => return wrong("port is not in 1..=65535"),
    }
    if is_wildcard(host) {
        let why = format!("{host} is an address to bind, not to connect to");
        return if bind { Ok(()) } else { wrong(&why) };
    }
    let v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let legal = match v6 {
        // A zone, as in fe80::1%eth0, is the system's business.
        Some(v6) => v6.split('%').next().is_some_and(|v6| v6.parse::<Ipv6Addr>().is_ok()),
        None => {
            !host.is_empty()
                && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        }
    };
    if legal { Ok(()) } else { wrong("host is not a name or address") }
}

/// Splits an endpoint that is [legal](check_endpoint), or announced by an engine, into scheme, host (IPv6 in brackets) and port. A trailing slash is ignored.
///
/// # Errors
///
/// The quoted endpoint and what is wrong with it.
pub(super) fn split(endpoint: &str) -> Result<(Scheme, &str, u16), String> {
    let (scheme, rest) = if let Some(rest) = endpoint.strip_prefix("tcp://") {
        (Scheme::Tcp, rest)
    } else if let Some(rest) = endpoint.strip_prefix("http://") {
        (Scheme::Http, rest)
    } else {
        return Err(format!("{endpoint:?} starts with neither tcp:// nor http://"));
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains('/') {
        return Err(format!("{endpoint:?} has a path"));
    }
    // The last colon, unless it is inside an IPv6 address.
    let Some((host, port)) = rest.rsplit_once(':').filter(|(_, port)| !port.contains(']')) else {
        return Err(format!("{endpoint:?} has no port"));
    };
    if host.is_empty() {
        return Err(format!("{endpoint:?} has no host"));
    }
    if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
        return Err(format!("{endpoint:?}: an IPv6 host needs brackets"));
    }
    let port =
        port.parse().map_err(|_| format!("{endpoint:?}: port {port:?} is not in 0..=65535"))?;
    Ok((scheme, host, port))
}

/// Is this an address that only a server can use?
pub(super) fn is_wildcard(host: &str) -> bool {
    matches!(host, "*" | "0.0.0.0" | "[::]" | "[::0]")
}

/// An engine's announced endpoint as seen from here: a wildcard is the host that answered.
///
/// # Errors
///
/// When it cannot be connected to.
pub(super) fn reachable(announced: &str, http_host: &str, offset: u32) -> Result<String, String> {
    let (scheme, host, port) = split(announced)?;
    if scheme != Scheme::Tcp {
        return Err(format!("{announced:?} does not start with tcp://"));
    }
    let host = if is_wildcard(host) { http_host } else { host };
    let port = u16::try_from(u32::from(port).saturating_add(offset)).ok().filter(|&port| port > 0);
    match port {
        Some(port) => Ok(format!("tcp://{host}:{port}")),
        None => Err(format!("{announced:?} with rank {offset} is no port to connect to")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_become_the_http_host() {
        for host in ["*", "0.0.0.0", "[::]"] {
            assert_eq!(
                reachable(&format!("tcp://{host}:5557"), "10.0.0.1", 2).unwrap(),
                "tcp://10.0.0.1:5559"
            );
        }
        assert_eq!(reachable("tcp://h:1", "[::1]", 0).unwrap(), "tcp://h:1");
        assert_eq!(reachable("tcp://*:1", "[::1]", 0).unwrap(), "tcp://[::1]:1");
        for bad in ["tcp://*:0", "ipc:///tmp/x", "inproc://x", "http://h:1", "tcp://*"] {
            assert!(reachable(bad, "h", 0).is_err(), "{bad}");
        }
        assert!(reachable("tcp://*:65535", "h", 1).is_err());
    }

    #[test]
    fn endpoints_are_checked_by_use() {
        use EndpointUse::{Bind, Connect, ConnectOrAsk};
        for (text, usage) in [
            ("tcp://10.0.0.1:5557", Connect),
            ("tcp://vllm-0.vllm.svc_x:5557", Connect),
            ("tcp://[2001:db8::1]:5557", Connect),
            ("tcp://[fe80::1%eth0]:5557", Connect),
            ("ipc:///tmp/kv.sock", Connect),
            ("tcp://*:5557", Bind),
            ("tcp://0.0.0.0:0", Bind),
            ("tcp://127.0.0.1:*", Bind),
            ("tcp://[::]:5557", Bind),
            ("ipc:///tmp/kv.sock", ConnectOrAsk),
            ("http://10.0.0.1:8000", ConnectOrAsk),
            ("http://10.0.0.1:8000/", ConnectOrAsk),
        ] {
            assert_eq!(check_endpoint(text, usage), Ok(()), "{text}");
        }
        for (text, usage, part) in [
            ("10.0.0.1:5557", Connect, "no scheme"),
            ("", Connect, "no scheme"),
            ("tcp://10.0.0.1", Connect, "no port"),
            ("tcp://[::1]", Connect, "no port"),
            ("http://10.0.0.1", ConnectOrAsk, "no port"),
            ("http://", ConnectOrAsk, "no port"),
            ("tcp://10.0.0.1:0", Connect, "port"),
            ("tcp://10.0.0.1:65536", Connect, "port"),
            ("tcp://*:5557", Connect, "* is an address to bind"),
            ("tcp://0.0.0.0:5557", Connect, "to bind"),
            ("tcp://[::]:5557", Connect, "to bind"),
            ("tcp://10.0.0.1:5557 ", Connect, "white space"),
            ("ipc:///tmp/a b", Connect, "white space"),
            ("tcp://10.0.0.1:5557/", Connect, "path"),
            ("tcp://:5557", Bind, "host"),
            ("tcp://::1:5557", Connect, "host"),
            ("ipc://", Bind, "no path"),
            ("http://10.0.0.1:8000", Bind, "not supported"),
            ("https://10.0.0.1:8000", ConnectOrAsk, "not supported"),
            ("http://me:secret@10.0.0.1:8000", ConnectOrAsk, "host"),
            ("http://10.0.0.1:8000/v1", ConnectOrAsk, "a path"),
        ] {
            let message = check_endpoint(text, usage).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
