//! What a run saw, as numbers of the report; and whether the run may be trusted.
//!
//! # Model
//!
//! * The time to the first token counts from the intended arrival, and beside it from the send. What was
//!   incomplete at the end, and what was given up for its time, counts with what it had waited, as a lower
//!   bound. Other failures are counted as errors and have no latency.
//! * The inter-token latency is all gaps between pieces with content; the time per output token is
//!   (last − first) ÷ (tokens − 1), by request, of complete answers with at least two tokens.
//! * A run is *valid* if the load driver did what it was asked for. That the system under test is slow, or
//!   fails, makes no run invalid; that nothing completed does, since then nothing was measured.

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

use super::{
    drive::{Driven, Ended, Exchange, Failure, Pacing},
    environment,
    report::{Bursts, Goodput, Hits, InFlight, LoopKind, Moment, Percentiles, PodShare, Scenario},
    resources::{Sample, Sampled},
    stats::{self, Observed},
    workload::{Plan, Planned},
};
use crate::support::clock::unix_ns;

/// Nanoseconds in a millisecond; dividing by it keeps round numbers round.
const MS: f64 = 1e6;
/// Nanoseconds in a second.
const S: f64 = 1e9;

/// Sent ÷ asked, at least.
const ACHIEVED: f64 = 0.99;
/// A last send that is so late, in seconds, is no matter of rates.
const LAST_SEND_SLACK_S: f64 = 0.01;
/// P99 of the dispatch delay may be this, milliseconds, or a share of the median time to the first token.
const DISPATCH_MS: f64 = 1.0;
const DISPATCH_SHARE: f64 = 0.01;
/// Share of the cores it may use that the load driver may take.
const OWN_CPU: f64 = 0.8;
/// Share of all cores above which all components together leave nothing.
const ALL_CPU: f64 = 0.95;
/// Mean in flight ÷ asked, in closed loops of more than one.
const FILLED: f64 = 0.95;
/// A burst is released within this, nanoseconds.
const RELEASE_NS: u64 = 1_000_000;
/// Wall and monotonic clock may part by this, seconds, and by this share of the run.
const CLOCK_S: f64 = 0.01;
const CLOCK_SHARE: f64 = 0.001;

/// Points of the distribution.
const CDF_POINTS: usize = 200;
/// Requests whose prediction is given.
const PREDICTIONS: usize = 2_000;
/// Slices of the timeline at most.
const SLICES: usize = 300;
/// Arrivals whose median says that a burst is over.
const RECOVERY_WINDOW: usize = 5;

/// What a request has to keep to: `ttft=200ms,tpot=30ms,itl=50ms,latency=2s`, each optional, at least one.
///
/// `ttft` and `latency` count from the intended arrival. `itl` is the mean gap between the pieces of the
/// request's answer, `tpot` that between its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Objectives {
    /// Time to the first token.
    pub ttft: Option<Duration>,
    /// Time per output token.
    pub tpot: Option<Duration>,
    /// Mean gap between pieces.
    pub itl: Option<Duration>,
    /// Time to the end of the answer.
    pub latency: Option<Duration>,
}

impl Objectives {
    /// Did a request meet all? What did not complete did not.
    #[must_use]
    pub fn met(&self, exchange: &Exchange) -> bool {
        let within = |objective: Option<Duration>, ns: Option<f64>| match (objective, ns) {
            (None, _) => true,
            (Some(objective), Some(ns)) => ns <= objective.as_nanos() as f64,
            // Of one token there is no time between tokens.
            (Some(_), None) => true,
        };
        let Some(first) = exchange.first_token_ns else { return false };
        exchange.ended == Ended::Complete
            && within(self.ttft, Some(first.saturating_sub(exchange.intended_ns) as f64))
            && within(self.tpot, per_token_ns(exchange, exchange.output_tokens))
            && within(self.itl, per_token_ns(exchange, exchange.pieces))
            && within(self.latency, Some(ns_since(exchange.ended_ns, exchange.intended_ns)))
    }
}

impl FromStr for Objectives {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        for part in text.split(',') {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}` is not NAME=DURATION, such as ttft=200ms"))?;
            let place = match name.trim() {
                "ttft" => &mut this.ttft,
                "tpot" => &mut this.tpot,
                "itl" => &mut this.itl,
                "latency" => &mut this.latency,
                other => {
                    return Err(format!("unknown objective `{other}`: ttft, tpot, itl, latency"));
                }
            };
            if place.replace(duration(value.trim())?).is_some() {
                return Err(format!("objective `{}` is given twice", name.trim()));
            }
        }
        Ok(this)
    }
}

impl fmt::Display for Objectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = [
            ("ttft", self.ttft),
            ("tpot", self.tpot),
            ("itl", self.itl),
            ("latency", self.latency),
        ];
        let given = each.iter().filter_map(|(name, value)| Some((name, (*value)?)));
        for (at, (name, value)) in given.enumerate() {
            let between = if at == 0 { "" } else { "," };
            write!(f, "{between}{name}={}ms", value.as_nanos() as f64 / MS)?;
        }
        Ok(())
    }
}

/// `200ms`, `1.5s` or `250us`.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a duration above 0, such as 250us, 200ms or 1.5s");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return Err(bad()),
    };
    let value: f64 = digits.parse().map_err(|_| bad())?;
    let duration = Duration::try_from_secs_f64(value * unit).map_err(|_| bad())?;
    if duration.is_zero() { Err(bad()) } else { Ok(duration) }
}

/// What the run knows beside what requests saw. Everything may be left at its default; what is then not
/// known is left out of the scenario.
#[derive(Clone, Debug, Default)]
pub struct MeasureOptions<'a> {
    /// See [`Scenario::name`].
    pub name: &'a str,
    /// See [`Scenario::policy`].
    pub policy: &'a str,
    /// See [`Scenario::repeat`].
    pub repeat: u32,
    /// See [`Scenario::level`].
    pub level: Option<f64>,
    /// See [`Scenario::workload`].
    pub workload: String,
    /// See [`Scenario::seed`].
    pub seed: u64,
    /// How requests were paced; `None` = at their times.
    pub pacing: Option<Pacing>,
    /// Tokens in a block, for what counts as an exact prediction; 0 as 1.
    pub block_size: u32,
    /// See [`Scenario::asked_rps`].
    pub asked_rps: Option<f64>,
    /// For the goodput.
    pub objectives: Option<Objectives>,
    /// Threads that sent; 0 as 1.
    pub threads: usize,
    /// Cores that may be used; 0 = not known, then nothing is said of CPU.
    pub cores: f64,
    /// Load average before the run.
    pub load_before: f64,
    /// Pods that could have served, for the imbalance; 0 = those that did.
    pub pods: usize,
    /// See [`Hits::ideal_hit_ratio`].
    pub ideal_hit_ratio: Option<f64>,
    /// See [`Hits::regret_tokens`].
    pub regret_tokens: Option<u64>,
    /// See [`Hits::source`].
    pub prediction_source: &'a str,
    /// See [`Scenario::gateway`].
    pub gateway: &'a str,
    /// See [`Scenario::dispersion`].
    pub dispersion: BTreeMap<String, f64>,
    /// What the components cost; `loadgen` among them is ourselves.
    pub resources: Option<&'a Sampled>,
    /// Where the times of the three below count from; `None` = from the start of the run.
    pub origin: Option<Instant>,
    /// Freshness probes: seconds, microseconds.
    pub probes: &'a [[f64; 2]],
    /// Backlog: seconds, batches.
    pub backlog: &'a [[f64; 2]],
    /// Bursts of events: begin and end, seconds.
    pub event_bursts: &'a [[f64; 2]],
}

/// Computes everything of a scenario that comes from its requests, and judges the run. `freshness_us` and
/// `storm` are the caller's.
///
/// Call it right after the run: it reads both clocks, to see whether they parted.
#[must_use]
pub fn scenario(driven: &Driven, plan: &Plan, options: &MeasureOptions<'_>) -> Scenario {
    let exchanges = &driven.exchanges;
    let begin = exchanges.iter().map(|exchange| exchange.intended_ns).min().unwrap_or(0);
    let end = exchanges.iter().map(|exchange| exchange.ended_ns).max().unwrap_or(begin);
    let duration_s = ns_since(end, begin) / S;
    let sending_s = driven.sending.as_secs_f64() - begin as f64 / S;
    let per_s = |count: u64, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };

    let mut errors_by_label = BTreeMap::new();
    let (mut complete, mut incomplete, mut errors) = (0, 0, 0);
    for exchange in exchanges {
        match exchange.ended {
            Ended::Complete => complete += 1,
            Ended::Incomplete => incomplete += 1,
            Ended::Failed(failure) => {
                errors += 1;
                *errors_by_label.entry(failure.label()).or_insert(0) += 1;
            }
        }
    }
    let requests = exchanges.len() as u64;
    let completed = || exchanges.iter().filter(|exchange| exchange.ended == Ended::Complete);
    let output_tokens = completed().map(|exchange| u64::from(exchange.output_tokens)).sum();
    let prompt_tokens = completed().map(|exchange| prompt_tokens(exchange, plan)).sum();
    let firsts = |from: fn(&Exchange) -> u64| {
        stats::percentiles(exchanges.iter().filter_map(|exchange| first_token(exchange, from)))
    };
    let picks: Vec<f64> = exchanges
        .iter()
        .filter_map(|exchange| Some(ns_since(exchange.picked_ns?, exchange.sent_ns) / MS))
        .collect();
    let (pods, imbalance) = pods(exchanges, plan, options.pods);

    let mut scenario = Scenario {
        name: options.name.to_owned(),
        policy: options.policy.to_owned(),
        repeat: options.repeat,
        level: options.level,
        pacing: match options.pacing {
            Some(Pacing::Closed { .. }) => LoopKind::Closed,
            Some(Pacing::Open) | None => LoopKind::Open,
        },
        workload: options.workload.clone(),
        seed: options.seed,
        duration_s,
        requests,
        errors,
        errors_by_label,
        incomplete,
        asked_rps: options.asked_rps,
        sent_rps: per_s(requests, if sending_s > 0.0 { sending_s } else { duration_s }),
        throughput_rps: per_s(complete, duration_s),
        output_tokens_per_s: per_s(output_tokens, duration_s),
        prompt_tokens_per_s: per_s(prompt_tokens, duration_s),
        in_flight: InFlight {
            asked: match options.pacing {
                Some(Pacing::Closed { concurrency }) => Some(concurrency as u64),
                Some(Pacing::Open) | None => None,
            },
            mean: driven.in_flight.mean(),
            p95: driven.in_flight.value_at_quantile(0.95) as f64,
            max: driven.in_flight.max(),
        },
        ttft_ms: firsts(|exchange| exchange.intended_ns),
        ttft_from_send_ms: firsts(|exchange| exchange.sent_ns),
        dispatch_delay_ms: stats::percentiles(
            exchanges.iter().map(|exchange| ns_since(exchange.sent_ns, exchange.intended_ns) / MS),
        ),
        pick_ms: (!picks.is_empty()).then(|| stats::percentiles(picks)),
        itl_ms: stats::from_histogram(&driven.gaps, 1.0 / MS),
        tpot_ms: stats::percentiles(
            completed()
                .filter_map(|exchange| Some(per_token_ns(exchange, exchange.output_tokens)? / MS)),
        ),
        latency_ms: stats::percentiles(exchanges.iter().filter_map(latency)),
        goodput: options.objectives.map(|objectives| goodput(objectives, exchanges, duration_s)),
        dispersion: options.dispersion.clone(),
        bursts: bursts(driven, plan),
        hits: hits(exchanges, plan, options),
        resources: options.resources.map(|sampled| sampled.totals.clone()).unwrap_or_default(),
        gateway: options.gateway.to_owned(),
        pods,
        imbalance,
        ttft_cdf: cdf(exchanges),
        predictions: predictions(exchanges),
        timeline: timeline(driven, options),
        ..Scenario::default()
    };
    scenario.resources.values_mut().for_each(|used| used.per_request(requests));
    let clocks_apart_s = (unix_ns() as f64 - driven.started_unix_ns as f64) / S
        - driven.started.elapsed().as_secs_f64();
    judge(&mut scenario, driven, plan, options, clocks_apart_s);
    scenario
}

fn ns_since(later: u64, earlier: u64) -> f64 {
    later.saturating_sub(earlier) as f64
}

/// Does a request without an end, or given up, still say how long it had waited at least?
fn waited(exchange: &Exchange) -> bool {
    matches!(exchange.ended, Ended::Incomplete | Ended::Failed(Failure::Timeout))
}

/// To the first token, milliseconds.
fn first_token(exchange: &Exchange, from: fn(&Exchange) -> u64) -> Option<Observed> {
    let since = |ns| ns_since(ns, from(exchange)) / MS;
    match exchange.first_token_ns {
        Some(first) => Some(since(first).into()),
        None if waited(exchange) => {
            Some(Observed { value: since(exchange.ended_ns), censored: true })
        }
        None => None,
    }
}

/// To the end of the answer, milliseconds.
fn latency(exchange: &Exchange) -> Option<Observed> {
    let value = ns_since(exchange.ended_ns, exchange.intended_ns) / MS;
    let censored = waited(exchange);
    (censored || exchange.ended == Ended::Complete).then_some(Observed { value, censored })
}

/// Mean time between `count` tokens or pieces of a complete answer, nanoseconds.
fn per_token_ns(exchange: &Exchange, count: u32) -> Option<f64> {
    let (first, last) = exchange.first_token_ns.zip(exchange.last_token_ns)?;
    (exchange.ended == Ended::Complete && count > 1)
        .then(|| ns_since(last, first) / f64::from(count - 1))
}

fn prompt_tokens(exchange: &Exchange, plan: &Plan) -> u64 {
    let planned = || plan.requests.get(exchange.request as usize);
    match exchange.prompt_tokens {
        Some(tokens) => tokens.into(),
        None => planned().map_or(0, |planned| planned.prompt.tokens()),
    }
}

fn goodput(objectives: Objectives, exchanges: &[Exchange], duration_s: f64) -> Goodput {
    let sent = exchanges.len() as u64;
    let met = exchanges.iter().filter(|exchange| objectives.met(exchange)).count() as u64;
    Goodput {
        objectives: objectives.to_string(),
        met,
        share: if sent > 0 { met as f64 / sent as f64 } else { 0.0 },
        interval: stats::wilson(met, sent),
        rps: if duration_s > 0.0 { met as f64 / duration_s } else { 0.0 },
    }
}

fn pods(
    exchanges: &[Exchange],
    plan: &Plan,
    known: usize,
) -> (BTreeMap<String, PodShare>, Option<f64>) {
    let mut pods = BTreeMap::<String, PodShare>::new();
    let mut all = 0;
    for exchange in exchanges {
        let Some(pod) = &exchange.pod else { continue };
        if !pods.contains_key(&**pod) {
            pods.insert(pod.to_string(), PodShare::default());
        }
        let Some(share) = pods.get_mut(&**pod) else { continue };
        all += 1;
        share.requests += 1;
        share.prompt_tokens += prompt_tokens(exchange, plan);
        share.cached_tokens += u64::from(exchange.cached_tokens.unwrap_or(0));
    }
    pods.values_mut().for_each(|pod| pod.share = pod.requests as f64 / all as f64);
    let largest = pods.values().map(|pod| pod.share).fold(0.0, f64::max);
    // The mean of the shares of n pods is 1 ÷ n.
    let imbalance = (all > 0).then_some(largest * known.max(pods.len()) as f64);
    (pods, imbalance)
}

fn hits(exchanges: &[Exchange], plan: &Plan, options: &MeasureOptions<'_>) -> Option<Hits> {
    let found =
        || exchanges.iter().filter_map(|exchange| Some((exchange, exchange.cached_tokens?)));
    let promised = found().any(|(exchange, _)| exchange.predicted_tokens.is_some());
    let counted =
        || found().filter(|(exchange, _)| !promised || exchange.predicted_tokens.is_some());
    let mut hits = Hits {
        predicted_tokens: promised.then_some(0),
        ideal_hit_ratio: options.ideal_hit_ratio,
        regret_tokens: options.regret_tokens,
        source: options.prediction_source.to_owned(),
        ..Hits::default()
    };
    let mut distance = 0;
    let block = u64::from(options.block_size.max(1));
    for (exchange, actual) in counted() {
        let actual = u64::from(actual);
        hits.requests += 1;
        hits.actual_tokens += actual;
        hits.prompt_tokens += prompt_tokens(exchange, plan);
        let Some(predicted) = exchange.predicted_tokens.map(u64::from) else { continue };
        hits.predicted_tokens = hits.predicted_tokens.map(|sum| sum + predicted);
        distance += predicted.abs_diff(actual);
        match predicted.abs_diff(actual) {
            near if near <= block => hits.exact += 1,
            _ if predicted > actual => hits.over += 1,
            _ => hits.under += 1,
        }
    }
    if hits.requests == 0 {
        return None;
    }
    hits.mean_abs_error_tokens = promised.then(|| distance as f64 / hits.requests as f64);
    if hits.prompt_tokens > 0 {
        hits.hit_ratio = hits.actual_tokens as f64 / hits.prompt_tokens as f64;
    }
    Some(hits)
}

/// At most so many values, evenly spread.
fn thinned<T: Copy>(values: &[T], most: usize) -> Vec<T> {
    let kept = values.len().min(most);
    (0..kept).map(|at| values[at * values.len() / kept]).collect()
}

fn predictions(exchanges: &[Exchange]) -> Vec<[f64; 2]> {
    let both = exchanges.iter().filter_map(|exchange| {
        Some([f64::from(exchange.predicted_tokens?), f64::from(exchange.cached_tokens?)])
    });
    thinned(&both.collect::<Vec<_>>(), PREDICTIONS)
}

fn cdf(exchanges: &[Exchange]) -> Vec<[f64; 2]> {
    let firsts = exchanges.iter().filter_map(|e| first_token(e, |e| e.intended_ns));
    let mut values: Vec<f64> = firsts.map(|first| first.value).collect();
    values.sort_unstable_by(f64::total_cmp);
    let points = values.len().min(CDF_POINTS);
    let rank = |point: usize| (point * values.len()).div_ceil(points);
    (1..=points)
        .map(|point| [values[rank(point) - 1], rank(point) as f64 / values.len() as f64])
        .collect()
}

fn in_burst(exchange: &Exchange, plan: &Plan) -> bool {
    plan.requests.get(exchange.request as usize).is_some_and(|planned| planned.burst.is_some())
}

fn bursts(driven: &Driven, plan: &Plan) -> Option<Bursts> {
    let releases = &driven.releases;
    let size = releases.iter().map(|release| u64::from(release.requests)).max()?;
    let inside = driven.exchanges.iter().filter(|exchange| in_burst(exchange, plan));
    Some(Bursts {
        count: releases.len() as u64,
        size,
        release_ms: stats::percentiles(
            releases.iter().map(|release| release.spread_ns as f64 / MS),
        ),
        ttft_ms: stats::percentiles(inside.filter_map(|e| first_token(e, |e| e.intended_ns))),
        recovery_s: recovery(driven, plan),
    })
}

/// From each burst until the first arrival from which on five in a row have a median below twice that
/// before the first burst. A burst that is not over when the next one comes, or when the arrivals end,
/// counts until then, as a lower bound.
fn recovery(driven: &Driven, plan: &Plan) -> Percentiles {
    let between = driven.exchanges.iter().filter(|exchange| !in_burst(exchange, plan));
    let mut arrivals: Vec<(u64, f64)> = between
        .filter_map(|e| Some((e.intended_ns, first_token(e, |e| e.intended_ns)?.value)))
        .collect();
    arrivals.sort_unstable_by_key(|(at, _)| *at);
    let median = |arrivals: &[(u64, f64)]| {
        let values: Vec<f64> = arrivals.iter().map(|(_, value)| *value).collect();
        stats::median(&values)
    };
    let mut begins: Vec<u64> = driven.releases.iter().map(|burst| burst.intended_ns).collect();
    begins.sort_unstable();
    let Some(first) = begins.first() else { return Percentiles::default() };
    let before = &arrivals[..arrivals.partition_point(|(at, _)| at < first)];
    // Without a quiet time before, the middle of all arrivals has to do.
    let quiet = if before.len() >= RECOVERY_WINDOW { before } else { &arrivals };
    let Some(usual) = median(quiet) else { return Percentiles::default() };

    let ends = begins.iter().skip(1).copied().chain([u64::MAX]);
    stats::percentiles(begins.iter().zip(ends).filter_map(|(begin, end)| {
        let from = arrivals.partition_point(|(at, _)| at < begin);
        let to = arrivals.partition_point(|(at, _)| *at < end);
        let after = &arrivals[from..to];
        let over = after
            .windows(RECOVERY_WINDOW)
            .find(|window| median(window).is_some_and(|median| median < 2.0 * usual));
        let until = over.and_then(|window| window.first()).or(after.last())?;
        let value = ns_since(until.0, *begin) / S;
        Some(Observed { value, censored: over.is_none() })
    }))
}

/// The length of a slice, seconds: a round number from 0.1 on that makes at most [`SLICES`].
fn slice(duration_s: f64) -> f64 {
    let round = (-1..6).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
    round.into_iter().find(|span| duration_s / span <= SLICES as f64).unwrap_or(duration_s)
}

fn timeline(driven: &Driven, options: &MeasureOptions<'_>) -> Vec<Moment> {
    let end = driven.exchanges.iter().map(|exchange| exchange.ended_ns).max().unwrap_or(0);
    let duration_s = driven.elapsed.as_secs_f64().max(end as f64 / S);
    if duration_s <= 0.0 {
        return Vec::new();
    }
    let span_s = slice(duration_s);
    let slices = ((duration_s / span_s).ceil() as usize).clamp(1, SLICES);
    let mut moments: Vec<Moment> = (0..slices)
        .map(|at| Moment { at_s: at as f64 * span_s, span_s, ..Moment::default() })
        .collect();
    // What is outside belongs to the first or the last one.
    let place = |at_s: f64| ((at_s / span_s).max(0.0) as usize).min(slices - 1);
    let inside = |at_s: f64| (0.0..slices as f64 * span_s).contains(&at_s).then(|| place(at_s));

    let mut firsts = vec![Vec::new(); slices];
    let mut changes = Vec::with_capacity(2 * driven.exchanges.len());
    for exchange in &driven.exchanges {
        let arrival = place(exchange.intended_ns as f64 / S);
        moments[arrival].arrivals += 1;
        firsts[arrival].extend(first_token(exchange, |e| e.intended_ns));
        let ended = &mut moments[place(exchange.ended_ns as f64 / S)];
        match exchange.ended {
            Ended::Complete => ended.complete += 1,
            Ended::Failed(_) => ended.errors += 1,
            Ended::Incomplete => {}
        }
        changes.extend([(exchange.sent_ns, 1), (exchange.ended_ns, -1)]);
    }
    for (moment, firsts) in moments.iter_mut().zip(firsts) {
        let described = stats::percentiles(firsts);
        (moment.ttft_p50_ms, moment.ttft_p95_ms) = (described.p50, described.p95);
    }
    in_flight(&mut moments, changes, place);

    for release in &driven.releases {
        moments[place(release.intended_ns as f64 / S)].burst = true;
    }
    let offset_s = options.origin.map_or(0.0, |origin| seconds(origin, driven.started));
    for [begin, _] in options.event_bursts {
        if let Some(at) = inside(begin + offset_s) {
            moments[at].event_burst = true;
        }
    }
    for [at_s, us] in options.probes {
        if let Some(at) = inside(at_s + offset_s) {
            let largest = &mut moments[at].freshness_max_us;
            *largest = Some(largest.unwrap_or(0.0).max(*us));
        }
    }
    for [at_s, batches] in options.backlog {
        if let Some(at) = inside(at_s + offset_s) {
            let largest = &mut moments[at].backlog_batches;
            *largest = Some(largest.unwrap_or(0).max(*batches as u64));
        }
    }
    let sampled = options.resources.and_then(|sampled| Some((sampled, sampled.started?)));
    if let Some((sampled, started)) = sampled {
        let offset_s = seconds(started, driven.started);
        for (name, series) in &sampled.series {
            for moment in &mut moments {
                let from = moment.at_s - offset_s;
                costs(moment, name, series, from);
            }
        }
    }
    moments
}

/// `instant` in seconds from `origin`; negative if it was before.
fn seconds(instant: Instant, origin: Instant) -> f64 {
    instant.saturating_duration_since(origin).as_secs_f64()
        - origin.saturating_duration_since(instant).as_secs_f64()
}

fn in_flight(moments: &mut [Moment], mut changes: Vec<(u64, i64)>, place: impl Fn(f64) -> usize) {
    // Of a begin and an end at the same time the end is first.
    changes.sort_unstable();
    let (mut now, mut reached) = (0i64, 0);
    for (at, change) in changes {
        let here = place(at as f64 / S);
        // What is in flight at the begin of a slice is in flight in it.
        for moment in &mut moments[reached..=here] {
            moment.in_flight = moment.in_flight.max(now.max(0) as u64);
        }
        now += change;
        reached = here;
        moments[here].in_flight = moments[here].in_flight.max(now.max(0) as u64);
    }
}

/// Cores and memory of a component in the slice that begins `from` seconds after the sampling did. Samples
/// and slices do not begin together, so CPU is interpolated.
fn costs(moment: &mut Moment, name: &str, series: &[Sample], from: f64) {
    let to = from + moment.span_s;
    let Some((first, last)) = series.first().zip(series.last()) else { return };
    let (low, high) = (from.max(first.at.as_secs_f64()), to.min(last.at.as_secs_f64()));
    if high <= low {
        return;
    }
    let cpu_at = |at: f64| {
        let next = series.partition_point(|sample| sample.at.as_secs_f64() < at);
        let after = series.get(next).unwrap_or(last);
        let before = series.get(next.saturating_sub(1)).unwrap_or(first);
        let (x0, x1) = (before.at.as_secs_f64(), after.at.as_secs_f64());
        let (y0, y1) = (before.cpu.as_secs_f64(), after.cpu.as_secs_f64());
        if x1 > x0 { y0 + (y1 - y0) * (at - x0) / (x1 - x0) } else { y0 }
    };
    moment.cores.insert(name.to_owned(), (cpu_at(high) - cpu_at(low)) / (high - low));
    let begin = series.partition_point(|sample| sample.at.as_secs_f64() < low);
    let end = series.partition_point(|sample| sample.at.as_secs_f64() <= high);
    // A slice that is shorter than the time between samples has the memory of the sample before.
    let rss = series[begin.saturating_sub(1)..end].iter().map(|sample| sample.rss).max();
    moment.rss_bytes.insert(name.to_owned(), rss.unwrap_or(0));
}

/// Sets `valid` and `warnings`.
fn judge(
    scenario: &mut Scenario,
    driven: &Driven,
    plan: &Plan,
    options: &MeasureOptions<'_>,
    clocks_apart_s: f64,
) {
    let mut faults = Vec::new();
    let mut doubts = Vec::new();
    let complete = scenario.requests - scenario.errors - scenario.incomplete;
    if scenario.requests == 0 {
        faults.push("nothing was sent: give the run more time or a plan with requests".to_owned());
    } else if complete == 0 {
        faults.push(
            "no request completed, so nothing was measured: look at errors_by_label, and at the target"
                .to_owned(),
        );
    }
    match options.pacing {
        Some(Pacing::Closed { concurrency }) => {
            let asked = concurrency.min(scenario.requests as usize) as f64;
            let mean = scenario.in_flight.mean;
            if concurrency > 1 && !driven.in_flight.is_empty() && mean < FILLED * asked {
                faults.push(format!(
                    "{mean:.1} requests were in flight on average, {asked} were asked for: the load \
                     driver could not keep them open; give it more threads or a longer run, or ask for \
                     fewer"
                ));
            }
        }
        Some(Pacing::Open) | None => {
            let (share, planned) = achieved(driven, plan);
            if planned > 0 && share < ACHIEVED {
                faults.push(format!(
                    "only {:.1} % of the planned rate was sent: ask for a lower rate, or give the load \
                     driver more threads or a core of its own",
                    share * 100.0
                ));
            }
        }
    }
    let delay = scenario.dispatch_delay_ms.p99.unwrap_or(0.0);
    let allowed = DISPATCH_MS.max(DISPATCH_SHARE * scenario.ttft_ms.p50.unwrap_or(0.0));
    if delay > allowed {
        faults.push(format!(
            "requests were sent late: dispatch delay p99 {delay:.2} ms, at most {allowed:.2} ms is \
             allowed; ask for a lower rate, or give the load driver more threads or a core of its own"
        ));
    }
    own_cpu(scenario, driven, options, &mut faults, &mut doubts);
    let late = driven.releases.iter().filter(|burst| burst.spread_ns >= RELEASE_NS);
    if let Some(worst) = late.clone().map(|burst| burst.spread_ns).max() {
        faults.push(format!(
            "{} of {} bursts took longer than 1 ms to release, the slowest {:.2} ms: make bursts \
             smaller, or give the load driver more threads or a core of its own",
            late.count(),
            driven.releases.len(),
            worst as f64 / MS
        ));
    }
    let allowed = CLOCK_S + CLOCK_SHARE * driven.started.elapsed().as_secs_f64();
    if clocks_apart_s.abs() > allowed {
        faults.push(format!(
            "wall clock and monotonic clock parted by {:.1} ms during the run: wait until the clock of \
             the machine is set, and repeat",
            clocks_apart_s * 1e3
        ));
    }
    doubts.extend(environment::busy(options.load_before, options.cores));
    if scenario.errors > 0 {
        doubts.push(format!(
            "{} of {} requests failed; compare latencies at equal success only",
            scenario.errors, scenario.requests
        ));
    }
    if let Some(sampled) = options.resources {
        doubts.extend(sampled.warnings.iter().cloned());
    }
    scenario.valid = faults.is_empty();
    scenario.warnings = faults;
    scenario.warnings.append(&mut doubts);
}

/// The share of the planned rate that was sent, and how many requests had a time. It falls both when
/// requests that were due were not sent and when the last one was sent late.
fn achieved(driven: &Driven, plan: &Plan) -> (f64, usize) {
    let at = |planned: &Planned| planned.at.filter(|_| planned.after.is_none());
    let due = |planned: &&Planned| at(planned).is_some_and(|at| at <= driven.sending);
    let due = plan.requests.iter().filter(due).count();
    let sent = driven
        .exchanges
        .iter()
        .filter(|exchange| plan.requests.get(exchange.request as usize).and_then(at).is_some());
    let (mut count, mut last_at, mut last_sent) = (0, 0, 0);
    for exchange in sent {
        count += 1;
        last_at = last_at.max(exchange.intended_ns);
        last_sent = last_sent.max(exchange.sent_ns);
    }
    if due == 0 || count == 0 {
        return (1.0, due);
    }
    let late_s = (ns_since(last_sent, last_at) / S - LAST_SEND_SLACK_S).max(0.0);
    let in_time = 1.0 - late_s / (last_sent as f64 / S).max(f64::MIN_POSITIVE);
    ((count as f64 / due as f64).min(in_time), due)
}

fn own_cpu(
    scenario: &Scenario,
    driven: &Driven,
    options: &MeasureOptions<'_>,
    faults: &mut Vec<String>,
    doubts: &mut Vec<String>,
) {
    let sending_s = driven.sending.as_secs_f64();
    let threads = options.threads.max(1) as f64;
    if sending_s > 0.0 {
        // Threads that outnumber the cores cannot use more than those.
        let may = if options.cores > 0.0 { threads.min(options.cores) } else { threads };
        let share = driven.cpu.as_secs_f64() / (sending_s * may);
        if share > OWN_CPU {
            faults.push(format!(
                "the threads that send used {:.0} % of their cores, {:.0} % is the limit: their delay is \
                 in the numbers; ask for less, or give the load driver more threads",
                share * 100.0,
                OWN_CPU * 100.0
            ));
        }
    }
    if options.cores <= 0.0 {
        return;
    }
    let own = scenario.resources.get("loadgen").map_or(0.0, |used| used.cores);
    if own > OWN_CPU * options.cores {
        faults.push(format!(
            "the load driver used {own:.2} of {:.1} cores: ask for less, or give it a larger machine",
            options.cores
        ));
    }
    let all: f64 = scenario.resources.values().map(|used| used.cores).sum();
    if all > ALL_CPU * options.cores {
        doubts.push(format!(
            "all components together used {all:.2} of {:.1} cores: what is measured is this machine's \
             limit",
            options.cores
        ));
    }
}

#[cfg(test)]
mod tests;
