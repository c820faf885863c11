//! The caller's deadline: the `grpc-timeout` header.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// We give up this long before the caller does, so that our answer, with its reason, is the one
/// that it sees; the transport's own timer would answer CANCELLED.
const HEAD_START: Duration = Duration::from_millis(2);

/// When the caller of a request that arrived at `arrival` stops waiting; `None` without a deadline
/// or with one that cannot be read.
pub(super) fn of(metadata: &MetadataMap, arrival: Instant) -> Option<Instant> {
    let timeout = parse(metadata.get("grpc-timeout")?.to_str().ok()?)?;
    arrival.checked_add(timeout.saturating_sub(HEAD_START))
}

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: at most 8 digits, then one of `HMSmun`.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_read_as_the_protocol_says() {
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("99999999n"), Some(Duration::from_nanos(99_999_999)));
        assert_eq!(parse("15m"), Some(Duration::from_millis(15)));
        for bad in ["", "S", "1", "1x", "-1S", "123456789S", "1 S", "1é"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
