//! `epp`: the endpoint picker, an Envoy `ext_proc` server. Not built yet.

use std::process::ExitCode;

/// Exit status for a service that is not there (`EX_UNAVAILABLE` of sysexits).
const EX_UNAVAILABLE: u8 = 69;

fn main() -> ExitCode {
    #[expect(clippy::print_stderr, reason = "the only thing this program does")]
    {
        eprintln!("epp: not built yet");
    }
    ExitCode::from(EX_UNAVAILABLE)
}
