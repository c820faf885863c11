//! Sends a plan and notes what each request saw.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`client`] | one HTTP request, streamed and timed |
//! | [`sse`] | server-sent events, as they come, without a copy |
//! | `http` | an HTTP/1.1 answer without its framing; pure |
//! | `lane` | one thread's part of the plan |
//! | `pace` | waiting for a moment |
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
mod http;
mod lane;
mod pace;
pub mod picker;
pub mod sse;

use std::{
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc, Barrier, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use hdrhistogram::Histogram;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

pub use self::client::HttpOptions;
use self::{
    client::{Client, ClientOptions, Clock, Origin},
    lane::{Brought, Lane, Shared, State},
};
use super::{
    progress::Progress,
    workload::{BodyForm, BodyWriter, Plan, Planned},
};
use crate::support::clock::unix_ns;

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
    /// TLS, and headers beside those that requests need.
    pub http: HttpOptions,
    /// Nothing is sent after this time; `None` = the plan ends it.
    pub duration: Option<Duration>,
    /// How long answers may take after the last send; what is open then is `incomplete`.
    pub grace: Duration,
    /// How long one request may take, from its send, until it is given up.
    pub timeout: Duration,
    /// Threads that send, at least 1.
    pub threads: usize,
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

/// How often requests in flight are counted.
const SAMPLE: Duration = Duration::from_millis(10);
/// Of gaps between pieces.
const MAX_GAP: Duration = Duration::from_secs(3600);

/// Sends the plan; returns when all have ended. Blocks the calling thread; needs no runtime.
///
/// # Errors
///
/// Threads or runtimes that cannot be started, targets that are no addresses, and plans in which a
/// request comes after a later one. What single requests run into is in their [`Exchange`].
pub fn run(drive: &Drive) -> anyhow::Result<Driven> {
    run_with(drive, || {
        let mut writer = BodyWriter::new(drive.form, &drive.model);
        move |request: &Planned| writer.write(request)
    })
}

/// [`run`] with other bodies: `bodies` is called once on each thread, for what makes them there.
///
/// # Errors
///
/// As [`run`].
pub fn run_with<B>(drive: &Drive, bodies: impl Fn() -> B + Sync) -> anyhow::Result<Driven>
where
    B: FnMut(&Planned) -> Vec<Bytes>,
{
    let gateway = match &drive.target {
        Target::Gateway(url) => Some(Origin::resolve(url)?),
        Target::Picker(_) => None,
        Target::Direct(pods) => {
            anyhow::ensure!(!pods.is_empty(), "no pods to send to");
            None
        }
    };
    let (firsts, turns) = order(&drive.plan)?;
    let open = drive.pacing == Pacing::Open;
    let places = match drive.pacing {
        Pacing::Open => usize::MAX,
        Pacing::Closed { concurrency } => concurrency.max(1),
    };
    let threads = drive.threads.min(places).min(firsts.len()).max(1);
    // As many connections as the system lets us have; it says so when they are too few.
    drop(rlimit::increase_nofile_limit(u64::MAX));
    let shared = Shared {
        turns,
        firsts: if open { Vec::new() } else { firsts.clone() },
        taken: AtomicUsize::new(0),
        in_flight: AtomicU64::new(0),
        sent: AtomicU64::new(0),
        sending: AtomicUsize::new(threads),
        stop: drive.cancel.child_token(),
    };
    let path = BodyWriter::new(drive.form, &drive.model).path();
    let (barrier, started) = (Barrier::new(threads), OnceLock::<(Instant, u64)>::new());
    let thread = |number: usize| -> anyhow::Result<(Brought, Duration)> {
        let before = pace::thread_cpu();
        // Whatever fails here, the other threads must not wait at the barrier for ever.
        let meet = || {
            barrier.wait();
            Clock(started.get_or_init(|| (Instant::now(), unix_ns())).0)
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let brought = match runtime {
            Err(error) => {
                meet();
                Err(error).context("starting a runtime")
            }
            Ok(runtime) => LocalSet::new().block_on(&runtime, async {
                let options = ClientOptions {
                    http: &drive.http,
                    gateway: gateway.as_ref(),
                    picker: match drive.target {
                        Target::Picker(address) => Some(address),
                        _ => None,
                    },
                    path,
                    progress: &drive.progress,
                };
                let made = Client::new(options).and_then(|client| Ok((client, State::new()?)));
                let (client, state) = match made {
                    Ok(made) => made,
                    Err(error) => {
                        meet();
                        return Err(error);
                    }
                };
                let mine = firsts.iter().skip(number).step_by(threads).copied();
                let mut lane = Lane {
                    drive,
                    shared: &shared,
                    bodies: bodies(),
                    client: Rc::new(client),
                    clock: Clock(Instant::now()),
                    places: places / threads + usize::from(number < places % threads),
                    firsts: if open { mine.collect() } else { [].into() },
                    gateway: gateway.as_ref().map(|origin| origin.address),
                    state,
                };
                if open {
                    lane.get_ready().await;
                }
                lane.clock = meet();
                lane.client.start(lane.clock);
                lane.run().await
            }),
        };
        if brought.is_err() {
            shared.sending.fetch_sub(1, Relaxed);
            shared.stop.cancel();
        }
        Ok((brought?, pace::thread_cpu().saturating_sub(before)))
    };
    let mut in_flight = Histogram::new_with_bounds(1, 1 << 24, 3)?;
    let brought: Vec<_> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|number| {
                thread::Builder::new().name(format!("drive-{number}")).spawn_scoped(scope, {
                    let thread = &thread;
                    move || thread(number)
                })
            })
            .collect();
        while handles.iter().flatten().any(|handle| !handle.is_finished()) {
            thread::sleep(SAMPLE);
            if shared.sent.load(Relaxed) > 0 && shared.sending.load(Relaxed) > 0 {
                in_flight.saturating_record(shared.in_flight.load(Relaxed));
            }
        }
        let joined = handles.into_iter().map(|handle| {
            handle
                .context("starting a thread")?
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that sends has failed")))
        });
        joined.collect::<anyhow::Result<_>>()
    })?;
    let (started, started_unix_ns) = *started.get().context("no thread has started")?;
    let mut driven = Driven {
        started,
        started_unix_ns,
        elapsed: Duration::ZERO,
        sending: Duration::ZERO,
        exchanges: Vec::new(),
        gaps: gaps()?,
        in_flight,
        releases: Vec::new(),
        cpu: Duration::ZERO,
        unsent: 0,
    };
    for (brought, cpu) in brought {
        driven.exchanges.extend(brought.exchanges);
        driven.gaps.add(&brought.gaps)?;
        driven.cpu += cpu;
        driven.elapsed = driven.elapsed.max(Duration::from_nanos(brought.ended));
        driven.sending = driven.sending.max(Duration::from_nanos(brought.last_sent));
    }
    driven.exchanges.sort_unstable_by_key(|exchange| exchange.request);
    driven.unsent = drive.plan.requests.len() - driven.exchanges.len();
    driven.releases = releases(&drive.plan, &driven.exchanges);
    Ok(driven)
}

/// An empty histogram of gaps.
fn gaps() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, lane::ns(MAX_GAP), 3)?)
}

/// Turns by the request that they wait for.
type Turns = HashMap<u32, Vec<u32>>;

/// The requests that wait for no other, in order; and those that wait for each.
fn order(plan: &Plan) -> anyhow::Result<(Vec<u32>, Turns)> {
    let (mut firsts, mut turns) = (Vec::new(), HashMap::<u32, Vec<u32>>::new());
    for (index, request) in plan.requests.iter().enumerate() {
        let index = u32::try_from(index).context("a plan has fewer than 2^32 requests")?;
        match request.after {
            None => firsts.push(index),
            Some(after) => {
                anyhow::ensure!(
                    after.request < index,
                    "request {index} of the plan comes after request {}, which is not before it",
                    after.request
                );
                turns.entry(after.request).or_default().push(index);
            }
        }
    }
    // Plans are in order already, but for merged ones.
    firsts.sort_by_key(|index| plan.requests.get(*index as usize).and_then(|request| request.at));
    Ok((firsts, turns))
}

/// How closely the requests of each burst were sent.
fn releases(plan: &Plan, exchanges: &[Exchange]) -> Vec<Release> {
    let mut bursts = std::collections::BTreeMap::<u32, (Release, u64, u64)>::new();
    for exchange in exchanges {
        let planned = plan.requests.get(exchange.request as usize);
        let Some(burst) = planned.and_then(|planned| planned.burst) else { continue };
        let (intended_ns, sent) = (exchange.intended_ns, exchange.sent_ns);
        let new = Release { burst, intended_ns, requests: 0, spread_ns: 0 };
        let (release, first, last) = bursts.entry(burst).or_insert((new, sent, sent));
        release.intended_ns = release.intended_ns.min(intended_ns);
        release.requests += 1;
        *first = sent.min(*first);
        *last = sent.max(*last);
        release.spread_ns = *last - *first;
    }
    bursts.into_values().map(|(release, ..)| release).collect()
}
