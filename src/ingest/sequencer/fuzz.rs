//! Invariants of the sequencer, checked from outside: by the fuzz target, its corpus and the tests.

use std::time::{Duration, Instant};

use super::{Action, Message, Reason, ReplayConfig, Sequencer, SequencerConfig};
use crate::model::{CountMode, PodState};

/// A receiver that keeps what it is told and asserts that it makes sense.
#[derive(Debug)]
pub(crate) struct Receiver {
    config: SequencerConfig,
    /// Messages delivered since the last reset or rebuild.
    pub(crate) delivered: Vec<Message<()>>,
    /// The last one that brought an `AllBlocksCleared`: what is before does not matter for `live`.
    cleared: Option<usize>,
    pub(crate) state: PodState,
    pub(crate) epoch: u64,
    pub(crate) stale: bool,
    /// First sequence of the open replay request.
    pub(crate) replay: Option<u64>,
    set_counting: bool,
    /// Of this epoch, since a rebuild.
    pub(crate) losses: Vec<Reason>,
}

impl Receiver {
    pub(crate) fn new(config: &SequencerConfig) -> Self {
        Self {
            config: config.clone(),
            delivered: Vec::new(),
            cleared: None,
            state: PodState::Connecting,
            epoch: 1,
            stale: false,
            replay: None,
            set_counting: false,
            losses: Vec::new(),
        }
    }

    /// Carries the actions of one input out.
    pub(crate) fn take(&mut self, sequencer: &Sequencer<()>, out: &mut Vec<Action<()>>) {
        for action in out.drain(..) {
            match action {
                Action::Deliver(message) => {
                    let last = self.delivered.last().map(|last| last.sequence);
                    assert!(last < Some(message.sequence), "{last:?} then {message:?}");
                    self.delivered.push(message);
                }
                Action::Reset { epoch } => {
                    assert_eq!(epoch, self.epoch + 1);
                    self.epoch = epoch;
                    self.set_counting = false;
                    self.forget();
                }
                Action::Rebuild => self.forget(),
                Action::CountMode(mode) => {
                    assert_eq!(mode, CountMode::Set);
                    self.set_counting = true;
                }
                Action::Loss(reason) => {
                    assert!(self.set_counting, "a loss, counting copies");
                    self.losses.push(reason);
                }
                Action::CountModeDefault => self.set_counting = false,
                Action::State(state, _) => {
                    assert_ne!(state, PodState::Connecting);
                    self.state = state;
                    self.check_state();
                }
                Action::Stale(stale) => {
                    assert_ne!(self.stale, stale);
                    self.stale = stale;
                }
                Action::RequestReplay { from } => {
                    assert!(self.config.replay.is_some());
                    self.replay = Some(from);
                }
                Action::CancelReplay => {
                    assert!(self.replay.take().is_some(), "cancelled what was not open");
                }
                Action::Count(_) => {}
            }
        }
        self.check_state();
        assert_eq!(sequencer.state().0, self.state);
        assert_eq!(sequencer.epoch(), self.epoch);
        assert_eq!(sequencer.applied(), self.delivered.last().map(|last| last.sequence));
        let (messages, bytes) = sequencer.held();
        let (_, buffered) = sequencer.buffered();
        match &self.config.replay {
            Some(replay) => {
                assert!(messages <= replay.held_messages && bytes <= replay.held_bytes);
                assert!(buffered <= replay.held_bytes);
            }
            None => assert_eq!((messages, buffered), (0, 0)),
        }
        if self.state == PodState::Live {
            assert_eq!(messages, 0, "live while messages wait");
            assert!(sequencer.seen() < Some(sequencer.expected()), "live while one is missing");
        }
    }

    /// Applies an `AllBlocksCleared` that came with the message at this index, if there is one;
    /// returns its sequence.
    pub(crate) fn clear(&mut self, at: usize) -> Option<u64> {
        let sequence = self.delivered.get(at)?.sequence;
        self.cleared = self.cleared.max(Some(at));
        // As the applier does, which cannot know what was lost meanwhile.
        if matches!(self.state, PodState::Partial | PodState::Degraded) {
            self.state = PodState::Live;
            self.set_counting = false;
        }
        Some(sequence)
    }

    /// What was delivered since the last clear, that one included, or else since the start.
    pub(crate) fn since_clear(&self) -> &[Message<()>] {
        self.delivered.get(self.cleared.unwrap_or(0)..).unwrap_or_default()
    }

    fn forget(&mut self) {
        self.delivered.clear();
        self.losses.clear();
        self.cleared = None;
    }

    fn check_state(&self) {
        assert!(self.state != PodState::Degraded || self.set_counting, "degraded, counting copies");
        assert!(self.state != PodState::Degraded || !self.losses.is_empty(), "degraded, no doubt");
        assert!(self.state != PodState::Live || !self.set_counting, "live with set semantics");
        if self.state != PodState::Live {
            return;
        }
        let since = self.since_clear();
        if self.cleared.is_none() {
            let first = since.first().map_or(0, |message| message.sequence);
            assert!(first <= self.config.first_sequence, "live from {first}");
        }
        let contiguous = since.iter().zip(since.iter().skip(1));
        for (one, next) in contiguous {
            assert_eq!(one.sequence + 1, next.sequence, "live across a gap");
        }
    }
}

/// Reads the fuzzer's bytes; zeros once they are used up.
struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    /// A message near `around`, sometimes far away, of one of four payloads.
    fn message(&mut self, around: u64, clock: f64) -> Message<()> {
        let (how, what) = (self.next(), self.next());
        let sequence = match how {
            0..=199 => around.wrapping_add(u64::from(how % 16)).wrapping_sub(8),
            200..=239 => u64::from(how - 200),
            _ => u64::MAX - u64::from(how - 240),
        };
        let timestamp = match what >> 5 {
            0 => clock - 10.0,
            1 => f64::NAN,
            2 => f64::INFINITY,
            _ => clock,
        };
        Message {
            sequence,
            timestamp,
            payload_hash: sequence ^ u64::from(what & 3 == 3),
            payload_bytes: usize::from(what & 0x1f),
            begins_cleared: what & 0xc == 0xc,
            payload: (),
        }
    }
}

/// Interprets `data` as inputs in any order and asserts the invariants after each one.
///
/// # Panics
///
/// When one does not hold.
pub fn is_total(data: &[u8]) {
    let mut bytes = Bytes(data.iter());
    let flags = bytes.next();
    let config = SequencerConfig {
        first_sequence: u64::from(flags & 1),
        replay: (flags & 2 == 0).then(|| ReplayConfig {
            idle: Duration::from_millis(u64::from(flags & 4) * 500),
            attempts: u32::from(flags >> 3 & 3),
            cooldown: Duration::from_secs(u64::from(flags >> 5 & 1) * 30),
            held_messages: 4 + usize::from(flags >> 6) * 8,
            held_bytes: 1024,
        }),
    };
    let mut now = Instant::now();
    let mut clock = 1e9;
    let mut out = Vec::new();
    let mut sequencer = Sequencer::new(config.clone());
    let mut receiver = Receiver::new(&config);
    let mut replayed = 0;
    while bytes.0.len() > 0 {
        clock += 0.001;
        let op = bytes.next();
        match op % 16 {
            0..=3 => {
                let message = bytes.message(sequencer.expected(), clock);
                sequencer.message(message, now, &mut out);
            }
            // The publisher goes on as it should.
            4..=6 => {
                let sequence = sequencer.seen().max(sequencer.applied()).map_or(0, |s| s + 1);
                let message = plain(sequence.min(u64::MAX - 1), clock);
                sequencer.message(message, now, &mut out);
            }
            // And so does the replay.
            7..=9 => {
                sequencer.replayed(plain(replayed, clock), now, &mut out);
                replayed = replayed.saturating_add(1);
            }
            10 => {
                let message = bytes.message(replayed, clock);
                sequencer.replayed(message, now, &mut out);
            }
            11 => sequencer.replay_end(now, &mut out),
            12 => match op >> 4 & 3 {
                0 => sequencer.replay_failed(now, &mut out),
                1 => sequencer.start(now, &mut out),
                2 => sequencer.disconnected(now, &mut out),
                _ => sequencer.connected(now, &mut out),
            },
            13 => {
                let at = usize::from(bytes.next());
                let at = receiver.delivered.len().checked_sub(at + 1);
                if let Some(sequence) = at.and_then(|at| receiver.clear(at)) {
                    sequencer.cleared(receiver.epoch, sequence, now, &mut out);
                }
            }
            14 => {
                now += Duration::from_millis(u64::from(bytes.next()) * 16);
                sequencer.tick(now, &mut out);
            }
            _ => {
                if let Some(deadline) = sequencer.deadline() {
                    now = now.max(deadline);
                    sequencer.tick(now, &mut out);
                }
            }
        }
        // Replies follow the newest request; one that ended has none until the next.
        let asked = out.iter().rev().find_map(|action| match action {
            Action::RequestReplay { from } => Some(*from),
            _ => None,
        });
        if matches!(op % 16, 11) || op % 16 == 12 && op >> 4 & 3 == 0 {
            receiver.replay = None;
        }
        replayed = asked.unwrap_or(replayed);
        receiver.take(&sequencer, &mut out);
    }
    // Left alone, it comes to rest: no more than a request at a time, and never a busy loop.
    for _ in 0..64 {
        let Some(deadline) = sequencer.deadline() else { break };
        now = now.max(deadline);
        sequencer.tick(now, &mut out);
        receiver.take(&sequencer, &mut out);
    }
    let settled = [PodState::Replaying, PodState::Connecting];
    assert!(sequencer.deadline().is_none() || !settled.contains(&receiver.state));
}

fn plain(sequence: u64, timestamp: f64) -> Message<()> {
    let (payload_hash, payload_bytes) = (sequence, 8);
    let payload = ();
    Message { sequence, timestamp, payload_hash, payload_bytes, begins_cleared: false, payload }
}

#[cfg(test)]
mod tests {
    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config {
            cases: 2000, failure_persistence: None, ..Default::default()
        })]
        #[test]
        fn any_bytes_hold(data in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            super::is_total(&data);
        }
    }
}
