//! A random engine, a random network and the sequencer between them.
//!
//! The engine publishes, leaves numbers out, restarts, and replays what its bounded buffer still
//! has. The network loses, repeats and swaps live messages, drops replies and cuts or silences the
//! replay. What holds at every step is asserted by [`Receiver`]; what only the engine knows, here.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{Action, Message, ReplayConfig, Sequencer, SequencerConfig, fuzz::Receiver};
use crate::model::PodState;

/// In the payload hash: the batch holds an `AllBlocksCleared`.
const CLEAR: u64 = 1 << 40;

#[derive(Clone, Debug)]
enum Step {
    Publish {
        count: u8,
        lost: bool,
    },
    Clear,
    LeaveOut,
    Swap,
    Repeat(u8),
    Replies(u8),
    DropReply,
    Cut,
    Mute(bool),
    Wait(u16),
    Disconnect,
    Connect,
    /// The engine's clock is set back by so many seconds.
    ClockBack(u8),
    Restart {
        noticed: bool,
        behind: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..4u8).prop_map(|count| Step::Publish { count, lost: false }),
        2 => (1..4u8).prop_map(|count| Step::Publish { count, lost: true }),
        1 => Just(Step::Clear),
        1 => Just(Step::LeaveOut),
        1 => Just(Step::Swap),
        1 => (0..8u8).prop_map(Step::Repeat),
        6 => (1..12u8).prop_map(Step::Replies),
        1 => Just(Step::DropReply),
        1 => Just(Step::Cut),
        1 => any::<bool>().prop_map(Step::Mute),
        2 => (0..9000u16).prop_map(Step::Wait),
        1 => Just(Step::Disconnect),
        2 => Just(Step::Connect),
        1 => any::<u8>().prop_map(Step::ClockBack),
        1 => any::<(bool, bool)>()
            .prop_map(|(noticed, behind)| Step::Restart { noticed, behind }),
    ]
}

struct World {
    sequencer: Sequencer<()>,
    receiver: Receiver,
    replay: bool,
    now: Instant,
    clock: f64,
    connected: bool,
    mute: bool,
    /// Replies on their way, the end marker behind them; the flag: one of them has arrived.
    replies: Option<(VecDeque<Message<()>>, bool)>,
    // The engine.
    first: u64,
    life: u64,
    next: u64,
    buffer: VecDeque<Message<()>>,
    capacity: usize,
    recent: VecDeque<Message<()>>,
    restarts: u64,
    /// Deliveries looked at for clears.
    examined: usize,
}

impl World {
    fn new(first: u64, replay: bool, capacity: usize, held_messages: usize) -> Self {
        let replay_config =
            ReplayConfig { held_messages, held_bytes: 1 << 20, ..ReplayConfig::default() };
        let config =
            SequencerConfig { first_sequence: first, replay: replay.then_some(replay_config) };
        Self {
            receiver: Receiver::new(&config),
            sequencer: Sequencer::new(config),
            replay,
            now: Instant::now(),
            clock: 1e9,
            connected: true,
            mute: false,
            replies: None,
            first,
            life: 0,
            next: first,
            buffer: VecDeque::new(),
            capacity,
            recent: VecDeque::new(),
            restarts: 0,
            examined: 0,
        }
    }

    /// One input, its actions, and what the receiver answers to those.
    fn input(&mut self, input: impl FnOnce(&mut Sequencer<()>, Instant, &mut Vec<Action<()>>)) {
        let mut out = Vec::new();
        input(&mut self.sequencer, self.now, &mut out);
        self.carry_out(&mut out);
        while let Some(message) = self.receiver.delivered.get(self.examined) {
            if message.payload_hash & CLEAR != 0 {
                let sequence = self.receiver.clear(self.examined).unwrap();
                let epoch = self.receiver.epoch;
                self.sequencer.cleared(epoch, sequence, self.now, &mut out);
            }
            self.examined += 1;
        }
        self.carry_out(&mut out);
    }

    fn carry_out(&mut self, out: &mut Vec<Action<()>>) {
        for action in &*out {
            match action {
                Action::RequestReplay { from } => {
                    let buffered = self.buffer.iter().filter(|m| m.sequence >= *from).cloned();
                    self.replies = (!self.mute).then(|| (buffered.collect(), false));
                }
                Action::CancelReplay => self.replies = None,
                Action::Reset { .. } | Action::Rebuild => self.examined = 0,
                _ => {}
            }
        }
        self.receiver.take(&self.sequencer, out);
        let lives = self.receiver.since_clear().iter().map(|m| m.payload_hash >> 48);
        let one_life = lives.clone().min() == lives.max();
        assert!(one_life || self.receiver.state == PodState::Degraded, "two lives in one epoch");
        assert!(self.receiver.epoch - 1 <= self.restarts, "reset without restart");
    }

    fn publish(&mut self, flags: u64) -> Message<()> {
        self.clock += 0.01;
        let message = Message {
            sequence: self.next,
            timestamp: self.clock,
            payload_hash: self.life << 48 | flags | self.next,
            payload_bytes: 10,
            begins_cleared: false,
            payload: (),
        };
        self.next += 1;
        self.buffer.push_back(message.clone());
        if self.buffer.len() > self.capacity {
            self.buffer.pop_front();
        }
        self.recent.push_back(message.clone());
        message
    }

    fn live(&mut self, message: Message<()>) {
        if self.connected {
            self.input(|s, now, out| s.message(message, now, out));
        }
    }

    /// Delivers up to `count` replies; the end marker is one.
    fn serve(&mut self, count: usize) {
        for _ in 0..count {
            let Some((replies, arrived)) = &mut self.replies else { return };
            *arrived = true;
            if let Some(message) = replies.pop_front() {
                self.input(|s, now, out| s.replayed(message, now, out));
            } else {
                self.replies = None;
                self.receiver.replay = None;
                self.input(Sequencer::replay_end);
            }
        }
    }

    fn cut(&mut self) {
        self.replies = None;
        if self.receiver.replay.take().is_some() {
            self.input(Sequencer::replay_failed);
        }
    }

    /// Time passes; the replay answers whatever is asked meanwhile with up to `serve` replies.
    fn wait(&mut self, time: Duration, serve: usize) {
        let end = self.now + time;
        for _ in 0..10_000 {
            let Some(deadline) = self.sequencer.deadline().filter(|&at| at <= end) else {
                self.now = end;
                return self.input(Sequencer::tick);
            };
            self.now = self.now.max(deadline);
            self.input(Sequencer::tick);
            self.serve(serve);
        }
        panic!("a busy loop of ticks");
    }

    fn connect(&mut self) {
        self.connected = true;
        self.input(Sequencer::connected);
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.input(Sequencer::disconnected);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Publish { count, lost } => {
                for _ in 0..count {
                    let message = self.publish(0);
                    if !lost {
                        self.live(message);
                    }
                }
            }
            Step::Clear => {
                let message = self.publish(CLEAR);
                self.live(message);
            }
            Step::LeaveOut => self.next += 1,
            Step::Swap => {
                let (one, two) = (self.publish(0), self.publish(0));
                self.live(two);
                self.live(one);
            }
            Step::Repeat(back) => {
                let at = self.recent.len().checked_sub(usize::from(back) + 1);
                // What the subscriber never got does not come late, either.
                let heard = |m: &Message<()>| {
                    self.receiver.delivered.iter().any(|known| known.sequence == m.sequence)
                };
                let message = at.and_then(|at| self.recent.get(at)).cloned();
                if let Some(message) = message.filter(heard) {
                    self.live(message);
                }
            }
            Step::Replies(count) => self.serve(count.into()),
            // A ROUTER drops what its queue has no room for: never the first.
            Step::DropReply => {
                if let Some((replies, true)) = &mut self.replies {
                    replies.pop_front();
                }
            }
            Step::Cut => self.cut(),
            Step::Mute(mute) => {
                self.mute = mute;
                if mute {
                    self.replies = None;
                }
            }
            Step::Wait(ms) => self.wait(Duration::from_millis(ms.into()), 0),
            Step::Disconnect => self.disconnect(),
            Step::Connect => self.connect(),
            Step::ClockBack(seconds) => self.clock -= f64::from(seconds),
            Step::Restart { noticed, behind } => self.restart(noticed, behind),
        }
    }

    fn restart(&mut self, noticed: bool, behind: bool) {
        self.disconnect();
        self.cut();
        self.restarts += 1;
        self.life += 1;
        // On another machine, its clock may be behind.
        self.clock += if behind { -1000.0 } else { 1.0 };
        self.next = self.first;
        self.buffer.clear();
        self.recent.clear();
        if noticed || self.mute || !self.replay {
            self.connect();
            let message = self.publish(0);
            self.live(message);
        } else {
            // Published before we were back, so that its numbers may have overtaken ours: only the
            // replay can tell, and does.
            for _ in 0..self.life % 7 {
                self.publish(0);
            }
            self.connect();
            self.serve(10_000);
        }
    }

    /// Everything works from now on; all that can be repaired must be.
    fn settle(&mut self) {
        self.mute = false;
        self.disconnect();
        self.connect();
        self.serve(10_000);
        for _ in 0..40 {
            let message = self.publish(0);
            self.live(message);
            self.serve(10_000);
            self.wait(Duration::from_secs(60), 10_000);
        }
        let (state, reason) = self.sequencer.state();
        let applied = self.sequencer.applied();
        assert_eq!(applied, Some(self.next - 1), "{state:?} {reason}");
        let sequences = self.buffer.iter().map(|m| m.sequence);
        let whole = sequences.eq(self.first..self.next);
        match state {
            PodState::Live => {}
            PodState::Partial | PodState::Degraded => {
                assert!(!reason.to_string().is_empty());
                assert!(!(self.replay && whole), "{state:?} ({reason}) with a whole history");
            }
            PodState::Connecting | PodState::Replaying => panic!("not settled: {state:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]
    #[test]
    fn random_engines_are_followed(
        steps in prop::collection::vec(step(), 0..80),
        first in 0..2u64,
        replay in prop::bool::weighted(0.8),
        capacity in prop_oneof![Just(1000usize), 1..30usize],
        held_messages in prop_oneof![Just(1000usize), 1..8usize],
        history in 0..20u8,
    ) {
        let mut world = World::new(first, replay, capacity, held_messages);
        for _ in 0..history {
            world.publish(0);
        }
        world.input(Sequencer::start);
        for step in &steps {
            world.step(step);
        }
        world.settle();
    }
}
