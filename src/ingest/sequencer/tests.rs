//! Transcripts: one input a line, and the actions that it must lead to.
//!
//! `live 5` is message 5 of life `a`, `live 5b` the same of life `b`, whose clock is later; `5!` has
//! another payload at the same time. `replay 0-3` is four replies. Actions: deliveries are numbers;
//! `ask(n)` requests a replay; counters have a plus (`replay` goes without saying beside `ask`).

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use super::{Action, Counter, Message, Reason, ReplayConfig, Sequencer, SequencerConfig, fuzz};
use crate::model::{CountMode, PodState};

fn replay() -> SequencerConfig {
    let replay = ReplayConfig { held_messages: 4, held_bytes: 4400, ..ReplayConfig::default() };
    SequencerConfig { first_sequence: 0, replay: Some(replay) }
}

fn from_one() -> SequencerConfig {
    SequencerConfig { first_sequence: 1, ..replay() }
}

fn no_replay() -> SequencerConfig {
    SequencerConfig::default()
}

/// Runs a transcript and compares every line.
#[track_caller]
fn check(config: SequencerConfig, transcript: &str) {
    let mut sequencer = Sequencer::new(config.clone());
    let mut receiver = fuzz::Receiver::new(&config);
    let mut now = Instant::now();
    let mut ran = String::new();
    let mut wanted = String::new();
    for line in transcript.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (input, actions) = line.split_once("=>").unwrap();
        let (input, actions) = (input.trim(), actions.split_whitespace().collect::<Vec<_>>());
        let mut out = Vec::new();
        run(&mut sequencer, input, &mut now, &mut out);
        if matches!(input, "end" | "cut") {
            receiver.replay = None;
        }
        writeln!(ran, "{input} => {}", show(&out)).unwrap();
        writeln!(wanted, "{input} => {}", actions.join(" ")).unwrap();
        if let Some(sequence) = input.strip_prefix("clear ") {
            let sequence: u64 = sequence.parse().unwrap();
            let at = receiver.delivered.iter().position(|m| m.sequence == sequence);
            receiver.clear(at.unwrap());
        }
        receiver.take(&sequencer, &mut out);
    }
    assert!(ran == wanted, "wanted:\n{wanted}\nran:\n{ran}");
}

fn run(
    sequencer: &mut Sequencer<()>,
    input: &str,
    now: &mut Instant,
    out: &mut Vec<Action<()>>,
) {
    let (verb, rest) = input.split_once(' ').unwrap_or((input, ""));
    match verb {
        "start" => sequencer.start(*now, out),
        "live" => messages(rest).for_each(|m| sequencer.message(m, *now, out)),
        "replay" => messages(rest).for_each(|m| sequencer.replayed(m, *now, out)),
        "end" => sequencer.replay_end(*now, out),
        "cut" => sequencer.replay_failed(*now, out),
        "up" => sequencer.connected(*now, out),
        "down" => sequencer.disconnected(*now, out),
        "clear" => {
            sequencer.cleared(sequencer.epoch(), rest.parse().unwrap(), *now, out);
        }
        "wait" => {
            let end = *now + Duration::from_secs_f64(rest.parse().unwrap());
            while let Some(deadline) = sequencer.deadline().filter(|&at| at <= end) {
                *now = deadline.max(*now);
                sequencer.tick(*now, out);
            }
            *now = end;
            sequencer.tick(*now, out);
        }
        other => panic!("no input {other}"),
    }
}

/// `3`, `3b`, `3!`, `3-7b`, and several of them.
fn messages(words: &str) -> impl Iterator<Item = Message<()>> {
    words.split_whitespace().flat_map(|word| {
        let other = word.ends_with('!');
        let word = word.trim_end_matches('!');
        let life = word.chars().last().filter(char::is_ascii_lowercase);
        let word = word.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let life = life.map_or(0, |life| life as u64 - 'a' as u64);
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        (first..=last).map(move |sequence| Message {
            sequence,
            timestamp: 1e9 + 1e6 * life as f64 + sequence as f64,
            payload_hash: life << 60 | u64::from(other) << 59 | sequence,
            payload_bytes: 1000,
            payload: (),
        })
    })
}

fn show(out: &[Action<()>]) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut run: Option<(u64, u64, u64)> = None;
    for action in out {
        let word = match action {
            Action::Deliver(m) => {
                let life = m.payload_hash >> 60;
                let first = match run {
                    Some((life_before, first, last))
                        if life_before == life && last + 1 == m.sequence =>
                    {
                        words.pop();
                        first
                    }
                    _ => m.sequence,
                };
                run = Some((life, first, m.sequence));
                let life = if life == 0 { "" } else { "b" };
                if first == m.sequence {
                    format!("{first}{life}")
                } else {
                    format!("{first}-{}{life}", m.sequence)
                }
            }
            Action::Count(Counter::Replay) => continue,
            Action::Count(counter) => format!("+{}", counter.as_str()),
            Action::Reset { epoch } => format!("reset({epoch})"),
            Action::Rebuild => "rebuild".to_owned(),
            Action::CountMode(CountMode::Set) => "set".to_owned(),
            Action::CountMode(mode) => format!("{mode:?}"),
            Action::CountModeDefault => "default".to_owned(),
            Action::State(state, Reason::None) => state.as_str().to_owned(),
            Action::State(state, reason) => format!("{}[{reason}]", state.as_str()),
            Action::Stale(stale) => if *stale { "stale" } else { "fresh" }.to_owned(),
            Action::RequestReplay { from } => format!("ask({from})"),
            Action::CancelReplay => "cancel".to_owned(),
        };
        if !matches!(action, Action::Deliver(_)) {
            run = None;
        }
        words.push(word);
    }
    words.join(" ")
}

#[test]
fn start_with_an_idle_engine() {
    check(
        replay(),
        "start    => ask(0) replaying
         end      => live
         live 0-2 => 0-2
         wait 999 =>",
    );
    check(
        from_one(),
        "start    => ask(1) replaying
         end      => live
         live 1 2 => 1-2",
    );
}

#[test]
fn start_with_history() {
    check(
        replay(),
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
        replay(),
        "start      => ask(0) replaying
         replay 0-3 => 0-3
         wait 1.9   =>
         end        => live
         live 4     => 4",
    );
    // The live stream arrives where the replay is.
    check(
        replay(),
        "start      => ask(0) replaying
         replay 0-3 => 0-3
         live 4     => 4 cancel live",
    );
}

#[test]
fn start_with_rolled_over_history() {
    check(
        replay(),
        "start      => ask(0) replaying
         replay 7-9 => 7-9
         end        => partial[replay history starts at 7]
         live 10    => 10
         wait 9999  =>",
    );
    // Its end marker alone, though it published: the message may have been on its way.
    check(
        replay(),
        "start      => ask(0) replaying
         live 1     =>
         end        => ask(0)
         replay 0   => 0-1 cancel live",
    );
    check(
        replay(),
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
        no_replay(),
        "start      =>
         live 0     => 0 live
         live 1     => 1",
    );
    check(
        no_replay(),
        "start      =>
         live 7     => 7 partial[joined mid-stream, no replay]
         live 8     => 8
         wait 9999  =>",
    );
    // An engine that begins below the configured first.
    check(from_one(), "live 0 1   => 0 live 1");
}

#[test]
fn start_with_a_silent_replay() {
    check(
        replay(),
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
        replay(),
        "start      => ask(0) replaying
         wait 7     => ask(0) ask(0) +replay_failed cancel partial[replay silent]
         live 0     => 0 live",
    );
    // Silent in the middle, and nobody knows how much is missing.
    check(
        replay(),
        "start      => ask(0) replaying
         replay 0 1 => 0-1
         wait 9     => ask(2) ask(2) ask(2) +replay_failed set degraded[replay silent] cancel",
    );
}

#[test]
fn gaps_are_filled() {
    check(
        replay(),
        "live 0       => 0 live
         live 3       => +gap ask(1) replaying[gap of 2 batches at 1]
         live 4       =>
         replay 1 2   => 1-4 cancel live
         live 4       => +duplicate",
    );
    // By the live stream itself, out of order.
    check(
        replay(),
        "live 0       => 0 live
         live 3 2     => +gap ask(1) replaying[gap of 2 batches at 1]
         live 1       => 1-3 cancel live",
    );
    // Partial stays what it is.
    check(
        replay(),
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
        no_replay(),
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
        replay(),
        "live 0       => 0 live
         live 2-7     => +gap ask(1) replaying[gap of 1 batches at 1] +held_overflow +held_overflow
         replay 1     => 1-5
         replay 2-5   =>
         replay 6 7   => 6-7 cancel live",
    );
    // The replay ended before: what was dropped is asked for.
    check(
        replay(),
        "live 0       => 0 live
         live 2-7     => +gap ask(1) replaying[gap of 1 batches at 1] +held_overflow +held_overflow
         replay 1     => 1-5
         end          => ask(6)
         end          => ask(6)
         end          => ask(6)
         end          => +gap_unfilled set degraded[gap of 2 batches at 6]",
    );
}

#[test]
fn duplicates_late_ones_and_restarts() {
    check(
        no_replay(),
        "live 0-5     => 0 live 1-5
         live 3       => +duplicate
         live 3!      => +restart reset(2) 3 partial[joined mid-stream, no replay]
         live 4       => 4",
    );
    // Out of the window only the timestamp tells.
    check(
        no_replay(),
        "live 0-2000  => 0 live 1-2000
         live 977     => +duplicate
         live 976     => +late
         live 5       => +late
         live 5b      => +restart reset(2) 5b partial[joined mid-stream, no replay]
         live 6b      => 6b
         live 0b      => +late",
    );
    check(no_replay(), "live 18446744073709551615 => +end_marker");
}

#[test]
fn restarts_are_rebuilt_from_replay() {
    check(
        replay(),
        "live 0-5     => 0 live 1-5
         live 2b      => +restart reset(2) ask(0) replaying
         replay 0-1b  => 0-2b cancel live",
    );
    // While a replay runs.
    check(
        replay(),
        "live 0-5     => 0 live 1-5
         live 9       => +gap ask(6) replaying[gap of 3 batches at 6]
         live 7b      => +restart reset(2) ask(0) replaying
         replay 0-6b  => 0-7b cancel live",
    );
    check(
        replay(),
        "live 0-5     => 0 live 1-5
         live 9       => +gap ask(6) replaying[gap of 3 batches at 6]
         live 0b      => +restart reset(2) 0b cancel live
         live 1b      => 1b",
    );
    // The replay shows it.
    check(
        replay(),
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
        replay(),
        "start        => ask(0) replaying
         wait 7       => ask(0) ask(0) +replay_failed cancel partial[replay silent]
         live 7       => 7
         live 1b      => +restart reset(2) ask(0) replaying
         replay 0b    => 0-1b cancel live",
    );
}

#[test]
fn holes_are_asked_for_once() {
    check(
        replay(),
        "start        => ask(0) replaying
         replay 0-2   => 0-2
         replay 5     => ask(3)
         replay 3-6   => 3-6
         end          => live",
    );
    check(
        replay(),
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
        replay(),
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
        replay(),
        "live 0       => 0 live
         live 9       => +gap ask(1) replaying[gap of 8 batches at 1]
         replay 8     => +hole set degraded[hole in replay at 1] 8-9 cancel",
    );
    // It ends short of the live stream.
    check(
        replay(),
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
        replay(),
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
        replay(),
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
        replay(),
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
        replay(),
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
        replay(),
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
        replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 1     => +heal_failed cancel
             wait 9999    =>"
        ),
    );
    check(
        replay(),
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
        replay(),
        &format!(
            "{silent}
             wait 30      => ask(0)
             replay 0-4   => +heal_failed cancel
             wait 9999    =>"
        ),
    );
    // A gap is more urgent.
    check(
        replay(),
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
        replay(),
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
        no_replay(),
        "live 7       => 7 partial[joined mid-stream, no replay]
         clear 7      => live
         live 9       => +gap +gap_unfilled set degraded[gap of 1 batches at 8] 9
         clear 7      =>
         live 10      => 10
         clear 10     => default live",
    );
    check(
        replay(),
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
fn reconnects_are_verified() {
    // The same life, and nothing missed.
    check(
        replay(),
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
        replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 6       =>
         replay 3     =>
         replay 4 5   => 4-6 cancel live",
    );
    // A restart whose numbers overtook ours.
    check(
        replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 4b      =>
         replay 3b    => +restart reset(2) ask(0) replaying
         replay 0-3b  => 0-4b cancel live",
    );
    // A restarted engine that published nothing yet.
    check(
        replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         end          => +restart reset(2) ask(0) replaying
         end          => live
         live 0b      => 0b",
    );
    // What waited from before goes with the old life.
    check(
        replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         down         => stale
         up           => fresh ask(0) replaying[checking after a reconnect]
         end          => +restart reset(2) ask(0) replaying
         end          => live",
    );
    // Silent: the next live message decides.
    check(
        replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         wait 7       => ask(3) ask(3) +replay_failed cancel live
         live 4       => 4
         live 6       => +gap +gap_unfilled set degraded[gap of 1 batches at 5] 6",
    );
    check(
        replay(),
        "live 0-3     => 0 live 1-3
         down         => stale
         up           => fresh ask(3) replaying[checking after a reconnect]
         live 4       =>
         wait 7       => ask(3) ask(3) +replay_failed 4 cancel live",
    );
    // Nothing applied: from the start.
    check(
        replay(),
        "start        => ask(0) replaying
         end          => live
         down         => stale
         up           => fresh ask(0) replaying
         replay 0     => 0
         end          => live",
    );
    // Without replay there is nothing to ask.
    check(
        no_replay(),
        "live 0       => 0 live
         down         => stale
         up           => fresh
         live 1       => 1",
    );
}

/// The cases of `reference/llm-d-indexer.md`, section 11; what differs is in the module header.
#[test]
fn conformance_c100_to_c109() {
    // C100: cut after two.
    check(
        replay(),
        "start        => ask(0) replaying
         replay 0 1   => 0-1
         cut          => ask(2)
         replay 2     => 2
         end          => live",
    );
    // C101: cut after all.
    check(
        replay(),
        "start        => ask(0) replaying
         replay 0-2   => 0-2
         cut          => ask(3)
         end          => live",
    );
    // C102: history starts at 1.
    check(
        replay(),
        "start        => ask(0) replaying
         replay 1     => 1
         end          => partial[replay history starts at 1]",
    );
    // C103: history 0, 2.
    check(
        replay(),
        "start        => ask(0) replaying
         replay 0 2   => 0 ask(1)
         replay 2     => +hole set degraded[hole in replay at 1] 2
         end          =>",
    );
    // C104: replies 1.1 s apart.
    check(
        replay(),
        "start        => ask(0) replaying
         wait 1.1     =>
         replay 0     => 0
         wait 1.1     =>
         replay 1     => 1
         wait 1.1     =>
         replay 2     => 2
         wait 1.1     =>
         end          => live",
    );
    // C105: silent.
    check(
        replay(),
        "start        => ask(0) replaying
         wait 20      => ask(0) ask(0) +replay_failed cancel partial[replay silent]",
    );
    // C106: live 0, 2 with 1, 2 in the buffer.
    check(
        replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         replay 1 2   => 1-2 cancel live",
    );
    // C107: the replay fails.
    check(
        replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         wait 7       => ask(1) ask(1) +replay_failed +gap_unfilled set \
                         degraded[gap of 1 batches at 1] 2 cancel",
    );
    // C108: live 0, 1, then 0.
    check(
        replay(),
        "live 0 1     => 0 live 1
         live 0b      => +restart reset(2) 0b live",
    );
    // C109: live ones that the replay covered.
    check(
        replay(),
        "start        => ask(0) replaying
         live 1 2     =>
         replay 0     => 0-2 cancel live
         wait 20      =>",
    );
}

#[test]
fn labels_are_distinct() {
    let labels: std::collections::HashSet<_> = Counter::ALL.map(Counter::as_str).into();
    assert_eq!(labels.len(), Counter::ALL.len());
    assert_eq!(Reason::Hole { at: 3 }.as_str(), "hole");
    assert_eq!(Sequencer::<()>::new(no_replay()).state().0, PodState::Connecting);
}
