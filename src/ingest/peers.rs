//! Does a message on the bound socket come from the pod that it names?
//!
//! A topic is only a claim. What is known of a pod's address without it is the name itself, if that is
//! an address as with llm-d (`ip` or `ip:port`), else the host of the declared replay endpoint, if that
//! is one. A pod of which neither tells is refused while addresses are checked.

use std::net::{IpAddr, SocketAddr};

use crate::ingest::fleet::PodDeclaration;

/// Why a message is not from whom it says.
pub(crate) const WRONG: &str = "wrong_address";
/// Nothing tells where the pod is, or where the message comes from.
pub(crate) const UNKNOWN: &str = "unknown_address";

/// Judges a message of `pod` that came from `peer`.
///
/// # Errors
///
/// [`WRONG`] or [`UNKNOWN`].
pub(crate) fn judge(
    pod: &str,
    declared: Option<&PodDeclaration>,
    peer: Option<IpAddr>,
) -> Result<(), &'static str> {
    let replay = declared.and_then(|declared| declared.replay_endpoint.as_deref());
    let known = address(pod).or_else(|| address(replay?.strip_prefix("tcp://")?));
    match (known, peer) {
        (Some(known), Some(peer)) if known == peer.to_canonical() => Ok(()),
        (Some(_), Some(_)) => Err(WRONG),
        _ => Err(UNKNOWN),
    }
}

/// The address in `ip`, `ip:port` or `[ip]:port`.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let socket = || text.parse::<SocketAddr>().ok().map(|at| at.ip());
    bare.parse().ok().or_else(socket).map(|ip: IpAddr| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pod: &str, replay: &str, peer: &str, want: Result<(), &'static str>) {
        let declared = PodDeclaration {
            replay_endpoint: Some(replay.to_owned()).filter(|replay| !replay.is_empty()),
            ..PodDeclaration::default()
        };
        assert_eq!(judge(pod, Some(&declared), peer.parse().ok()), want, "{pod} {replay} {peer}");
    }

    #[test]
    fn a_pod_is_where_its_name_or_its_replay_socket_is() {
        check("10.0.0.1:8000", "", "10.0.0.1", Ok(()));
        check("10.0.0.1", "", "::ffff:10.0.0.1", Ok(()));
        check("[fd00::1]:8000", "", "fd00::1", Ok(()));
        check("10.0.0.1:8000", "", "10.0.0.2", Err(WRONG));
        check("10.0.0.1:8000", "tcp://10.0.0.2:5558", "10.0.0.2", Err(WRONG));
        check("vllm-0", "tcp://10.0.0.2:5558", "10.0.0.2", Ok(()));
        check("vllm-0", "tcp://10.0.0.2:5558", "10.0.0.3", Err(WRONG));
        check("vllm-0", "tcp://vllm-0.svc:5558", "10.0.0.3", Err(UNKNOWN));
        check("vllm-0", "ipc:///tmp/x", "10.0.0.3", Err(UNKNOWN));
        check("vllm-0", "", "10.0.0.3", Err(UNKNOWN));
        check("10.0.0.1:8000", "", "", Err(UNKNOWN));
        assert_eq!(judge("10.0.0.1", None, "10.0.0.1".parse().ok()), Ok(()));
    }
}
