//! The scheduling cycle: which endpoint serves a request, and what a plugin can be.
//!
//! # Model
//!
//! A [`Plugin`] has any of the capabilities below. A [profile](SchedulingProfile) is filters →
//! weighted scorers → one picker over the candidates of a request; a [`ProfileHandler`] chooses the
//! profiles to run and which result is primary. All lists of endpoints are indices into
//! [`Cycle::endpoints`], so that nothing is looked up by name on the way.
//!
//! Hooks outside of profiles ([`DataProducer`], [`Admitter`], [`PreRequest`]) run for **every** plugin
//! of the configuration that has them, whether or not a profile names it.

use std::{
    any::Any,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;
use tokio_util::sync::CancellationToken;

use crate::epp::{
    datalayer::{Endpoint, Metrics, UnknownMetrics},
    director::Refusal,
    ext_proc::{Usage, headers::HeaderEdits},
    request::InferenceRequest,
};

mod decisions;
mod produced;
mod scheduler;
#[cfg(test)]
pub(crate) mod testing;

pub use self::{
    decisions::{Decision, Decisions},
    produced::{DataKey, InFlight, PrefixMatches, Produced, PromptTokens},
    scheduler::{PluginTimer, Scheduler, fallback_pick},
};

/// One request on its way through the profiles.
#[derive(Debug)]
pub struct Cycle<'a> {
    /// What is asked for.
    pub request: &'a InferenceRequest,
    /// The candidates. Every index of a cycle points here.
    pub endpoints: &'a [Arc<Endpoint>],
    /// The metrics of each candidate, read once, so that a cycle sees one state.
    pub metrics: &'a [Arc<Metrics>],
    /// What data producers found out.
    pub produced: &'a Produced,
    /// How an endpoint without metrics is read.
    pub unknown_metrics: UnknownMetrics,
    /// When the cycle began.
    pub now: Instant,
}

impl Cycle<'_> {
    /// What `read` says of the load of each endpoint in `among`, larger = busier. Endpoints that were
    /// never scraped are read as [`unknown_metrics`](Self::unknown_metrics) says.
    pub fn load<T: Copy + PartialOrd>(
        &self,
        among: &[usize],
        read: impl Fn(&Metrics) -> T,
    ) -> SmallVec<[T; 32]> {
        let metrics = |at: usize| &*self.metrics[at];
        // Defaults are an idle endpoint's metrics.
        let mut load: SmallVec<[T; 32]> = among.iter().map(|&at| read(metrics(at))).collect();
        if self.unknown_metrics == UnknownMetrics::AsIdle {
            return load;
        }
        let unknown = |at: usize| metrics(at).updated.is_none();
        let known = among.iter().zip(&load).filter(|&(&at, _)| !unknown(at));
        let worst = known.map(|(_, &load)| load).reduce(|a, b| if b > a { b } else { a });
        if let Some(worst) = worst {
            for (load, &at) in load.iter_mut().zip(among) {
                if unknown(at) {
                    *load = worst;
                }
            }
        }
        load
    }
}

/// A configured plugin: its capabilities. One file of [`plugins`](crate::epp::plugins) each.
pub trait Plugin: Any + fmt::Debug + Send + Sync {
    /// The canonical type name, such as `queue-scorer`.
    fn type_name(&self) -> &'static str;

    /// It narrows the candidates of a profile.
    fn filter(&self) -> Option<&dyn Filter> {
        None
    }
    /// It ranks candidates.
    fn scorer(&self) -> Option<&dyn Scorer> {
        None
    }
    /// It chooses among ranked candidates.
    fn picker(&self) -> Option<&dyn Picker> {
        None
    }
    /// It chooses profiles and merges their results.
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        None
    }
    /// It decides whether a further stage (prefill, encode) is worth it.
    fn decider(&self) -> Option<&dyn Decider> {
        None
    }
    /// It finds out something about the request before scheduling.
    fn producer(&self) -> Option<&dyn DataProducer> {
        None
    }
    /// It may refuse a request before scheduling.
    fn admitter(&self) -> Option<&dyn Admitter> {
        None
    }
    /// It hears of routed requests.
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        None
    }
    /// Data that it reads, besides what its own [`DataProducer`] writes.
    fn consumes(&self) -> Vec<DataKey> {
        Vec::new()
    }
    /// Data that it reads if some plugin writes it: that plugin goes first, and nobody misses it.
    fn may_consume(&self) -> Vec<DataKey> {
        Vec::new()
    }
    /// What has to run beside the requests for as long as the program does: connections,
    /// subscriptions. Asked for once.
    fn task(&self) -> Option<Task> {
        None
    }
    /// It wants every response to report its tokens: streams that would not are asked to.
    fn wants_usage(&self) -> bool {
        false
    }
    /// An endpoint's life ended: state kept for it can go.
    fn endpoint_removed(&self, _endpoint: &Endpoint) {}
}

/// Narrows the candidates of a profile. Cannot fail; nobody left is an answer.
pub trait Filter {
    /// Removes from `keep` whom it rejects. The order of the rest stays.
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>);

    /// It has a preference and no rule: it runs after the other filters of its profile, so that it
    /// keeps nobody whom one of them would reject.
    fn last(&self) -> bool {
        false
    }
}

/// Ranks candidates. Cannot fail; no opinion is 0.
pub trait Scorer {
    /// Writes into `scores[k]` the preference for endpoint `among[k]`, in [0, 1], 1 the best.
    /// `scores` comes zeroed and as long as `among`; values outside the range are clamped, NaN
    /// counts as 0.
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]);
}

/// A candidate with its weighted sum of scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Index into [`Cycle::endpoints`].
    pub endpoint: usize,
    /// Sum over scorers of weight × score.
    pub score: f64,
}

/// Chooses among scored candidates.
pub trait Picker {
    /// The chosen ones, best first; not empty, since `scored` is not. May reorder `scored`.
    fn pick(&self, cycle: &Cycle<'_>, scored: &mut [Scored]) -> Vec<usize>;
}

/// What one profile chose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProfileRun {
    /// Indices into [`Cycle::endpoints`], best first; not empty.
    pub picked: Vec<usize>,
    /// All candidates that were scored.
    pub scored: Vec<Scored>,
}

/// The results of a cycle, by profile name, in the order in which profiles ran. `None`: the profile
/// ran and had no candidate left.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProfileResults(pub Vec<(Arc<str>, Option<ProfileRun>)>);

impl ProfileResults {
    /// The result of a profile; `None` if it did not run or found nobody.
    #[must_use]
    pub fn get(&self, profile: &str) -> Option<&ProfileRun> {
        self.0.iter().find(|(name, _)| **name == *profile).and_then(|(_, run)| run.as_ref())
    }

    /// Did this profile run, whatever it found?
    #[must_use]
    pub fn ran(&self, profile: &str) -> bool {
        self.0.iter().any(|(name, _)| **name == *profile)
    }
}

/// Chooses the profiles to run and merges their results.
pub trait ProfileHandler {
    /// Profiles to run next, as indices into `profiles`; none = done. Called again after they ran.
    fn pick(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Vec<usize>;

    /// The name of the primary profile, whose first pick serves the request. May drop or correct
    /// other results.
    ///
    /// # Errors
    ///
    /// What is said to the client when no profile gives an endpoint.
    fn process_results(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal>;

    /// A port at which the sidecars of all pods listen: requests go there instead of to the picked
    /// port, which the handler passes on in a header. Data parallelism behind one port.
    fn primary_port(&self) -> Option<u16> {
        None
    }

    /// The name of the profile without which no request finds an endpoint; `None` = any profile will
    /// do. A configuration that lacks it is refused.
    fn needs(&self) -> Option<&str> {
        None
    }
}

/// Decides whether a further stage is worth it once the decode endpoint is known.
pub trait Decider {
    /// Run the stage?
    fn decide(&self, cycle: &Cycle<'_>, decode: usize) -> bool;
}

/// A future without a name.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Runs until it is told to stop; an error ends the program.
pub type Task = Box<dyn FnOnce(CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> + Send>;

/// Finds out something about a request before scheduling. A failure is its own to log and count: the
/// request goes on without the data.
pub trait DataProducer {
    /// What it writes. `name` is the name under which the plugin is configured.
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey>;

    /// Writes into `produced`, under the plugin's configured name where the data has one. Returns a
    /// future if it has to wait for somebody; it is dropped at the producer's
    /// [deadline](Self::deadline).
    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        endpoints: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>>;

    /// How long it may keep one request waiting: 400 ms unless it says otherwise.
    fn deadline(&self) -> Duration {
        PRODUCER_DEADLINE
    }
}

/// How long a data producer may keep one request waiting by default.
pub const PRODUCER_DEADLINE: Duration = Duration::from_millis(400);

/// May refuse a request before scheduling.
pub trait Admitter {
    /// # Errors
    ///
    /// The refusal.
    fn admit(&self, request: &InferenceRequest, endpoints: &[Arc<Endpoint>])
    -> Result<(), Refusal>;
}

/// The outcome of a cycle.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulingResult {
    /// Name of the primary profile.
    pub primary: Arc<str>,
    /// All results.
    pub results: ProfileResults,
}

impl SchedulingResult {
    /// The endpoints that serve the request, best first.
    #[must_use]
    pub fn targets(&self) -> &[usize] {
        self.results.get(&self.primary).map_or(&[], |run| &run.picked)
    }

    /// The first endpoint of every profile that found one, with the profile's name.
    pub fn firsts(&self) -> impl Iterator<Item = (&Arc<str>, usize)> {
        self.results.0.iter().filter_map(|(name, run)| Some((name, *run.as_ref()?.picked.first()?)))
    }
}

/// Hears of a request that was routed, before the answer goes out.
pub trait PreRequest {
    /// May change headers. What it returns lives as long as the HTTP exchange.
    ///
    /// # Errors
    ///
    /// A refusal, sent instead of the routing answer. The other plugins are still called.
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal>;
}

/// What a plugin keeps for one routed request. Dropped when the exchange ends, however it ends:
/// release what was taken in `Drop`.
pub trait Flight: Send {
    /// Response headers are about to be passed on; they may be changed.
    fn response_headers(&mut self, _headers: &mut HeaderEdits) {}
    /// The first bytes of the response body came.
    fn response_started(&mut self) {}
    /// The exchange ended, however it did. Called once, before the drop; not called for a request that
    /// was refused after the hook.
    fn ended(&mut self, _ending: &Ending<'_>, _report: &mut Report) {}
}

/// How an exchange ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending<'a> {
    /// The response is complete. If not, client or proxy gave up.
    pub completed: bool,
    /// Status of the pod's response.
    pub status: Option<u16>,
    /// What the response says of its tokens.
    pub usage: Option<Usage>,
    /// The endpoint that the proxy says has answered, `ip:port`.
    pub served: Option<&'a str>,
}

/// What plugins have to say of a finished exchange, for the response's dynamic metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Name and value.
    pub numbers: Vec<(&'static str, f64)>,
}

/// A profile: filters → weighted scorers → picker.
#[derive(Clone, Debug)]
pub struct SchedulingProfile {
    /// Unique name.
    pub name: Arc<str>,
    /// Plugins with [`Plugin::filter`], in order.
    pub filters: Vec<Configured>,
    /// Plugins with [`Plugin::scorer`], in order, with their weights.
    pub scorers: Vec<(Configured, f64)>,
    /// The plugin with [`Plugin::picker`].
    pub picker: Configured,
}

/// A plugin under its configured name.
#[derive(Clone, Debug)]
pub struct Configured {
    /// Unique; the type name unless the configuration says otherwise.
    pub name: Arc<str>,
    /// The plugin.
    pub plugin: Arc<dyn Plugin>,
}
