//! Duplicates, restarts and reconnects.

use std::time::Instant;

use super::{Action, Sequencer, SequencerConfig, check, no_replay, replay, run};

#[test]
fn duplicates_late_ones_and_restarts() {
    check(
        &no_replay(),
        "live 0-5     => 0 live 1-5
         live 3       => +duplicate
         live 3!      => +restart reset(2) 3 partial[joined mid-stream, no replay]
         live 4       => 4",
    );
    // Out of the window only the timestamp tells.
    check(
        &no_replay(),
        "live 0-2000  => 0 live 1-2000
         live 977     => +duplicate
         live 976     => +late
         live 5       => +late
         live 5b      => +restart reset(2) 5b partial[joined mid-stream, no replay]
         live 6b      => 6b
         live 0b      => +late",
    );
    check(&no_replay(), "live 18446744073709551615 => +end_marker");
}

#[test]
fn restarts_are_rebuilt_from_replay() {
    check(
        &replay(),
        "live 0-5     => 0 live 1-5
         live 2b      => +restart reset(2) ask(0) replaying
         replay 0-1b  => 0-2b cancel live",
    );
    // While a replay runs.
    check(
        &replay(),
        "live 0-5     => 0 live 1-5
         live 9       => +gap ask(6) replaying[gap of 3 batches at 6]
         live 7b      => +restart reset(2) ask(0) replaying
         replay 0-6b  => 0-7b cancel live",
    );
    check(
        &replay(),
        "live 0-5     => 0 live 1-5
         live 9       => +gap ask(6) replaying[gap of 3 batches at 6]
         live 0b      => +restart reset(2) 0b cancel live
         live 1b      => 1b",
    );
    // The replay shows it.
    check(
        &replay(),
        "live 0 1     => 0 live 1
         live 5       => +gap ask(2) replaying[gap of 3 batches at 2]
         replay 2-4   => 2-5 cancel live
         live 8 9     => +gap ask(6) replaying[gap of 2 batches at 6]
         replay 8b    => +restart reset(2) ask(0) replaying
         replay 0-8b  => 0-8b
         end          => live",
    );
    // A new engine deserves a new try.
    check(
        &replay(),
        "start        => ask(0) replaying
         wait 7       => ask(0) ask(0) +replay_failed cancel partial[replay silent]
         live 7       => 7
         live 1b      => +restart reset(2) ask(0) replaying
         replay 0b    => 0-1b cancel live",
    );
}

#[test]
fn reconnects_are_verified() {
    // The same life, and nothing missed.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         down         =>
         up           => fresh ask(3) replaying[checking after a reconnect]
         replay 3     =>
         end          => live
         up           =>",
    );
    // Something missed, something live.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 6       =>
         replay 3     =>
         replay 4 5   => 4-6 cancel live",
    );
    // A restart whose numbers overtook ours.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 4b      =>
         replay 3b    => +restart reset(2) ask(0) replaying
         replay 0-3b  => 0-4b cancel live",
    );
    // A restarted engine that published nothing yet.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         end          => +restart reset(2) ask(0) replaying
         end          => live
         live 0b      => 0b",
    );
    // What waited from before goes with the old life.
    check(
        &replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         down         => stale
         up           => fresh ask(0) replaying[checking after a reconnect]
         end          => +restart reset(2) ask(0) replaying
         end          => live",
    );
    // Silent: the next live message decides.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         wait 7       => ask(3) ask(3) +replay_failed cancel live
         live 4       => 4
         live 6       => +gap +gap_unfilled set degraded[gap of 1 batches at 5] 6",
    );
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 4       =>
         wait 7       => ask(3) ask(3) +replay_failed 4 cancel live",
    );
    // Nothing applied: from the start.
    check(
        &replay(),
        "start        => ask(0) replaying
         end          => live
         down         => stale
         up           => fresh ask(0) replaying
         replay 0     => 0
         end          => live",
    );
    // Without replay there is nothing to ask.
    check(
        &no_replay(),
        "live 0       => 0 live
         down         => stale
         up           => fresh
         live 1       => 1",
    );
}

#[test]
fn what_cannot_be_verified_is_in_doubt() {
    // The last applied message rolled out of the buffer.
    check(
        &replay(),
        "live 0       => 0 live
         down         => stale
         up           => fresh ask(0) replaying[checking after a reconnect]
         replay 1     => set degraded[replay history starts at 1] 1
         end          =>",
    );
    // Nothing applied: what waits from before the reconnect may be another life's.
    check(
        &replay(),
        "start        => ask(0) replaying
         live 1       =>
         down         => stale
         up           => fresh ask(0)
         replay 0b    => 0b
         end          => live",
    );
}

#[test]
fn a_life_on_a_clock_that_is_behind_is_noticed() {
    // By its first message, however long ago ours was.
    check(
        &no_replay(),
        "live 0-2000  => 0 live 1-2000
         live 0       => +duplicate
         live 0b<     => +restart reset(2) 0b live",
    );
    // We joined later: the first word after a reconnect, or SGLang's clear.
    check(
        &no_replay(),
        "live 5-6     => 5 partial[joined mid-stream, no replay] 6
         live 0b<     => +late
         down         => stale
         up           => fresh
         live 0b<     => +restart reset(2) 0b live",
    );
    check(
        &no_replay(),
        "live 5-6     => 5 partial[joined mid-stream, no replay] 6
         live 0b^<    => +restart reset(2) 0b live",
    );
    // Its beginning was not heard: it counts on.
    check(
        &no_replay(),
        "live 0-2000  => 0 live 1-2000
         live 3b< 4b< => +late +late
         live 9b<     => +late
         live 10b<    => +late
         live 11b<    => +restart reset(2) 11b partial[joined mid-stream, no replay]
         live 12b<    => 12b",
    );
    // What is late in between does not.
    check(
        &no_replay(),
        "live 0-2000  => 0 live 1-2000
         live 3 4     => +late +late
         live 2001    => 2001
         live 5 6     => +late +late
         live 6 6     => +late +late",
    );
    // The replay's word; what waits of the old life goes.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 6       =>
         replay 3b<   => +restart reset(2) ask(0) replaying
         replay 0-3b< => 0-3b
         end          => live",
    );
}

#[test]
fn a_clock_that_is_set_back_clears_nothing() {
    check(
        &no_replay(),
        "live 0-3     => 0 live 1-3
         live 4-6<    => 4-6
         live 5<      => +duplicate",
    );
    // Proved by the replay.
    check(
        &replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         replay 3     =>
         end          => live
         live 4<      => 4",
    );
    // After a reconnect that nothing proved harmless, it may be a life that overtook us.
    check(
        &no_replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh
         live 4<      => set degraded[clock set back after a reconnect at 4] 4
         live 5<      => 5
         live 4000001 => +gap +gap_unfilled degraded[gap of 3999995 batches at 6] 4000001",
    );
    check(
        &no_replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh
         live 4       => 4
         live 5<      => 5",
    );
}

/// Each loss puts what is held in doubt once; a flood of lost messages says it no more than once.
#[test]
fn losses_are_told_one_by_one() {
    check_losses(
        &no_replay(),
        "live 0 2 3 5; lost 6; lost 7; lost 8; live 9",
        &["gap of 1 batches at 1", "gap of 1 batches at 4", "gap of 3 batches at 6"],
    );
    check_losses(
        &no_replay(),
        "live 0; lost 1; lost 2; live 3",
        &["gap of 1 batches at 1", "gap of 2 batches at 1"],
    );
    check_losses(&no_replay(), "live 3 4", &[]);
    check_losses(&replay(), "live 0 2; replay 2", &["hole in replay at 1"]);
    check_losses(&replay(), "live 0; live 2; wait 7", &["gap of 1 batches at 1"]);
    check_losses(
        &replay(),
        "live 0; down; up; replay 7",
        &["replay history starts at 7", "hole in replay at 1"],
    );
    check_losses(&replay(), "live 0; live 3; replay 1; wait 9", &["gap of 1 batches at 2"]);
}

#[track_caller]
fn check_losses(config: &SequencerConfig, inputs: &str, wanted: &[&str]) {
    let mut sequencer = Sequencer::new(config.clone());
    let (mut now, mut out) = (Instant::now(), Vec::new());
    for input in inputs.split(';') {
        run(&mut sequencer, input.trim(), &mut now, &mut out);
    }
    let losses = out.iter().filter_map(|action| match action {
        Action::Loss(reason) => Some(reason.to_string()),
        _ => None,
    });
    assert_eq!(losses.collect::<Vec<_>>(), wanted, "{inputs}");
}
