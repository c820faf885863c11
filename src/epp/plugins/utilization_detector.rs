//! `utilization-detector`: how full the pool is, and a filter against full endpoints.
//!
//! ```text
//! saturation = mean over endpoints of max(q / queueDepthThreshold, kv / kvCacheUtilThreshold)
//!              an endpoint whose metrics are older than staleness counts 1
//!            = 1 without endpoints
//! ```
//!
//! q: waiting requests; kv: used fraction of the KV cache. From 1 on, requests of a priority below 0
//! are refused. As a filter it keeps the endpoints with fresh metrics and
//! `q < queueDepthThreshold × (1 + headroom)` and `kv < kvCacheUtilThreshold × (1 + headroom)`, or
//! everyone if none is such.
//!
//! staleness is `metricsStalenessThreshold`, but at least twice the longest interval at which metrics
//! are scraped: endpoints without requests are looked at once a second, and an idle pool is not a
//! saturated one. (The Go EPP scrapes all of them every 50 ms; nothing is ever that old there.)
//!
//! Parameters: `queueDepthThreshold` (requests, default 5, positive), `kvCacheUtilThreshold` (default
//! 0.8, in (0, 1]), `metricsStalenessThreshold` (Go duration, default `200ms`, positive), `headroom`
//! (fraction, default 0, not negative).

use std::{
    any::Any,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        datalayer::Metrics,
        scheduling::{Cycle, Filter, Plugin},
    },
    support::{
        fields::{Fields, set},
        units,
    },
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "utilization-detector",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(UtilizationDetector::read(params)))
}

/// How full the pool is, and a filter against full endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct UtilizationDetector {
    /// Positive.
    queue_depth: f64,
    /// In (0, 1].
    kv_usage: f64,
    staleness: Duration,
    /// See [`allow_for`](UtilizationDetector::allow_for).
    least_staleness: OnceLock<Duration>,
    headroom: f64,
}

impl Default for UtilizationDetector {
    fn default() -> Self {
        Self {
            queue_depth: 5.0,
            kv_usage: 0.8,
            staleness: Duration::from_millis(200),
            least_staleness: OnceLock::new(),
            headroom: 0.0,
        }
    }
}

impl UtilizationDetector {
    /// `plugin` as one of this type.
    #[must_use]
    pub fn of(plugin: &dyn Plugin) -> Option<&Self> {
        (plugin as &dyn Any).downcast_ref()
    }

    /// From now on, metrics of at most this age are fresh whatever the parameters say, since they may
    /// be that old on an endpoint that nothing is wrong with. Only the first call counts.
    pub fn allow_for(&self, age: Duration) {
        self.least_staleness.get_or_init(|| age);
    }

    /// Reads the parameters, also where they stand directly under `saturationDetector`. Leaves
    /// [`Fields::finish`] to the caller.
    #[must_use]
    pub fn read(params: &Fields<'_>) -> Self {
        let mut detector = Self::default();
        let depth = params.integer("queueDepthThreshold", 1..=u64::from(u32::MAX));
        set(&mut detector.queue_depth, depth.map(|depth: u32| f64::from(depth)));
        let usage = params.take("kvCacheUtilThreshold", |value| {
            let usage = value.as_f64().filter(|&usage| usage > 0.0 && usage <= 1.0);
            usage.ok_or_else(|| format!("expected a number above 0 and up to 1, got {value}"))
        });
        set(&mut detector.kv_usage, usage);
        let staleness =
            params.parsed("metricsStalenessThreshold", |text| match units::duration(text)? {
                Duration::ZERO => Err("must be positive".to_owned()),
                duration => Ok(duration),
            });
        set(&mut detector.staleness, staleness);
        set(&mut detector.headroom, params.number("headroom", 0.0));
        if detector.headroom > 1.0 {
            params
                .warn("headroom", "is a fraction, not percent: this more than doubles the limits");
        }
        detector
    }

    /// How full the pool of these endpoints is: 1 or more = saturated.
    #[must_use]
    pub fn saturation(&self, metrics: &[Arc<Metrics>], now: Instant) -> f64 {
        if metrics.is_empty() {
            return 1.0;
        }
        let of = |metrics: &Arc<Metrics>| {
            if !self.is_fresh(metrics, now) {
                return 1.0;
            }
            let queue = metrics.waiting as f64 / self.queue_depth;
            queue.max(metrics.kv_usage / self.kv_usage)
        };
        metrics.iter().map(of).sum::<f64>() / metrics.len() as f64
    }

    fn is_fresh(&self, metrics: &Metrics, now: Instant) -> bool {
        let least = self.least_staleness.get().copied().unwrap_or_default();
        metrics.age(now).is_some_and(|age| age <= self.staleness.max(least))
    }
}

impl Plugin for UtilizationDetector {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for UtilizationDetector {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        let queue = self.queue_depth * (1.0 + self.headroom);
        let kv = self.kv_usage * (1.0 + self.headroom);
        let passes = |at: usize| {
            let metrics = &*cycle.metrics[at];
            let below = (metrics.waiting as f64) < queue && metrics.kv_usage < kv;
            below && self.is_fresh(metrics, cycle.now)
        };
        if keep.iter().any(|&at| passes(at)) {
            keep.retain(|&at| passes(at));
        }
    }
}

#[cfg(test)]
mod tests;
