//! The sequencer's heals: the whole history, re-read beside the live stream, ends a doubt that a
//! silent replay left behind.
//!
//! Replies go to a bounded buffer; the pod's blocks are replaced only when the buffer reaches what
//! is applied, without a hole, so that an attempt that fails changes nothing.

use std::time::{Duration, Instant};

use super::{Action, Counter, Message, ReplayConfig, Sequencer, replay::Attempt};
use crate::model::PodState;

/// Longest pause between two heals.
const MAX_BACKOFF: Duration = Duration::from_secs(600);
/// Shortest: a heal reads the whole history, which the engine sends from its publishing thread.
const MIN_BACKOFF: Duration = Duration::from_secs(1);
/// A replay of the whole history into a buffer.
#[derive(Debug)]
pub(super) struct Heal<P> {
    pub(super) attempt: Attempt,
    /// What the buffer lacks next.
    pub(super) next: u64,
    buffer: Vec<Message<P>>,
    bytes: usize,
}

impl<P> Heal<P> {
    pub(super) fn size(&self) -> (usize, usize) {
        (self.buffer.len(), self.bytes)
    }
}

/// When to try a heal.
#[derive(Debug)]
pub(super) struct HealPlan {
    /// The next one; none while there is nothing to heal, or no hope.
    pub(super) at: Option<Instant>,
    first: Duration,
    backoff: Duration,
    allowed: bool,
}

impl HealPlan {
    pub(super) fn new(replay: Option<&ReplayConfig>) -> Self {
        let first = replay.map_or(MAX_BACKOFF, |replay| replay.cooldown);
        let first = first.clamp(MIN_BACKOFF, MAX_BACKOFF);
        Self { at: None, first, backoff: first, allowed: replay.is_some() }
    }

    pub(super) fn due(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// The history cannot become whole again in this epoch.
    pub(super) fn hopeless(&mut self) {
        self.at = None;
        self.allowed = false;
    }

    /// There is nothing to heal.
    pub(super) fn rest(&mut self) {
        self.at = None;
        self.backoff = self.first;
    }

    fn schedule(&mut self, now: Instant) {
        if self.allowed && self.at.is_none() {
            self.at = Some(now + self.backoff);
            self.backoff = self.backoff.saturating_mul(2).min(MAX_BACKOFF);
        }
    }
}

impl<P> Sequencer<P> {
    /// Schedules a heal if there is something to heal.
    pub(super) fn plan_heal(&mut self, now: Instant) {
        if self.trust.0 != PodState::Live {
            self.plan.schedule(now);
        }
    }

    pub(super) fn begin_heal(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        self.plan.at = None;
        if self.trust.0 == PodState::Live {
            return;
        }
        if self.applied.is_none() {
            // Nothing to protect: deliver as it comes.
            return self.begin_fill(None, now, out);
        }
        let attempt = Attempt::new(now);
        self.heal = Some(Heal { attempt, next: self.first, buffer: Vec::new(), bytes: 0 });
        self.request(now, out);
    }

    pub(super) fn heal_reply(
        &mut self,
        message: Message<P>,
        now: Instant,
        out: &mut Vec<Action<P>>,
    ) {
        let (idle_at, attempts) = (self.idle_at(now), self.attempts());
        let limit = self.config.replay.as_ref().map_or(0, |replay| replay.held_bytes);
        let Some(heal) = &mut self.heal else { return };
        let first = !heal.attempt.answered;
        heal.attempt.answered = true;
        if message.sequence < heal.next {
            return;
        }
        if message.sequence > heal.next {
            if !first && heal.attempt.tries < attempts {
                return self.request(now, out);
            }
            return self.heal_hopeless(out);
        }
        // Empty payloads cost memory as well.
        heal.bytes = heal
            .bytes
            .saturating_add(message.payload_bytes)
            .saturating_add(size_of::<Message<P>>());
        if heal.bytes > limit {
            return self.heal_hopeless(out);
        }
        heal.attempt.progress(idle_at);
        heal.next = message.sequence + 1;
        heal.buffer.push(message);
        if self.applied.is_none_or(|applied| heal.next > applied) {
            self.rebuild(out);
        }
    }

    fn rebuild(&mut self, out: &mut Vec<Action<P>>) {
        let Some(heal) = self.heal.take() else { return };
        self.close_replay(out);
        out.push(Action::Count(Counter::Healed));
        out.push(Action::Rebuild);
        self.window.clear();
        (self.restored, self.unproven) = (false, false);
        self.applied = None;
        self.newest = f64::NEG_INFINITY;
        self.trusted(out);
        for message in heal.buffer {
            self.deliver(message, out);
        }
    }

    pub(super) fn tick_heal(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        let Some(heal) = &self.heal else { return };
        if now < heal.attempt.idle_at {
            return;
        }
        self.heal_stopped(now, out);
    }

    /// The heal's replay ended or failed: more was published meanwhile, if it advanced.
    pub(super) fn heal_stopped(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if self.heal.as_ref().is_some_and(|heal| heal.attempt.advanced) {
            self.request(now, out);
        } else {
            self.heal_failed(now, out);
        }
    }

    fn heal_failed(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        self.heal = None;
        out.push(Action::Count(Counter::HealFailed));
        self.close_replay(out);
        self.plan_heal(now);
    }

    fn heal_hopeless(&mut self, out: &mut Vec<Action<P>>) {
        self.heal = None;
        out.push(Action::Count(Counter::HealFailed));
        self.close_replay(out);
        self.plan.hopeless();
    }

    /// Puts a heal off, for something more urgent that takes its socket over or closes it.
    pub(super) fn abandon_heal(&mut self, now: Instant) {
        if self.heal.take().is_some() {
            self.plan_heal(now);
        }
    }
}
