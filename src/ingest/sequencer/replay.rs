//! The sequencer's replays: what they have in common, and fills, which supply what comes next.
//!
//! Requests are sent again from the first missing sequence whenever one ends, fails or falls silent
//! short of its goal. Progress resets the attempt counter, so a slow replay is waited for and a
//! dead one is given up after `attempts` requests.

use std::time::{Duration, Instant};

use super::{Action, Counter, Loss, Message, Reason, Sequencer};
use crate::model::PodState;

/// Bound of every wait, so that no configured duration overflows the clock.
const MAX_WAIT: Duration = Duration::from_secs(365 * 86_400);

/// Requests for one end.
#[derive(Debug)]
pub(super) struct Attempt {
    /// Requests since the last progress.
    pub(super) tries: u32,
    /// The current request was answered with at least one message.
    pub(super) answered: bool,
    /// The current request brought something new.
    pub(super) advanced: bool,
    /// Without progress until then, the request has failed.
    pub(super) idle_at: Instant,
}

impl Attempt {
    pub(super) fn new(now: Instant) -> Self {
        Self { tries: 0, answered: false, advanced: false, idle_at: now }
    }

    fn requested(&mut self, idle_at: Instant) {
        self.tries = self.tries.saturating_add(1);
        self.answered = false;
        self.advanced = false;
        self.idle_at = idle_at;
    }

    pub(super) fn progress(&mut self, idle_at: Instant) {
        self.tries = 0;
        self.advanced = true;
        self.idle_at = idle_at;
    }
}

/// A replay that supplies what comes next.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) attempt: Attempt,
    /// After a reconnect: the last applied sequence, whose reply shows whether it is the same life.
    verify: Option<u64>,
    /// Newest timestamp received before that reconnect.
    reconnected_after: f64,
    /// A live message tells where the fill ends; otherwise only the end marker does.
    pub(super) bounded: bool,
    /// The pod was live, or new, when it began.
    pub(super) from_live: bool,
    pub(super) reason: Reason,
}

impl Fill {
    /// Does it wait to see whether it is the same life?
    pub(super) fn verifies(&self) -> bool {
        self.verify.is_some()
    }
}

impl<P> Sequencer<P> {
    /// A message of the open replay. Ignored when none is open.
    pub fn replayed(&mut self, message: Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        if message.sequence == u64::MAX {
            out.push(Action::Count(Counter::EndMarker));
            return;
        }
        if !self.replay_open {
            return;
        }
        let known = self.known_hash(message.sequence);
        if known.is_some_and(|hash| hash != message.payload_hash) {
            if !message.timestamp.is_finite() {
                // What cannot be read proves no new life.
                out.push(Action::Count(Counter::Late));
                return;
            }
            // Whichever of the two is the older life's, what was applied is: start over. What
            // waits and is newer than the reply stays, unless the new life's clock is behind: then
            // nothing tells whose it is, and the replay has it.
            let newer_than = Some(message.timestamp).filter(|&at| at > self.newest);
            self.new_life(newer_than, out);
            self.begin_fill(None, now, out);
        } else if self.fill.is_some() {
            self.fill_reply(message, now, out);
        } else if self.heal.is_some() {
            self.heal_reply(message, now, out);
        }
        self.publish(out);
    }

    /// The open replay ended with its end marker.
    pub fn replay_end(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if !self.replay_open {
            return;
        }
        self.replay_open = false;
        if self.fill.is_some() {
            self.fill_end(now, out);
        } else if self.heal.is_some() {
            self.heal_stopped(now, out);
        }
        self.publish(out);
    }

    /// The open replay's socket failed.
    pub fn replay_failed(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if !self.replay_open {
            return;
        }
        self.replay_open = false;
        let idle_at = self.idle_at(now);
        if let Some(fill) = &mut self.fill {
            if fill.attempt.advanced {
                self.request(now, out);
            } else {
                // Not at once: a refused connection would use up every attempt in a moment.
                fill.attempt.idle_at = idle_at;
            }
        } else if self.heal.is_some() {
            self.heal_stopped(now, out);
        }
        self.publish(out);
    }

    /// Begins a fill, in place of any other replay, from `verify` or else the expected sequence.
    pub(super) fn begin_fill(
        &mut self,
        verify: Option<u64>,
        now: Instant,
        out: &mut Vec<Action<P>>,
    ) {
        let from_live =
            self.trust.0 == PodState::Live || self.fill.as_ref().is_some_and(|fill| fill.from_live);
        let at = self.expected();
        let reason = if verify.is_some() {
            Reason::Reconnected
        } else if self.applied.is_some() {
            let behind = self.held.first().or(self.seen).unwrap_or(at);
            Reason::Gap { missing: behind.saturating_sub(at), at }
        } else {
            Reason::None
        };
        self.fill = Some(Fill {
            attempt: Attempt::new(now),
            verify,
            reconnected_after: self.held.newest().max(self.newest),
            bounded: !self.held.is_empty(),
            from_live,
            reason,
        });
        self.request(now, out);
    }

    /// Asks, or asks again, for what the replay under way is missing.
    pub(super) fn request(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        let idle_at = self.idle_at(now);
        let expected = self.expected();
        let (attempt, from) = match (&mut self.fill, &mut self.heal) {
            (Some(fill), _) => (&mut fill.attempt, fill.verify.unwrap_or(expected)),
            (None, Some(heal)) => (&mut heal.attempt, heal.next),
            (None, None) => return,
        };
        attempt.requested(idle_at);
        self.replay_open = true;
        out.push(Action::Count(Counter::Replay));
        out.push(Action::RequestReplay { from });
    }

    /// A live message while a fill runs; `next` when it is the expected one.
    pub(super) fn fresh_in_fill(
        &mut self,
        message: Message<P>,
        next: bool,
        now: Instant,
        out: &mut Vec<Action<P>>,
    ) {
        let verifying = match &mut self.fill {
            Some(fill) => {
                fill.bounded = true;
                fill.verify.is_some()
            }
            None => false,
        };
        if next && !verifying {
            self.deliver(message, out);
            self.fill_advanced(now, out);
        } else {
            self.hold(message, out);
        }
    }

    fn fill_reply(&mut self, message: Message<P>, now: Instant, out: &mut Vec<Action<P>>) {
        let attempts = self.attempts();
        let Some(fill) = &mut self.fill else { return };
        let first = !fill.attempt.answered;
        fill.attempt.answered = true;
        if let Some(verify) = fill.verify {
            if message.sequence < verify {
                return;
            }
            fill.verify = None;
            if message.sequence == verify {
                // Its hash was compared before: same life.
                (self.restored, self.unproven) = (false, false);
                return self.fill_advanced(now, out);
            }
            // The last applied one rolled out of the engine's buffer: nothing to compare. Even
            // without a hole this may be another life, so its blocks are in doubt.
            let at = message.sequence;
            self.plan.hopeless();
            self.degrade(Reason::HistoryStarts { at }, at, out);
        }
        let tries = self.fill.as_ref().map_or(0, |fill| fill.attempt.tries);
        let expected = self.expected();
        if message.sequence < expected {
            return; // Overlaps with live messages delivered meanwhile.
        }
        if message.sequence > expected && !first && tries < attempts {
            // Lost on the way (an engine's ROUTER drops what a slow reader has no room for), or
            // really not there: the first reply to a fresh request tells.
            return self.request(now, out);
        }
        self.deliver_held(message.sequence, Loss::Hole, out);
        if message.sequence >= self.expected() {
            self.deliver_past(message, Loss::Hole, out);
        }
        self.fill_advanced(now, out);
    }

    fn fill_end(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        let attempts = self.attempts();
        let Some(fill) = &self.fill else { return };
        let (advanced, tries) = (fill.attempt.advanced, fill.attempt.tries);
        self.joined = true;
        if fill.verify.is_some() {
            // An engine that published has something to replay: this one did not, yet.
            let reconnected_after = fill.reconnected_after;
            self.new_life(Some(reconnected_after), out);
            self.begin_fill(None, now, out);
        } else if !self.missing() {
            if self.applied.is_none() {
                self.trusted(out);
            }
            self.finish(now, out);
        } else if advanced || tries < attempts {
            self.request(now, out);
        } else {
            self.deliver_held(u64::MAX, Loss::Ended, out);
            self.lost_tail(Loss::Ended, out);
            self.finish(now, out);
        }
    }

    pub(super) fn tick_fill(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        let Some(fill) = &self.fill else { return };
        if now < fill.attempt.idle_at {
            return;
        }
        if fill.attempt.tries < self.attempts() {
            return self.request(now, out);
        }
        // Given up. What waits is delivered; what it waited for is lost.
        let verifying = fill.verify.is_some();
        out.push(Action::Count(Counter::ReplayFailed));
        self.fill = None;
        self.joined = true;
        self.cooldown_until = self.config.replay.as_ref().map(|r| now + r.cooldown.min(MAX_WAIT));
        if self.missing() {
            self.deliver_held(u64::MAX, Loss::Silent, out);
            self.lost_tail(Loss::Silent, out);
        } else if self.applied.is_none() {
            self.trust = (PodState::Partial, Reason::ReplaySilent);
        } else if !verifying || self.restored {
            // It fell silent short of its end marker: how much is missing, nobody knows.
            self.degrade(Reason::ReplaySilent, self.expected(), out);
        }
        self.finish(now, out);
    }

    /// Delivers held messages below `end`, across whatever is missing between them.
    fn deliver_held(&mut self, end: u64, loss: Loss, out: &mut Vec<Action<P>>) {
        while self.held.first().is_some_and(|first| first < end) {
            if let Some(message) = self.held.pop() {
                self.deliver_past(message, loss, out);
            }
        }
    }

    /// Notes that live messages behind everything delivered were received, not held, and are lost.
    pub(super) fn lost_tail(&mut self, loss: Loss, out: &mut Vec<Action<P>>) {
        let at = self.expected();
        let Some(seen) = self.seen.filter(|&seen| seen >= at) else { return };
        if self.applied.is_some() {
            out.push(Action::Count(Counter::GapUnfilled));
            self.degrade(Reason::Gap { missing: seen - at + 1, at }, at, out);
        } else {
            let reason = match loss {
                Loss::NoReplay => Reason::JoinedMidStream,
                Loss::Silent => Reason::ReplaySilent,
                Loss::Hole | Loss::Ended => Reason::HistoryStarts { at: seen + 1 },
            };
            self.trust = (PodState::Partial, reason);
        }
    }

    /// Something new was delivered or verified: what is held may follow, the fill may be done.
    fn fill_advanced(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        let idle_at = self.idle_at(now);
        if let Some(fill) = &mut self.fill {
            fill.attempt.progress(idle_at);
        }
        self.drain(out);
        if self.fill.as_ref().is_some_and(|fill| fill.bounded) && !self.missing() {
            self.finish(now, out);
        }
    }

    /// Delivers held messages as far as they are contiguous.
    fn drain(&mut self, out: &mut Vec<Action<P>>) {
        while self.held.first().is_some_and(|first| first <= self.expected()) {
            let Some(message) = self.held.pop() else { return };
            if self.applied.is_none() || message.sequence == self.expected() {
                self.deliver(message, out);
            }
        }
    }

    /// Is something known of this epoch that was not delivered?
    fn missing(&self) -> bool {
        !self.held.is_empty() || self.seen.is_some_and(|seen| seen >= self.expected())
    }

    fn finish(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        self.fill = None;
        self.restored = false;
        self.close_replay(out);
        self.plan_heal(now);
    }

    /// Closes the replay socket if it is open.
    pub(super) fn close_replay(&mut self, out: &mut Vec<Action<P>>) {
        if self.replay_open {
            self.replay_open = false;
            out.push(Action::CancelReplay);
        }
    }

    pub(super) fn attempts(&self) -> u32 {
        self.config.replay.as_ref().map_or(1, |replay| replay.attempts.max(1))
    }

    pub(super) fn idle_at(&self, now: Instant) -> Instant {
        now + self.config.replay.as_ref().map_or(Duration::ZERO, |r| r.idle.min(MAX_WAIT))
    }
}
