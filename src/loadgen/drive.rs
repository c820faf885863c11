//! Sends a plan and notes what each request saw.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`client`] | one HTTP request, streamed and timed |
//! | [`sse`] | server-sent events, as they come, without a copy |
//! | [`picker`] | Envoy's part towards an endpoint picker |
//!
//! # Model
//!
//! ```text
//! Plan ─▶ pacing (open: at its time, whatever happened before; closed: when there is a place)
//!           └─▶ route: gateway │ endpoint picker, then the pod it names │ pods in turn ─▶ client ─▶ Exchange
//! ```
//!
//! An open loop is never closed by a limit: what is sent late is counted as late. Latencies are from
//! the intended arrival and from the send, both.
//!
//! # Concurrency
//!
//! Each thread has a runtime, connections and histograms of its own; requests are dealt to threads by
//! their number, conversations by their first one.

pub mod client;
pub mod picker;
pub mod sse;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio_util::sync::CancellationToken;

use super::{
    progress::Progress,
    workload::{BodyForm, Plan},
};

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To a gateway or a server, which decides by itself: `http://host:port` or `https://host:port`.
    Gateway(String),
    /// To the pod that an endpoint picker names; we play Envoy's part.
    Picker(SocketAddr),
    /// To these pods in turn, without anybody's advice.
    Direct(Vec<SocketAddr>),
}

/// When the next request is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pacing {
    /// So many are in flight at any time. Ends after `duration`, or with the plan.
    Closed {
        /// Requests in flight, at least 1.
        concurrency: usize,
    },
    /// At its time.
    Open,
}

/// What to send, where, and how.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The requests.
    pub plan: Plan,
    /// Where they go.
    pub target: Target,
    /// When.
    pub pacing: Pacing,
    /// Served model name.
    pub model: String,
    /// What bodies look like.
    pub form: BodyForm,
    /// Nothing is sent after this time; `None` = the plan ends it.
    pub duration: Option<Duration>,
    /// How long answers may take after the last send; what is open then is `incomplete`.
    pub grace: Duration,
    /// How long one request may take, from its send, until it is given up.
    pub timeout: Duration,
    /// Threads that send, at least 1.
    pub threads: usize,
    /// Ask endpoint pickers and engines for what they predicted and reused.
    pub want_hits: bool,
    /// Where the live numbers go.
    pub progress: Arc<Progress>,
    /// Ends it early; what was measured is returned.
    pub cancel: CancellationToken,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With a complete answer.
    Complete,
    /// Not before the end of the run; its times so far are lower bounds.
    Incomplete,
    /// With an error.
    Failed(Failure),
}

/// Why a request failed: a bounded set, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Failure {
    /// No connection.
    Connect,
    /// TLS failed.
    Tls,
    /// No complete answer in time.
    Timeout,
    /// The connection ended before the answer.
    Closed,
    /// Not HTTP, or not server-sent events, or broken ones.
    Garbled,
    /// A status other than 2xx.
    Status(u16),
    /// The stream itself carried an error.
    Stream,
    /// The endpoint picker refused, with this status.
    Refused(u16),
    /// The endpoint picker failed.
    Picker,
}

impl Failure {
    /// Its name in reports.
    #[must_use]
    pub fn label(self) -> String {
        match self {
            Self::Connect => "connect".to_owned(),
            Self::Tls => "tls".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Closed => "closed_early".to_owned(),
            Self::Garbled => "garbled".to_owned(),
            Self::Status(status) => format!("http_{status}"),
            Self::Stream => "error_in_stream".to_owned(),
            Self::Refused(status) => format!("refused_{status}"),
            Self::Picker => "endpoint_picker".to_owned(),
        }
    }
}

/// What one request saw. Times are nanoseconds from [`Driven::started`].
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// Its index in the plan.
    pub request: u32,
    /// When it was meant to be sent; the send itself in closed loops.
    pub intended_ns: u64,
    /// When its first byte was handed to the socket; with an endpoint picker, when that was first asked.
    pub sent_ns: u64,
    /// When the endpoint picker's answer was there.
    pub picked_ns: Option<u64>,
    /// When the first piece with content was there; role-only pieces do not count.
    pub first_token_ns: Option<u64>,
    /// When the last piece with content was there.
    pub last_token_ns: Option<u64>,
    /// When the answer was complete, or given up.
    pub ended_ns: u64,
    /// Pieces with content.
    pub pieces: u32,
    /// Tokens of the answer by `usage`, else by pieces.
    pub output_tokens: u32,
    /// Tokens of the prompt by `usage`.
    pub prompt_tokens: Option<u32>,
    /// Of these, found in the cache, by `usage`.
    pub cached_tokens: Option<u32>,
    /// Tokens that the endpoint picker expected to be found there.
    pub predicted_tokens: Option<u32>,
    /// Who served it, as far as it is known: an address or a name.
    pub pod: Option<Arc<str>>,
    /// How it ended.
    pub ended: Ended,
}

/// How a burst was released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// Which one, from 0.
    pub burst: u32,
    /// When it was meant to be, nanoseconds from [`Driven::started`].
    pub intended_ns: u64,
    /// Requests in it.
    pub requests: u32,
    /// From the first to the last send.
    pub spread_ns: u64,
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Driven {
    /// When it started; all times count from here.
    pub started: Instant,
    /// The same on the wall clock, nanoseconds since the Unix epoch.
    pub started_unix_ns: u64,
    /// From there to the last answer, or to the end of the grace.
    pub elapsed: Duration,
    /// From the start to the last send.
    pub sending: Duration,
    /// One for each request that was sent, by `request`.
    pub exchanges: Vec<Exchange>,
    /// Gaps between pieces with content of complete answers, nanoseconds.
    pub gaps: Histogram<u64>,
    /// Requests in flight, sampled every 10 ms between the first and the last send.
    pub in_flight: Histogram<u64>,
    /// Bursts, in order.
    pub releases: Vec<Release>,
    /// CPU of the threads that sent.
    pub cpu: Duration,
    /// Requests of the plan that were not sent.
    pub unsent: usize,
}

/// Sends the plan; returns when all have ended. Blocks the calling thread; needs no runtime.
///
/// # Errors
///
/// Threads or runtimes that cannot be started, and targets that are no addresses. What single requests
/// run into is in their [`Exchange`].
pub fn run(drive: &Drive) -> anyhow::Result<Driven> {
    let _ = drive;
    anyhow::bail!("not built yet")
}
