//! `tcp://host:port` and `http://host:port`.

/// What an endpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// A ZeroMQ socket.
    Tcp,
    /// An engine's HTTP server.
    Http,
}

/// Splits an endpoint into scheme, host (IPv6 in brackets) and port. A trailing slash is ignored.
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
}
