//! How a publisher is joined.

use super::{check, from_one, no_replay, replay};

#[test]
fn start_with_an_idle_engine() {
    check(
        &replay(),
        "start    => ask(0) replaying
         end      => live
         live 0-2 => 0-2
         wait 999 =>",
    );
    check(
        &from_one(),
        "start    => ask(1) replaying
         end      => live
         live 1 2 => 1-2",
    );
}

#[test]
fn start_with_history() {
    check(
        &replay(),
        "start      => ask(0) replaying
         live 5     =>
         replay 0-3 => 0-3
         live 6     =>
         replay 4   => 4-6 cancel live
         replay 5 6 =>
         live 7     => 7",
    );
    // Nothing live tells where it ends: the end marker does.
    check(
        &replay(),
        "start      => ask(0) replaying
         replay 0-3 => 0-3
         wait 1.9   =>
         end        => live
         live 4     => 4",
    );
    // The live stream arrives where the replay is.
    check(
        &replay(),
        "start      => ask(0) replaying
         replay 0-3 => 0-3
         live 4     => 4 cancel live",
    );
}

#[test]
fn start_with_rolled_over_history() {
    check(
        &replay(),
        "start      => ask(0) replaying
         replay 7-9 => 7-9
         end        => partial[replay history starts at 7]
         live 10    => 10
         wait 9999  =>",
    );
    // Its end marker alone, though it published: the message may have been on its way.
    check(
        &replay(),
        "start      => ask(0) replaying
         live 1     =>
         end        => ask(0)
         replay 0   => 0-1 cancel live",
    );
    check(
        &replay(),
        "start      => ask(0) replaying
         live 4     =>
         end        => ask(0)
         end        => ask(0)
         end        => 4 partial[replay history starts at 4]
         wait 9999  =>",
    );
}

#[test]
fn start_without_replay() {
    check(
        &no_replay(),
        "start      =>
         live 0     => 0 live
         live 1     => 1",
    );
    check(
        &no_replay(),
        "start      =>
         live 7     => 7 partial[joined mid-stream, no replay]
         live 8     => 8
         wait 9999  =>",
    );
    // An engine that begins below the configured first.
    check(&from_one(), "live 0 1   => 0 live 1");
}

#[test]
fn start_with_a_silent_replay() {
    check(
        &replay(),
        "start      => ask(0) replaying
         live 7     =>
         wait 5.9   => ask(0) ask(0)
         live 8     =>
         wait 0.2   => +replay_failed 7-8 cancel partial[replay silent]
         live 9     => 9
         live 11    => +gap +gap_unfilled set degraded[gap of 1 batches at 10] 11",
    );
    // Idle: whatever comes first decides.
    check(
        &replay(),
        "start      => ask(0) replaying
         wait 7     => ask(0) ask(0) +replay_failed cancel partial[replay silent]
         live 0     => 0 live",
    );
    // Silent in the middle, and nobody knows how much is missing.
    check(
        &replay(),
        "start      => ask(0) replaying
         replay 0 1 => 0-1
         wait 9     => ask(2) ask(2) ask(2) +replay_failed set degraded[replay silent] cancel",
    );
}
