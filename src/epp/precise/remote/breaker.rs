//! Whether the service is worth asking.
//!
//! # Model
//!
//! Closed: everybody asks. So many failures in a row open it: nobody asks. After a while it is half
//! open and lets one question through, whose outcome closes it or opens it again; a question that was
//! never heard of again is followed by another one after the same while.
//!
//! # Concurrency
//!
//! One word, changed by compare and swap. While all is well, a question costs two loads of it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// What a breaker is doing, with times in microseconds of the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// After so many failures in a row.
    Closed { failures: u32 },
    /// Since when.
    Open { since: u64 },
    /// Since when a question has been under way.
    HalfOpen { since: u64 },
}

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Failures in a row that open it, at least 1.
    pub(super) failures: u32,
    /// Microseconds after which an open one lets a question through.
    pub(super) half_open: u64,
}

impl State {
    /// The state after somebody wanted to ask, and whether they may.
    fn asked(self, now: u64, rules: Rules) -> (Self, bool) {
        match self {
            Self::Closed { .. } => (self, true),
            Self::Open { since } | Self::HalfOpen { since }
                if now.saturating_sub(since) >= rules.half_open =>
            {
                (Self::HalfOpen { since: now }, true)
            }
            Self::Open { .. } | Self::HalfOpen { .. } => (self, false),
        }
    }

    /// The state after an answer. One that comes while open was asked for before, and says nothing.
    fn succeeded(self) -> Self {
        match self {
            Self::Closed { .. } | Self::HalfOpen { .. } => Self::Closed { failures: 0 },
            Self::Open { .. } => self,
        }
    }

    /// The state after a failure.
    fn failed(self, now: u64, rules: Rules) -> Self {
        match self {
            Self::Closed { failures } if failures.saturating_add(1) < rules.failures => {
                Self::Closed { failures: failures.saturating_add(1) }
            }
            Self::Closed { .. } | Self::HalfOpen { .. } => Self::Open { since: now },
            Self::Open { .. } => self,
        }
    }

    /// Closed, half open or open, as a number and a word.
    pub(super) fn kind(self) -> (i64, &'static str) {
        match self {
            Self::Closed { .. } => (0, "closed"),
            Self::HalfOpen { .. } => (1, "half_open"),
            Self::Open { .. } => (2, "open"),
        }
    }

    /// Two bits say which, the others hold the number.
    fn pack(self) -> u64 {
        let (kind, value) = match self {
            Self::Closed { failures } => (0, u64::from(failures)),
            Self::HalfOpen { since } => (1, since),
            Self::Open { since } => (2, since),
        };
        kind << 62 | value & (u64::MAX >> 2)
    }

    fn unpack(word: u64) -> Self {
        let value = word & (u64::MAX >> 2);
        match word >> 62 {
            0 => Self::Closed { failures: value as u32 },
            1 => Self::HalfOpen { since: value },
            _ => Self::Open { since: value },
        }
    }
}

/// A breaker that all callers share.
#[derive(Debug)]
pub(super) struct Breaker {
    rules: Rules,
    start: Instant,
    state: AtomicU64,
}

impl Breaker {
    /// Closed.
    pub(super) fn new(failures: u32, half_open: Duration) -> Self {
        let half_open = u64::try_from(half_open.as_micros()).unwrap_or(u64::MAX >> 2);
        Self {
            rules: Rules { failures: failures.max(1), half_open },
            start: Instant::now(),
            state: AtomicU64::new(State::Closed { failures: 0 }.pack()),
        }
    }

    /// May somebody ask at `now`? With the state that began thereby, if one did.
    pub(super) fn ask(&self, now: Instant) -> (bool, Option<State>) {
        let now = self.micros(now);
        // The swap may be tried again, so the permission is that of the try that took effect.
        let mut allowed = false;
        let began = self.change(|state| {
            let (next, may) = state.asked(now, self.rules);
            allowed = may;
            next
        });
        (allowed, began)
    }

    /// An answer came; the state that began thereby, if one did.
    pub(super) fn succeeded(&self) -> Option<State> {
        self.change(State::succeeded)
    }

    /// No answer, or none that is one.
    pub(super) fn failed(&self, now: Instant) -> Option<State> {
        let now = self.micros(now);
        self.change(|state| state.failed(now, self.rules))
    }

    /// Swaps the state for what `next` makes of it; returns it if it is of another kind.
    fn change(&self, mut next: impl FnMut(State) -> State) -> Option<State> {
        let mut word = self.state.load(Ordering::Acquire);
        loop {
            let before = State::unpack(word);
            let after = next(before);
            if before == after {
                return None;
            }
            let swap = self.state.compare_exchange(
                word,
                after.pack(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match swap {
                Ok(_) => return (before.kind() != after.kind()).then_some(after),
                Err(now) => word = now,
            }
        }
    }

    fn micros(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_micros() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules { failures: 5, half_open: 250_000 };

    #[test]
    fn failures_in_a_row_open_it_and_one_question_decides() {
        let breaker = Breaker::new(5, Duration::from_millis(250));
        let at = |ms| breaker.start + Duration::from_millis(ms);
        for _ in 0..4 {
            assert_eq!(breaker.failed(at(0)), None);
        }
        assert_eq!(breaker.succeeded(), None);
        for _ in 0..4 {
            assert_eq!(breaker.failed(at(1)), None, "only failures in a row count");
        }
        assert_eq!(breaker.failed(at(2)).map(State::kind), Some((2, "open")));
        assert_eq!(breaker.succeeded(), None, "too late");
        assert_eq!(breaker.ask(at(251)), (false, None));
        let (allowed, began) = breaker.ask(at(252));
        assert!(allowed && began.map(State::kind) == Some((1, "half_open")));
        assert_eq!(breaker.ask(at(260)), (false, None), "one is under way");
        assert_eq!(breaker.failed(at(257)).map(State::kind), Some((2, "open")));
        assert_eq!(breaker.ask(at(506)), (false, None));
        assert!(breaker.ask(at(507)).0);
        assert!(breaker.ask(at(757)).0, "nobody has heard of the other one");
        assert_eq!(breaker.succeeded().map(State::kind), Some((0, "closed")));
        assert_eq!(breaker.ask(at(757)), (true, None));
    }

    #[test]
    fn of_many_threads_one_gets_through() {
        let breaker = Breaker::new(1, Duration::from_millis(250));
        for round in 1..50_u64 {
            let at = breaker.start + Duration::from_secs(round);
            breaker.failed(at);
            let through = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        let (allowed, _) = breaker.ask(at + Duration::from_millis(250));
                        through.fetch_add(usize::from(allowed), Ordering::Relaxed);
                    });
                }
            });
            assert_eq!(through.into_inner(), 1);
            breaker.succeeded();
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask,
        Succeed,
        Fail,
    }

    proptest! {
        #[test]
        fn words_keep_states(kind in 0..3, value in 0..u64::MAX >> 2) {
            let state = match kind {
                0 => State::Closed { failures: value as u32 },
                1 => State::HalfOpen { since: value },
                _ => State::Open { since: value },
            };
            prop_assert_eq!(State::unpack(state.pack()), state);
        }

        /// In any order of events: it is refused only after failures in a row, for no longer than the
        /// rules say, and while it is not closed no two questions pass within that time.
        #[test]
        fn refusals_have_a_reason_and_an_end(
            steps in prop::collection::vec(
                (prop_oneof![Just(Step::Ask), Just(Step::Succeed), Just(Step::Fail)], 0..200_000_u64),
                0..200,
            ),
        ) {
            let (mut state, mut now, mut row) = (State::Closed { failures: 0 }, 0, 0);
            let mut passed: Option<u64> = None;
            for (step, later) in steps {
                now += later;
                let before = state;
                match step {
                    Step::Ask => {
                        let (next, allowed) = state.asked(now, RULES);
                        state = next;
                        match before {
                            State::Closed { .. } => prop_assert!(allowed),
                            State::Open { since } | State::HalfOpen { since } => {
                                prop_assert_eq!(allowed, now - since >= RULES.half_open);
                            }
                        }
                        if allowed && before.kind().0 != 0 {
                            if let Some(passed) = passed {
                                prop_assert!(now - passed >= RULES.half_open);
                            }
                            passed = Some(now);
                        }
                    }
                    Step::Succeed => {
                        state = state.succeeded();
                        row = 0;
                        prop_assert_eq!(
                            matches!(state, State::Open { .. }),
                            matches!(before, State::Open { .. })
                        );
                    }
                    Step::Fail => {
                        state = state.failed(now, RULES);
                        row += 1;
                        if before.kind().0 == 0 && state.kind().0 != 0 {
                            prop_assert!(row >= RULES.failures);
                        }
                    }
                }
                if state.kind().0 == 0 {
                    passed = None;
                }
            }
        }
    }
}
