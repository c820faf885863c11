//! One request's run through the profiles.
//!
//! # Model
//!
//! The handler names profiles until it names none; each runs once. A profile: all filters in order,
//! stopping when nobody is left; for every scorer `sum += weight × clamp(score, 0, 1)`, NaN = 0; the
//! picker. Scorers write into a slice that is parallel to the filtered candidates, so they cannot
//! bring back whom a filter rejected. Sums are not normalized: they lie in 0..Σ weights.
//!
//! # Failure
//!
//! A cycle that finds nobody is refused as its handler words it, with 429. A cycle that **cannot be
//! run** — a handler that asks twice for a profile or for one that does not exist, a picker that
//! picks outside of its candidates — is refused with [`RefusalCode::Internal`]: the caller fails
//! open with [`Scheduler::fallback`]. The loop ends after as many rounds as there are profiles,
//! whatever a handler does.
//!
//! # Cost
//!
//! O(profiles × candidates × plugins); a handful of allocations per profile, none per candidate.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;

use super::{
    Configured, Cycle, ProfileResults, ProfileRun, SchedulingProfile, SchedulingResult, Scored,
};
use crate::epp::{
    director::{Refusal, RefusalCode},
    metrics::ExtensionPoint,
};

/// Hears how long one plugin took at one extension point. Its labels are resolved when it is made.
pub trait PluginTimer: fmt::Debug + Send + Sync {
    /// One call took this long, to about a clock reading.
    fn ran(&self, took: Duration);
}

type Timer = Option<Arc<dyn PluginTimer>>;

/// The timers of every plugin, in the order of the profiles.
#[derive(Clone, Debug)]
struct Timers {
    pick: Timer,
    process: Timer,
    profiles: Vec<ProfileTimers>,
}

#[derive(Clone, Debug)]
struct ProfileTimers {
    filters: Vec<Timer>,
    scorers: Vec<Timer>,
    picker: Timer,
}

/// Splits the time of a cycle among plugins: the end of one call is the start of the next, so that
/// the clock is read once per call, and not at all where nobody listens.
struct Lap(Option<Instant>);

impl Lap {
    fn end(&mut self, timer: Option<&Timer>) {
        if let Some(start) = &mut self.0 {
            let now = Instant::now();
            if let Some(Some(timer)) = timer {
                timer.ran(now.duration_since(*start));
            }
            *start = now;
        }
    }
}

/// A profile handler and its profiles.
#[derive(Clone, Debug)]
pub struct Scheduler {
    handler: Configured,
    profiles: Vec<SchedulingProfile>,
    timers: Option<Timers>,
}

impl Scheduler {
    /// `handler` needs [`Plugin::profile_handler`](super::Plugin::profile_handler), and the plugins
    /// of the profiles what their places ask for; a filter or scorer without the capability is
    /// passed over, a missing handler or picker makes every cycle an internal fault.
    #[must_use]
    pub fn new(handler: Configured, profiles: Vec<SchedulingProfile>) -> Self {
        Self { handler, profiles, timers: None }
    }

    /// Times every plugin for which `resolve` has a timer. Asked once per plugin and place.
    #[must_use]
    pub fn with_timers(
        mut self,
        mut resolve: impl FnMut(ExtensionPoint, &Configured) -> Option<Arc<dyn PluginTimer>>,
    ) -> Self {
        let profiles = self.profiles.iter().map(|profile| ProfileTimers {
            filters: profile
                .filters
                .iter()
                .map(|plugin| resolve(ExtensionPoint::Filter, plugin))
                .collect(),
            scorers: profile
                .scorers
                .iter()
                .map(|(plugin, _)| resolve(ExtensionPoint::Scorer, plugin))
                .collect(),
            picker: resolve(ExtensionPoint::Picker, &profile.picker),
        });
        let profiles = profiles.collect();
        self.timers = Some(Timers {
            pick: resolve(ExtensionPoint::ProfilePicker, &self.handler),
            process: resolve(ExtensionPoint::ProcessProfilesResults, &self.handler),
            profiles,
        });
        self
    }

    /// The profile handler.
    #[must_use]
    pub fn handler(&self) -> &Configured {
        &self.handler
    }

    /// The profiles, in the order of the configuration.
    #[must_use]
    pub fn profiles(&self) -> &[SchedulingProfile] {
        &self.profiles
    }

    /// Runs one cycle. The result's primary profile has at least one pick, and every index of the
    /// result is one of `cycle.endpoints`.
    ///
    /// # Errors
    ///
    /// [`RefusalCode::Internal`] if the cycle could not be run, after which the caller should
    /// [fall back](Self::fallback); the handler's refusal if nobody was found.
    pub fn schedule(&self, cycle: &Cycle<'_>) -> Result<SchedulingResult, Refusal> {
        debug_assert_eq!(cycle.metrics.len(), cycle.endpoints.len());
        let Some(handler) = self.handler.plugin.profile_handler() else {
            return Err(internal(format!("'{}' is no profile handler", self.handler.name)));
        };
        let timers = self.timers.as_ref();
        let mut lap = Lap(timers.map(|_| Instant::now()));
        let mut results = ProfileResults::default();
        let mut keep = Vec::with_capacity(cycle.endpoints.len());
        let mut fault = None;
        loop {
            let picks = handler.pick(cycle, &self.profiles, &results);
            lap.end(timers.map(|timers| &timers.pick));
            if picks.is_empty() {
                break;
            }
            for at in picks {
                let Some(profile) = self.profiles.get(at) else {
                    return Err(internal(format!(
                        "'{}' asks for scheduler profile {at} of {}",
                        self.handler.name,
                        self.profiles.len()
                    )));
                };
                // Every round thus adds a result, so that the loop ends.
                if results.ran(&profile.name) {
                    return Err(internal(format!(
                        "'{}' asks again for scheduler profile '{}'",
                        self.handler.name, profile.name
                    )));
                }
                let timers = timers.and_then(|timers| timers.profiles.get(at));
                let run = profile.run(cycle, &mut keep, timers, &mut lap);
                let run = run.unwrap_or_else(|refusal| {
                    fault = Some(refusal);
                    None
                });
                results.0.push((Arc::clone(&profile.name), run));
            }
        }
        if results.0.is_empty() {
            return Err(internal(format!(
                "failed to run any scheduler profile for request {}",
                cycle.request.id
            )));
        }
        let primary = handler.process_results(cycle, &self.profiles, &mut results);
        lap.end(timers.map(|timers| &timers.process));
        // What a handler says of a profile that broke is a consequence of it.
        let primary = primary.map_err(|refusal| fault.unwrap_or(refusal))?;
        let known = |run: &ProfileRun| run.picked.iter().all(|&at| at < cycle.endpoints.len());
        let runs = || results.0.iter().filter_map(|(_, run)| run.as_ref());
        if results.get(&primary).is_none_or(|run| run.picked.is_empty()) || !runs().all(known) {
            return Err(failed_profile(&primary));
        }
        Ok(SchedulingResult { primary, results })
    }

    /// A result for a cycle that could not be run: some candidate, under the name of the first
    /// profile. `None` only if there is no candidate.
    #[must_use]
    pub fn fallback(&self, cycle: &Cycle<'_>) -> Option<SchedulingResult> {
        let endpoint = fallback_pick(cycle)?;
        let primary = self.profiles.first().map_or_else(|| "default".into(), |p| p.name.clone());
        let run = ProfileRun { picked: vec![endpoint], scored: Vec::new() };
        let results = ProfileResults(vec![(Arc::clone(&primary), Some(run))]);
        Some(SchedulingResult { primary, results })
    }

    /// Where the request goes: `ip:port` of every target of `result`, best first, joined by commas.
    #[must_use]
    pub fn destination(&self, cycle: &Cycle<'_>, result: &SchedulingResult) -> String {
        let handler = self.handler.plugin.profile_handler();
        let port = handler.and_then(super::ProfileHandler::primary_port);
        let mut out = String::with_capacity(24 * result.targets().len());
        for endpoint in result.targets().iter().filter_map(|&at| cycle.endpoints.get(at)) {
            if !out.is_empty() {
                out.push(',');
            }
            match port {
                None => out.push_str(endpoint.address()),
                Some(port) => {
                    out.push_str(&std::net::SocketAddr::new(endpoint.ip(), port).to_string());
                }
            }
        }
        out
    }
}

/// Some candidate, each with the same probability: what is done when scheduling itself fails. `None`
/// only if there is no candidate.
#[must_use]
pub fn fallback_pick(cycle: &Cycle<'_>) -> Option<usize> {
    let count = cycle.endpoints.len();
    (count > 0).then(|| fastrand::usize(..count))
}

fn internal(fault: impl fmt::Display) -> Refusal {
    Refusal::new(RefusalCode::Internal, format!("failed to find target endpoint: {fault}"))
}

fn failed_profile(name: &str) -> Refusal {
    internal(format!("failed to run scheduler profile '{name}'"))
}

/// A score as it counts: within [0, 1], NaN is 0.
fn clamped(score: f64) -> f64 {
    if score.is_nan() { 0.0 } else { score.clamp(0.0, 1.0) }
}

impl SchedulingProfile {
    /// `None`: the filters left nobody. `keep` is a buffer.
    fn run(
        &self,
        cycle: &Cycle<'_>,
        keep: &mut Vec<usize>,
        timers: Option<&ProfileTimers>,
        lap: &mut Lap,
    ) -> Result<Option<ProfileRun>, Refusal> {
        keep.clear();
        keep.extend(0..cycle.endpoints.len());
        for (at, plugin) in self.filters.iter().enumerate() {
            if keep.is_empty() {
                break;
            }
            if let Some(filter) = plugin.plugin.filter() {
                filter.filter(cycle, keep);
                lap.end(timers.and_then(|timers| timers.filters.get(at)));
            }
        }
        if keep.is_empty() {
            return Ok(None);
        }
        let mut scored: Vec<Scored> =
            keep.iter().map(|&endpoint| Scored { endpoint, score: 0.0 }).collect();
        let mut scores: SmallVec<[f64; 64]> = smallvec::smallvec![0.0; keep.len()];
        for (at, (plugin, weight)) in self.scorers.iter().enumerate() {
            let Some(scorer) = plugin.plugin.scorer() else { continue };
            scores.fill(0.0);
            scorer.score(cycle, keep, &mut scores);
            for (sum, score) in scored.iter_mut().zip(&scores) {
                sum.score += weight * clamped(*score);
            }
            lap.end(timers.and_then(|timers| timers.scorers.get(at)));
        }
        let Some(picker) = self.picker.plugin.picker() else {
            return Err(failed_profile(&self.name));
        };
        let picked = picker.pick(cycle, &mut scored);
        lap.end(timers.map(|timers| &timers.picker));
        // Filters keep the order, so that `keep` ascends.
        if picked.is_empty() || picked.iter().any(|at| keep.binary_search(at).is_err()) {
            return Err(failed_profile(&self.name));
        }
        Ok(Some(ProfileRun { picked, scored }))
    }
}

#[cfg(test)]
mod tests;
