//! Gap, duplicate, restart and replay logic of one publisher: a state machine without sockets.
//!
//! Messages and the clock go in, [`Action`]s come out, to be carried out in order. The machine
//! knows no socket, no runtime and no payload.
//!
//! # Model
//!
//! An *epoch* is one life of the publisher; its sequences count up by one from `first_sequence`.
//! [`Sequencer::expected`] is the next one to deliver. At any time at most one replay is open, for
//! one of two ends:
//!
//! * a **fill** supplies what comes next: the history at start, a gap, or, after a reconnect, what
//!   was missed, beginning with the last applied message to see whether it is still the same life.
//!   Its replies are delivered as they come; live messages behind it are held, bounded.
//! * a **heal** re-reads the whole history beside the live stream, into a bounded buffer, and
//!   replaces the pod's blocks only when it is complete and without a hole.
//!
//! # Invariants
//!
//! * Within an epoch (or since a rebuild) delivered sequences strictly increase.
//! * `live` is shown only when every sequence from the first one, or from the last
//!   `AllBlocksCleared`, up to the newest one known was delivered. While a fill runs, `replaying`
//!   is shown instead of `live`; `partial` and `degraded` stay.
//! * A live message is refused only as duplicate or late, or when the held ones are at their
//!   limit; then it is known to be missing, and asked for.
//! * Only a new life takes blocks away. A repair that failed changes the state, not the blocks.
//!
//! # Deliberate differences to llm-d's subscriber
//!
//! Numbers are those of the conformance cases that we keep.
//!
//! * C102, history that starts late: llm-d clears the pod and tries the same replay again, for
//!   ever. Here what is left is delivered and the pod is `partial`.
//! * C103, a hole in the replay: llm-d clears the pod. Engines leave holes legally (a batch that
//!   they could not encode uses up a number), so after asking once more it is accepted: `degraded`.
//! * C107, a replay that failed: llm-d drops the live message that showed the gap, and all further
//!   ones for 30 s. Here they are delivered, `degraded`, with set semantics.
//! * C108, a restart that begins with the first sequence: llm-d asks for a replay from the start.
//!   Nothing can be missing, so we do not.
//! * A sequence below the expected one is not taken for a restart at once: duplicates and late
//!   messages are told apart by payload hash and timestamp.
//! * llm-d asks for no proof after a reconnect, and repairs a pod only by clearing it. Here the
//!   replay is asked for the last applied message, and a doubtful pod is healed beside the stream.
//!
//! # What tells lives apart
//!
//! Payload hashes first, then numbers and clocks together; never the clock alone, since a machine's
//! clock is set back at times, and that must not clear a pod. A new life is:
//!
//! * a known sequence with another payload, live or in a replay. The last 1 024 messages are known,
//!   and the first one of the life for good: so an engine that begins anew is noticed by its first
//!   message, whatever its clock says;
//! * an unknown sequence below the expected one with a timestamp newer than all applied;
//! * the first sequence, unknown because we joined later, if it begins with an `AllBlocksCleared`
//!   (SGLang) or is the first word after a reconnect;
//! * `LATE_RUN` unknown sequences below the expected one, counting on one after the other on a
//!   clock that does not run backwards: a life that began unheard on a machine whose clock is
//!   behind. What is late for other reasons does not count on;
//! * after a reconnect, a replay that is empty or answers the last applied sequence otherwise.
//!
//! A timestamp that runs backwards on the expected sequence is a clock that was set back. Only after
//! a reconnect that no replay proved harmless it may be another life that has overtaken us: the
//! blocks are in doubt, and stay.
//!
//! # Limits
//!
//! An engine that restarts while nobody listens, whose clock is right and whose numbers reach
//! exactly ours when we are back looks like the same life. Replay tells; a publisher without replay
//! cannot; whoever is one number further shows as a gap. When the last applied message has left the
//! replay buffer nothing tells either, so the pod is `degraded`.

use std::time::Instant;

use crate::model::{CountMode, PodState};

mod action;
mod config;
pub mod fuzz;
mod heal;
mod held;
mod replay;
mod resume;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use self::{
    action::{Action, Counter, Message, Reason},
    config::{ReplayConfig, SequencerConfig},
};
use self::{
    heal::{Heal, HealPlan},
    held::{Held, Window},
    replay::Fill,
};

/// The state machine of one publisher.
///
/// Every input appends to `out` what is to be done. Call [`tick`](Self::tick) no later than
/// [`deadline`](Self::deadline).
#[derive(Debug)]
pub struct Sequencer<P> {
    config: SequencerConfig,
    epoch: u64,
    /// The first sequence of this epoch: as configured, or lower if the engine says so.
    first: u64,
    /// Last sequence delivered in this epoch.
    applied: Option<u64>,
    /// Newest live sequence of this epoch, delivered, held or lost.
    seen: Option<u64>,
    /// Newest timestamp delivered in this epoch.
    newest: f64,
    window: Window,
    /// Payload hash of the first message of this epoch, once delivered.
    first_hash: Option<u64>,
    /// Unknown sequences below the expected one, counting on: the next one, the last one's timestamp,
    /// how many.
    late: Option<(u64, f64, u32)>,
    /// Reconnected, and nothing has shown that it is the same life.
    unproven: bool,
    held: Held<P>,
    /// What the blocks can be trusted for, leaving a fill under way aside: live, partial, degraded.
    trust: (PodState, Reason),
    /// The first sequence behind the last loss.
    loss_ends: u64,
    /// Something was received, or a replay answered, so `trust` means something.
    joined: bool,
    /// The last state emitted; none after a reset.
    shown: Option<(PodState, Reason)>,
    set_counting: bool,
    stale: bool,
    /// A request is out and neither ended nor failed.
    replay_open: bool,
    fill: Option<Fill>,
    heal: Option<Heal<P>>,
    plan: HealPlan,
    cooldown_until: Option<Instant>,
    /// Restored from a snapshot, and no replay has shown yet that the engine is still in that life.
    restored: bool,
}

/// Late messages that count on before they are taken for a new life.
const LATE_RUN: u32 = 3;

/// What a live message is, given what came before.
enum Class {
    Duplicate,
    Late,
    NewLife,
    Fresh,
}

/// Why messages are skipped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// There is no replay to ask.
    NoReplay,
    /// It does not answer.
    Silent,
    /// It answers without them, confirmed by a fresh request.
    Hole,
    /// It ended before them.
    Ended,
}

impl<P> Sequencer<P> {
    /// A publisher of which nothing is known yet.
    #[must_use]
    pub fn new(config: SequencerConfig) -> Self {
        let plan = HealPlan::new(config.replay.as_ref());
        Self {
            first: config.first_sequence,
            config,
            epoch: 1,
            applied: None,
            seen: None,
            newest: f64::NEG_INFINITY,
            window: Window::new(),
            first_hash: None,
            late: None,
            unproven: false,
            held: Held::new(),
            trust: (PodState::Live, Reason::None),
            loss_ends: 0,
            joined: false,
            shown: Some((PodState::Connecting, Reason::None)),
            set_counting: false,
            stale: false,
            replay_open: false,
            fill: None,
            heal: None,
            plan,
            cooldown_until: None,
            restored: false,
        }
    }

    /// The subscription is set up: begins the replay of the history, if there is one to ask.
    pub fn start(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if self.restored {
            self.prove(now, out);
        } else if !self.joined && self.fill.is_none() && self.config.replay.is_some() {
            self.begin_fill(None, now, out);
        }
        self.publish(out);
    }

    /// A message of the live stream.
    pub fn message(&mut self, message: Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        if message.sequence == u64::MAX {
            out.push(Action::Count(Counter::EndMarker));
            return;
        }
        match self.classify(&message) {
            Class::Duplicate => out.push(Action::Count(Counter::Duplicate)),
            Class::Late => out.push(Action::Count(Counter::Late)),
            Class::NewLife => {
                self.new_life(None, out);
                self.fresh(message, now, out);
                // Unless the new life asked anew, the old life's replay is of no use.
                if self.fill.is_none() {
                    self.close_replay(out);
                }
            }
            Class::Fresh => self.fresh(message, now, out),
        }
        self.publish(out);
    }

    /// A message of the live stream that the caller had no room for: known to be missing, and asked
    /// for where there is a replay.
    pub fn lost(&mut self, sequence: u64, now: Instant, out: &mut Vec<Action<P>>) {
        // An old number tells nothing without its payload; the messages after it will.
        if sequence < self.expected() || sequence == u64::MAX {
            return;
        }
        let cooling = self.cooldown_until.is_some_and(|until| now < until);
        let asks = self.fill.is_some() || (self.config.replay.is_some() && !cooling);
        if self.applied.is_none() && !asks {
            // The first message that can be taken in will show that there were others.
            return;
        }
        self.joined = true;
        self.seen = self.seen.max(Some(sequence));
        if let Some(fill) = &mut self.fill {
            fill.bounded = true;
        } else if asks {
            out.push(Action::Count(Counter::Gap));
            self.abandon_heal(now);
            self.begin_fill(None, now, out);
            let at = self.expected();
            if let Some(fill) = &mut self.fill {
                fill.bounded = true;
                if self.applied.is_some() {
                    fill.reason = Reason::Gap { missing: sequence - at + 1, at };
                }
            }
        } else if self.trust.0 == PodState::Degraded {
            // Said already; a flood must not say it again and again.
            self.loss_ends = self.expected();
        } else {
            self.lost_tail(if cooling { Loss::Silent } else { Loss::NoReplay }, out);
            self.plan_heal(now);
        }
        self.publish(out);
    }

    /// The connection of the live stream is gone.
    pub fn disconnected(&mut self, _now: Instant, out: &mut Vec<Action<P>>) {
        if !self.stale {
            self.stale = true;
            out.push(Action::Stale(true));
        }
    }

    /// The connection of the live stream is up. After a disconnect, the replay is asked whether the
    /// engine is still in the same life and what was missed.
    pub fn connected(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if !self.stale {
            return;
        }
        self.stale = false;
        self.unproven = true;
        out.push(Action::Stale(false));
        if self.config.replay.is_some() {
            // A replay that was silent may have been the engine's end; it is worth asking anew.
            self.cooldown_until = None;
            self.abandon_heal(now);
            if self.applied.is_none() {
                // Nothing tells whether what waits is of this life. If it is, replay has it; if
                // replay is silent, the pod is partial with it or without.
                self.held.clear();
                self.seen = None;
            }
            self.begin_fill(self.applied, now, out);
            if let Some(fill) = &mut self.fill {
                // What is held was received before: it does not tell what was missed since.
                fill.bounded = false;
            }
        }
        self.publish(out);
    }

    /// The receiver applied an `AllBlocksCleared` that came with `sequence` of `epoch`: whatever
    /// was lost before it does not matter any more.
    ///
    /// The receiver counts in the configured mode and takes a partial or degraded row for live from
    /// that very event on; the actions that answer confirm or correct it.
    pub fn cleared(&mut self, epoch: u64, sequence: u64, _now: Instant, out: &mut Vec<Action<P>>) {
        let applied = self.applied.is_some_and(|applied| sequence <= applied);
        if epoch != self.epoch || !applied {
            return;
        }
        if sequence < self.loss_ends {
            // It took the clear for the end of a loss that came after it: say again what holds.
            if self.set_counting {
                out.push(Action::CountMode(CountMode::Set));
            }
            self.shown = None;
            self.publish(out);
            return;
        }
        if self.trust.0 != PodState::Live {
            if self.heal.take().is_some() {
                self.close_replay(out);
            }
            self.trusted(out);
        }
        self.publish(out);
    }

    /// Time passed. Does nothing before [`deadline`](Self::deadline).
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if self.fill.is_some() {
            self.tick_fill(now, out);
        } else if self.heal.is_some() {
            self.tick_heal(now, out);
        } else if self.plan.due(now) {
            self.begin_heal(now, out);
        }
        self.publish(out);
    }

    /// When [`tick`](Self::tick) has something to do; none while everything waits for messages.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match (&self.fill, &self.heal) {
            (Some(fill), _) => Some(fill.attempt.idle_at),
            (None, Some(heal)) => Some(heal.attempt.idle_at),
            (None, None) => self.plan.at,
        }
    }

    /// Number of the current life; the first is 1.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// State and reason as of the last action, without the stale overlay.
    #[must_use]
    pub fn state(&self) -> (PodState, Reason) {
        self.current()
    }

    /// Last sequence delivered in this epoch.
    #[must_use]
    pub fn applied(&self) -> Option<u64> {
        self.applied
    }

    /// The sequence that is delivered next if nothing goes wrong.
    #[must_use]
    pub fn expected(&self) -> u64 {
        self.applied.map_or(self.first, |applied| applied + 1)
    }

    /// Newest live sequence received in this epoch.
    #[must_use]
    pub fn seen(&self) -> Option<u64> {
        self.seen
    }

    /// Live messages held, and their payload bytes.
    #[must_use]
    pub fn held(&self) -> (usize, usize) {
        (self.held.len(), self.held.bytes())
    }

    /// Replayed messages buffered for a rebuild, and what they cost in bytes.
    #[must_use]
    pub fn buffered(&self) -> (usize, usize) {
        self.heal.as_ref().map_or((0, 0), Heal::size)
    }

    /// Payload hash of a message delivered lately or held.
    fn known_hash(&self, sequence: u64) -> Option<u64> {
        if self.applied >= Some(sequence) {
            let first = self.first_hash.filter(|_| sequence == self.first);
            self.window.hash(sequence).or(first)
        } else {
            self.held.hash(sequence)
        }
    }

    fn classify(&mut self, message: &Message<P>) -> Class {
        let sequence = message.sequence;
        if let Some(hash) = self.known_hash(sequence) {
            return match hash == message.payload_hash {
                true => Class::Duplicate,
                // What cannot be read proves no new life.
                false if !message.timestamp.is_finite() => Class::Late,
                false => Class::NewLife,
            };
        }
        if self.applied.is_some_and(|applied| sequence <= applied) {
            let newer = message.timestamp > self.newest;
            let begins = sequence <= self.first
                && message.timestamp.is_finite()
                && (self.unproven || message.begins_cleared);
            let new = newer || begins || self.counts_on(message);
            return if new { Class::NewLife } else { Class::Late };
        }
        // The same rule while messages wait: a publisher's clock and numbers rise together.
        match self.held.last() {
            Some((last, newest)) if sequence < last && message.timestamp > newest => Class::NewLife,
            _ => Class::Fresh,
        }
    }

    /// Notes a late message; does it end a run of them that count on?
    fn counts_on(&mut self, message: &Message<P>) -> bool {
        let &Message { sequence, timestamp, .. } = message;
        if !timestamp.is_finite() {
            return false;
        }
        let run = match self.late {
            Some((next, before, run)) if next == sequence && before <= timestamp => run + 1,
            _ => 1,
        };
        self.late = Some((sequence + 1, timestamp, run));
        run >= LATE_RUN
    }

    /// A message goes on where the stream was before a reconnect, if nothing has proved yet that
    /// it is the same stream: then its clock must go on, too.
    fn check_clock(&mut self, message: &Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        if self.fill.as_ref().is_some_and(Fill::verifies) {
            return;
        }
        let unproven = std::mem::take(&mut self.unproven) && self.applied.is_some();
        if unproven && message.timestamp.is_finite() && message.timestamp < self.newest {
            let at = message.sequence;
            self.degrade(Reason::ClockBack { at }, at, out);
            self.plan_heal(now);
        }
    }

    /// Takes a message that belongs to this epoch and was not seen before.
    fn fresh(&mut self, message: Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        self.joined = true;
        self.late = None;
        self.check_clock(&message, now, out);
        self.seen = self.seen.max(Some(message.sequence));
        // Below the expected one only as the first message of all: an engine that begins earlier
        // than configured. Nothing is missing then either.
        let next = message.sequence <= self.expected();
        if self.fill.is_some() {
            self.fresh_in_fill(message, next, now, out);
        } else if next {
            self.deliver(message, out);
        } else {
            self.gap(message, now, out);
        }
    }

    fn gap(&mut self, message: Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        if self.applied.is_some() {
            out.push(Action::Count(Counter::Gap));
        }
        let cooling = self.cooldown_until.is_some_and(|until| now < until);
        if self.config.replay.is_some() && !cooling {
            self.abandon_heal(now);
            self.hold(message, out);
            self.begin_fill(None, now, out);
        } else {
            let loss = if cooling { Loss::Silent } else { Loss::NoReplay };
            self.deliver_past(message, loss, out);
            self.plan_heal(now);
        }
    }

    fn hold(&mut self, message: Message<P>, out: &mut Vec<Action<P>>) {
        let Some(replay) = &self.config.replay else { return };
        if !self.held.insert(message, replay.held_messages, replay.held_bytes) {
            out.push(Action::Count(Counter::HeldOverflow));
        }
    }

    /// Delivers the next message in sequence.
    fn deliver(&mut self, message: Message<P>, out: &mut Vec<Action<P>>) {
        self.joined = true;
        if self.applied.is_none() && message.sequence <= self.first {
            self.first = message.sequence;
            self.first_hash = Some(message.payload_hash);
            self.trusted(out);
        }
        self.window.push(message.sequence, message.payload_hash);
        if message.timestamp.is_finite() && message.timestamp > self.newest {
            self.newest = message.timestamp;
        }
        self.applied = Some(message.sequence);
        out.push(Action::Deliver(message));
    }

    /// Delivers a message behind others that are given up.
    fn deliver_past(&mut self, message: Message<P>, loss: Loss, out: &mut Vec<Action<P>>) {
        let at = self.expected();
        let sequence = message.sequence;
        if sequence > at {
            if self.applied.is_some() {
                let missing = sequence - at;
                match loss {
                    Loss::Hole => {
                        out.push(Action::Count(Counter::Hole));
                        self.degrade(Reason::Hole { at }, sequence, out);
                    }
                    Loss::NoReplay | Loss::Silent | Loss::Ended => {
                        out.push(Action::Count(Counter::GapUnfilled));
                        self.degrade(Reason::Gap { missing, at }, sequence, out);
                    }
                }
            } else {
                let reason = match loss {
                    Loss::NoReplay => Reason::JoinedMidStream,
                    Loss::Silent => Reason::ReplaySilent,
                    Loss::Hole | Loss::Ended => Reason::HistoryStarts { at: sequence },
                };
                self.trust = (PodState::Partial, reason);
                self.loss_ends = sequence;
            }
            // The engine itself lacks it: reading the history again will not help.
            if loss == Loss::Hole || (loss == Loss::Ended && self.applied.is_none()) {
                self.plan.hopeless();
            }
        }
        self.deliver(message, out);
    }

    /// Removals may have been lost before `ends`.
    fn degrade(&mut self, reason: Reason, ends: u64, out: &mut Vec<Action<P>>) {
        if !self.set_counting {
            self.set_counting = true;
            out.push(Action::CountMode(CountMode::Set));
        }
        out.push(Action::Loss(reason));
        self.trust = (PodState::Degraded, reason);
        self.loss_ends = ends;
        self.publish(out);
    }

    /// Nothing is missing.
    fn trusted(&mut self, out: &mut Vec<Action<P>>) {
        if self.set_counting {
            self.set_counting = false;
            out.push(Action::CountModeDefault);
        }
        self.trust = (PodState::Live, Reason::None);
        self.loss_ends = 0;
        self.plan.rest();
    }

    /// Begins a new epoch with nothing applied. Held messages not `newer_than` are the old
    /// life's and go with it; none is newer than a live message that shows the new life. A replay
    /// under way is void; the caller asks anew or closes it.
    fn new_life(&mut self, newer_than: Option<f64>, out: &mut Vec<Action<P>>) {
        self.epoch += 1;
        out.push(Action::Count(Counter::Restart));
        out.push(Action::Reset { epoch: self.epoch });
        self.applied = None;
        self.newest = f64::NEG_INFINITY;
        self.window.clear();
        (self.first_hash, self.late, self.unproven) = (None, None, false);
        match newer_than {
            Some(timestamp) => self.held.retain_newer(timestamp),
            None => self.held.clear(),
        }
        self.seen = self.held.last().map(|(sequence, _)| sequence);
        // The receiver counts as configured after a reset.
        self.set_counting = false;
        self.trusted(out);
        self.shown = None;
        self.cooldown_until = None;
        self.first = self.config.first_sequence;
        self.plan = HealPlan::new(self.config.replay.as_ref());
        self.fill = None;
        self.heal = None;
        self.restored = false;
    }

    /// What is shown: a fill hides `live`, and what a fill that began from `live` will end in,
    /// unless that is `degraded`.
    fn current(&self) -> (PodState, Reason) {
        if let Some(fill) = &self.fill {
            let hides = fill.from_live || self.trust.0 == PodState::Live;
            if hides && self.trust.0 != PodState::Degraded {
                return (PodState::Replaying, fill.reason);
            }
        } else if !self.joined {
            return (PodState::Connecting, Reason::None);
        } else if self.restored && self.trust.0 != PodState::Degraded {
            return (PodState::Replaying, Reason::Restored);
        }
        self.trust
    }

    fn publish(&mut self, out: &mut Vec<Action<P>>) {
        let current = self.current();
        if self.shown != Some(current) {
            self.shown = Some(current);
            out.push(Action::State(current.0, current.1));
        }
    }
}
