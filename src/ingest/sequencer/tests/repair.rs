//! Gaps, holes, repairs and what ends doubt.

use super::{check, no_replay, replay};

#[test]
fn gaps_are_filled() {
    check(
        &replay(),
        "live 0       => 0 live
         live 3       => +gap ask(1) replaying[gap of 2 batches at 1]
         live 4       =>
         replay 1 2   => 1-4 cancel live
         live 4       => +duplicate",
    );
    // By the live stream itself, out of order.
    check(
        &replay(),
        "live 0       => 0 live
         live 3 2     => +gap ask(1) replaying[gap of 2 batches at 1]
         live 1       => 1-3 cancel live",
    );
    // Partial stays what it is.
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 5     => 5
         end          => partial[replay history starts at 5]
         live 7       => +gap ask(6)
         replay 6     => 6-7 cancel",
    );
}

#[test]
fn gaps_without_replay() {
    check(
        &no_replay(),
        "live 0 1     => 0 live 1
         live 4       => +gap +gap_unfilled set degraded[gap of 2 batches at 2] 4
         live 5       => 5
         live 7       => +gap +gap_unfilled degraded[gap of 1 batches at 6] 7
         live 6       => +late",
    );
}

#[test]
fn held_messages_are_bounded() {
    check(
        &replay(),
        "live 0       => 0 live
         live 2-7     => +gap ask(1) replaying[gap of 1 batches at 1] +held_overflow +held_overflow
         replay 1     => 1-5
         replay 2-5   =>
         replay 6 7   => 6-7 cancel live",
    );
    // The replay ended before: what was dropped is asked for.
    check(
        &replay(),
        "live 0       => 0 live
         live 2-7     => +gap ask(1) replaying[gap of 1 batches at 1] +held_overflow +held_overflow
         replay 1     => 1-5
         end          => ask(6)
         end          => ask(6)
         end          => ask(6)
         end          => +gap_unfilled set degraded[gap of 2 batches at 6]",
    );
}

/// What the caller had no room for is known to be missing, even if nothing comes after it.
#[test]
fn lost_messages_are_asked_for() {
    check(
        &replay(),
        "live 0       => 0 live
         lost 2       => +gap ask(1) replaying[gap of 2 batches at 1]
         lost 3       =>
         replay 1 2   => 1-2
         live 4       =>
         replay 3     => 3-4 cancel live
         lost 4       =>",
    );
    // Silence tells that they are gone.
    check(
        &replay(),
        "live 0       => 0 live
         lost 1       => +gap ask(1) replaying[gap of 1 batches at 1]
         wait 6       => ask(1) ask(1) +replay_failed +gap_unfilled set degraded[gap of 1 batches at 1] cancel
         lost 2       =>
         live 3       => +gap +gap_unfilled degraded[gap of 2 batches at 1] 3",
    );
    // A flood says it once; a clear applied before the last loss does not end it.
    check(
        &no_replay(),
        "lost 0       =>
         live 1       => 1 partial[joined mid-stream, no replay]
         lost 2       => +gap_unfilled set degraded[gap of 1 batches at 2]
         lost 3       =>
         clear 1      => set degraded[gap of 1 batches at 2]
         live 4       => +gap +gap_unfilled degraded[gap of 2 batches at 2] 4
         clear 4      => default live",
    );
}

#[test]
fn holes_are_asked_for_once() {
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 0-2   => 0-2
         replay 5     => ask(3)
         replay 3-6   => 3-6
         end          => live",
    );
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 0-2   => 0-2
         replay 5     => ask(3)
         replay 5     => +hole set degraded[hole in replay at 3] 5
         replay 6     => 6
         end          =>
         live 7       => 7
         wait 9999    =>",
    );
    // A live message is in it.
    check(
        &replay(),
        "live 0       => 0 live
         live 3       => +gap ask(1) replaying[gap of 2 batches at 1]
         live 6       =>
         replay 1     => 1
         replay 4     => ask(2)
         replay 4     => +hole set degraded[hole in replay at 2] 3-4
         replay 5     => 5-6 cancel",
    );
    // The gap rolled out of the engine's buffer.
    check(
        &replay(),
        "live 0       => 0 live
         live 9       => +gap ask(1) replaying[gap of 8 batches at 1]
         replay 8     => +hole set degraded[hole in replay at 1] 8-9 cancel",
    );
    // It ends short of the live stream.
    check(
        &replay(),
        "live 0       => 0 live
         live 4       => +gap ask(1) replaying[gap of 3 batches at 1]
         replay 1     => 1
         end          => ask(2)
         end          => ask(2)
         end          => ask(2)
         end          => +gap_unfilled set degraded[gap of 2 batches at 2] 4",
    );
}

#[test]
fn a_silent_repair_degrades_and_cools_down() {
    check(
        &replay(),
        "live 0       => 0 live
         live 2 3     => +gap ask(1) replaying[gap of 1 batches at 1]
         wait 7       => ask(1) ask(1) +replay_failed +gap_unfilled set \
                         degraded[gap of 1 batches at 1] 2-3 cancel
         live 5       => +gap +gap_unfilled degraded[gap of 1 batches at 4] 5
         wait 20      =>
         live 7       => +gap +gap_unfilled degraded[gap of 1 batches at 6] 7",
    );
    // Refused connections are spread over the same time.
    check(
        &replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         cut          =>
         wait 2       => ask(1)
         cut          =>
         wait 2       => ask(1)
         cut          =>
         wait 2       => +replay_failed +gap_unfilled set degraded[gap of 1 batches at 1] 2",
    );
}

#[test]
fn heals_by_a_whole_replay() {
    check(
        &replay(),
        "start        => ask(0) replaying
         live 2       =>
         wait 7       => ask(0) ask(0) +replay_failed 2 cancel partial[replay silent]
         wait 28.9    =>
         wait 0.2     => ask(0)
         live 3       => 3
         replay 0-2   =>
         end          => ask(3)
         replay 3     => cancel +healed rebuild 0-3 live
         live 4       => 4",
    );
    check(
        &replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         wait 7       => ask(1) ask(1) +replay_failed +gap_unfilled set \
                         degraded[gap of 1 batches at 1] 2 cancel
         wait 30      => ask(0)
         replay 0-2   => cancel +healed rebuild default 0-2 live",
    );
}

#[test]
fn failed_heals_change_nothing() {
    let silent = "start        => ask(0) replaying
         live 9       =>
         wait 7       => ask(0) ask(0) +replay_failed 9 cancel partial[replay silent]";
    // Back-off: 30 s, 60 s, … 10 min.
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             wait 2       => +heal_failed cancel
             wait 58      =>
             wait 1       => ask(0)
             cut          => +heal_failed
             wait 119     =>
             wait 1       => ask(0)
             end          => +heal_failed"
        ),
    );
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 1     => +heal_failed cancel
             wait 9999    =>"
        ),
    );
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 0 2   => ask(1)
             replay 2     => +heal_failed cancel
             wait 9999    =>"
        ),
    );
    // More than may be buffered.
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 0-4   => +heal_failed cancel
             wait 9999    =>"
        ),
    );
    // A gap is more urgent.
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 0     =>
             live 11      => +gap ask(10)
             replay 10    => 10-11 cancel
             wait 59      =>
             wait 1       => ask(0)"
        ),
    );
    // It shows another life.
    check(
        &replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 9b    => +restart reset(2) ask(0) replaying"
        ),
    );
}

#[test]
fn a_clear_ends_doubt() {
    check(
        &no_replay(),
        "live 7       => 7 partial[joined mid-stream, no replay]
         clear 7      => live
         live 9       => +gap +gap_unfilled set degraded[gap of 1 batches at 8] 9
         clear 7      => set degraded[gap of 1 batches at 8]
         live 10      => 10
         clear 10     => default live",
    );
    check(
        &replay(),
        "start        => ask(0) replaying
         live 9       =>
         wait 7       => ask(0) ask(0) +replay_failed 9 cancel partial[replay silent]
         wait 30      => ask(0)
         live 10      => 10
         clear 10     => cancel live
         wait 9999    =>",
    );
}

#[test]
fn overflow_is_remembered() {
    check(
        &replay(),
        "live 0       => 0 live
         live 2-7     => +gap ask(1) replaying[gap of 1 batches at 1] +held_overflow +held_overflow
         wait 7       => ask(1) ask(1) +replay_failed +gap_unfilled set \
                         degraded[gap of 1 batches at 1] 2-5 +gap_unfilled \
                         degraded[gap of 2 batches at 6] cancel",
    );
}

#[test]
fn a_silent_start_is_tried_again() {
    let silent = "start        => ask(0) replaying
         wait 7       => ask(0) ask(0) +replay_failed cancel partial[replay silent]
         wait 28      =>
         wait 1       => ask(0)";
    // Nothing is applied, so nothing has to be buffered.
    check(&replay(), &format!("{silent}\n replay 0 1 => 0 replaying 1\n end => live"));
    check(&replay(), &format!("{silent}\n end => live\n live 0 => 0"));
    check(
        &replay(),
        &format!("{silent}\n replay 5 => 5 partial[replay history starts at 5]\n end =>"),
    );
    check(&replay(), &format!("{silent}\n wait 6 => ask(0) ask(0) +replay_failed cancel"));
}
