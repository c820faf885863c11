//! Transcripts: one input a line, and the actions that it must lead to.
//!
//! `live 5` is message 5 of life `a`, `live 5b` the same of life `b`, whose clock is later; `5!` has
//! another payload at the same time. `replay 0-3` is four replies; `lost 5` is a live message that there
//! was no room for. Actions: deliveries are numbers;
//! `ask(n)` requests a replay; counters have a plus (`replay` goes without saying beside `ask`).

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use super::{Action, Counter, Message, Reason, ReplayConfig, Sequencer, SequencerConfig, fuzz};
use crate::model::{CountMode, PodState};

mod lives;
mod repair;
mod start;

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
fn check(config: &SequencerConfig, transcript: &str) {
    let mut sequencer = Sequencer::new(config.clone());
    let mut receiver = fuzz::Receiver::new(config);
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

fn run(sequencer: &mut Sequencer<()>, input: &str, now: &mut Instant, out: &mut Vec<Action<()>>) {
    let (verb, rest) = input.split_once(' ').unwrap_or((input, ""));
    match verb {
        "start" => sequencer.start(*now, out),
        "live" => messages(rest).for_each(|m| sequencer.message(m, *now, out)),
        "replay" => messages(rest).for_each(|m| sequencer.replayed(m, *now, out)),
        "end" => sequencer.replay_end(*now, out),
        "cut" => sequencer.replay_failed(*now, out),
        "up" => sequencer.connected(*now, out),
        "lost" => sequencer.lost(rest.parse().unwrap(), *now, out),
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

/// `3`, `3b`, `3!`, `3-7b`, and several of them; `0b^` begins with a clear, the clock of `3b<` is
/// behind that of every life.
fn messages(words: &str) -> impl Iterator<Item = Message<()>> {
    words.split_whitespace().flat_map(|word| {
        let [other, clears, behind] = ['!', '^', '<'].map(|flag| word.contains(flag));
        let word = word.trim_end_matches(['!', '^', '<']);
        let life = word.chars().last().filter(char::is_ascii_lowercase);
        let word = word.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let life = life.map_or(0, |life| life as u64 - 'a' as u64);
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        (first..=last).map(move |sequence| Message {
            sequence,
            timestamp: 1e9 + 1e6 * life as f64 + sequence as f64 - if behind { 1e8 } else { 0.0 },
            payload_hash: life << 60 | u64::from(other) << 59 | sequence,
            payload_bytes: 1000,
            begins_cleared: clears,
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
            // Goes without saying beside a `degraded`; what it is worth is `losses`'s matter.
            Action::Count(Counter::Replay) | Action::Loss(_) => continue,
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

/// The cases of `reference/llm-d-indexer.md`, section 11; what differs is in the module header.
#[test]
fn conformance_c100_to_c109() {
    // C100: cut after two.
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 0 1   => 0-1
         cut          => ask(2)
         replay 2     => 2
         end          => live",
    );
    // C101: cut after all.
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 0-2   => 0-2
         cut          => ask(3)
         end          => live",
    );
    // C102: history starts at 1.
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 1     => 1
         end          => partial[replay history starts at 1]",
    );
    // C103: history 0, 2.
    check(
        &replay(),
        "start        => ask(0) replaying
         replay 0 2   => 0 ask(1)
         replay 2     => +hole set degraded[hole in replay at 1] 2
         end          =>",
    );
    // C104: replies 1.1 s apart.
    check(
        &replay(),
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
        &replay(),
        "start        => ask(0) replaying
         wait 20      => ask(0) ask(0) +replay_failed cancel partial[replay silent]",
    );
    // C106: live 0, 2 with 1, 2 in the buffer.
    check(
        &replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         replay 1 2   => 1-2 cancel live",
    );
    // C107: the replay fails.
    check(
        &replay(),
        "live 0       => 0 live
         live 2       => +gap ask(1) replaying[gap of 1 batches at 1]
         wait 7       => ask(1) ask(1) +replay_failed +gap_unfilled set \
                         degraded[gap of 1 batches at 1] 2 cancel",
    );
    // C108: live 0, 1, then 0.
    check(
        &replay(),
        "live 0 1     => 0 live 1
         live 0b      => +restart reset(2) 0b live",
    );
    // C109: live ones that the replay covered.
    check(
        &replay(),
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
