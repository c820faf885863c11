//! When to look at an endpoint's metrics again.
//!
//! # Model
//!
//! Load has to be fresh when a request is routed, and matters to nobody when none is. So the time to
//! the next scrape is the *floor* while requests come and the load changes, a *calm* interval while
//! requests come and it does not, and doubles up to the *ceiling* without requests and after failures.
//! The first request after a quiet time wakes everything that waits longer than the calm interval.

use std::time::Duration;

/// How much longer than the floor the calm interval is. Twice: an endpoint to which nothing was routed
/// still changes by what other pickers do.
const CALM: u32 = 2;

/// What a scrape showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Other values than before.
    Changed,
    /// The same values.
    Same,
    /// No page, or none with anything in it.
    Failed,
}

/// The intervals of one endpoint.
#[derive(Clone, Debug)]
pub struct Pace {
    floor: Duration,
    ceiling: Duration,
    interval: Duration,
}

impl Pace {
    /// Starts at `floor`; never waits longer than `ceiling`, or `floor` if that is longer.
    #[must_use]
    pub fn new(floor: Duration, ceiling: Duration) -> Self {
        Self { floor, ceiling: ceiling.max(floor), interval: floor }
    }

    /// The time from the start of the scrape that ended like this to the start of the next one.
    /// `picks` says whether requests were routed since the last one.
    pub fn next(&mut self, outcome: Outcome, picks: bool) -> Duration {
        let doubled = self.interval.saturating_mul(2);
        self.interval = match (outcome, picks) {
            (Outcome::Changed, true) => self.floor,
            (Outcome::Same, true) => doubled.min(self.calm()),
            (_, false) | (Outcome::Failed, true) => doubled.min(self.ceiling),
        };
        self.interval
    }

    /// Does it wait so long that a request should wake it?
    #[must_use]
    pub fn is_slow(&self) -> bool {
        self.interval > self.calm()
    }

    /// Requests come again.
    pub fn wake(&mut self) {
        self.interval = self.floor;
    }

    fn calm(&self) -> Duration {
        self.floor.saturating_mul(CALM).min(self.ceiling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: Duration = Duration::from_millis(50);
    const CEILING: Duration = Duration::from_secs(1);

    /// Scrapes as (outcome, picks, milliseconds to the next one).
    #[track_caller]
    fn check(scrapes: &[(Outcome, bool, u64)]) {
        let mut pace = Pace::new(FLOOR, CEILING);
        for (at, &(outcome, picks, want)) in scrapes.iter().enumerate() {
            assert_eq!(pace.next(outcome, picks).as_millis() as u64, want, "scrape {at}");
            assert_eq!(pace.is_slow(), want > 100, "scrape {at}");
        }
    }

    #[test]
    fn fast_under_traffic_slow_without() {
        use Outcome::{Changed, Failed, Same};
        check(&[(Changed, true, 50), (Changed, true, 50), (Same, true, 100), (Same, true, 100)]);
        check(&[(Same, false, 100), (Same, false, 200), (Changed, false, 400), (Same, false, 800)]);
        check(&[(Same, false, 100), (Same, false, 200), (Changed, true, 50)]);
        check(&[(Same, false, 100), (Same, false, 200), (Same, true, 100)]);
        let mut failing = vec![(Failed, true, 100), (Failed, true, 200), (Failed, true, 400)];
        failing.extend([(Failed, true, 800), (Failed, true, 1000), (Failed, true, 1000)]);
        check(&failing);
        failing.push((Changed, true, 50));
        check(&failing);
    }

    #[test]
    fn a_floor_over_the_ceiling_is_the_interval() {
        let mut pace = Pace::new(2 * CEILING, CEILING);
        for picks in [true, false] {
            for outcome in [Outcome::Changed, Outcome::Same, Outcome::Failed] {
                assert_eq!(pace.next(outcome, picks), 2 * CEILING);
                assert!(!pace.is_slow());
            }
        }
    }

    #[test]
    fn waking_starts_over() {
        let mut pace = Pace::new(FLOOR, CEILING);
        for _ in 0..9 {
            pace.next(Outcome::Same, false);
        }
        assert!(pace.is_slow());
        pace.wake();
        assert!(!pace.is_slow());
        assert_eq!(pace.next(Outcome::Changed, true), FLOOR);
    }
}
