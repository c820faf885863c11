//! One policy, once: fresh stack, first probe, warm-up, levels.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Common, Load, Spec, WarmUp};
use crate::loadgen::{
    drive::{self, Drive, Driven, Ended, Exchange, Pacing, Target},
    environment,
    freshness::{self, WatchOptions, Watched},
    measure::{self, MeasureOptions},
    progress::{self, Display, Progress},
    report::Scenario,
    resources::{Component, Sampler, Watched as Source},
    stack::{EngineAddress, Policy, Predictions, Stack, StackOptions},
    workload::{
        Arrival, Plan, Planned,
        arrivals::{DISPERSION_WINDOWS, dispersion},
        hits,
    },
};

/// How often components are sampled.
const SAMPLE: Duration = Duration::from_millis(100);
/// How many requests of the warm-up are in flight, by pod.
const WARM_PER_POD: usize = 2;
/// Tokens of its answers at most: what warms a cache is the prompt. More than one, since groups are spread by
/// what endpoint pickers see of the load.
const WARM_TOKENS: u32 = 8;
/// The model that probes of freshness are stored for; no request names it.
const PROBE_MODEL: &str = "loadgen-probe";
/// How long the last probes, and what a storm left behind, may take.
const WATCH_ENDS: Duration = Duration::from_secs(30);
/// Requests of a closed loop that are planned for each place and second, and for each second: more than
/// any server answers.
const PER_PLACE_AND_SECOND: f64 = 10_000.0;
const PER_SECOND: f64 = 20_000.0;
/// Requests of a level that are planned at most: they take some 200 bytes each.
const MOST_PLANNED: usize = 150_000;

/// One policy, once.
#[derive(Clone, Copy, Debug)]
pub struct Arm<'a> {
    /// What is run.
    pub spec: &'a Spec,
    /// Who routes.
    pub policy: &'a Policy,
    /// Which repeat, from 0.
    pub repeat: u32,
    /// Which arm of how many, from 1.
    pub place: (usize, usize),
}

/// Where an arm's requests go, and what belongs to it.
struct Ground {
    stack: Option<Stack>,
    target: Target,
    indexer: Option<SocketAddr>,
    indexer_pid: Option<u32>,
    engines: Vec<EngineAddress>,
    components: Vec<Component>,
}

impl Ground {
    async fn start(arm: &Arm<'_>, common: &Common) -> Result<Self> {
        let Arm { spec, policy, .. } = *arm;
        let ourselves = Component {
            name: "loadgen".to_owned(),
            sources: vec![Source::Pid(std::process::id())],
        };
        if let Some(there) = &common.elsewhere {
            let mut components = there.components.clone();
            components.push(ourselves);
            return Ok(Self {
                stack: None,
                target: Target::Gateway(there.url.clone()),
                indexer: there.indexer,
                indexer_pid: None,
                engines: Vec::new(),
                components,
            });
        }
        let options = StackOptions {
            fleet: common.fleet.clone(),
            policy: policy.clone(),
            envoy: common.envoy.clone(),
            want_hits: true,
            indexer: spec.storm.is_some() && *policy == Policy::Precise,
        };
        let stack = Stack::start_with(options, &common.launch).await?;
        let mut components = stack.components();
        components.push(ourselves);
        Ok(Self {
            target: stack.target(),
            indexer: stack.indexer(),
            indexer_pid: stack.indexer_pid(),
            engines: stack.engines().to_vec(),
            components,
            stack: Some(stack),
        })
    }
}

/// Runs all levels of a scenario with one policy.
///
/// # Errors
///
/// What cannot be started or reached, and a stack that was not empty at its start.
pub async fn run(
    arm: &Arm<'_>,
    common: &Common,
    cancel: &CancellationToken,
) -> Result<Vec<Scenario>> {
    let mut ground = Ground::start(arm, common).await?;
    let outcome = levels(arm, common, cancel, &mut ground).await;
    if let Some(stack) = ground.stack.take() {
        stack.stop().await;
    }
    outcome
}

async fn levels(
    arm: &Arm<'_>,
    common: &Common,
    cancel: &CancellationToken,
    ground: &mut Ground,
) -> Result<Vec<Scenario>> {
    let spec = arm.spec;
    let seed = common.seed.wrapping_add(u64::from(arm.repeat));
    let progress = Arc::new(Progress::default());
    let display = Display::start(Arc::clone(&progress), common.display);
    let mut driver = Driver { arm, common, ground, progress: &progress, cancel, seed };
    warm_up(&driver).await?;
    let mut scenarios = Vec::new();
    for level in planned(spec, seed) {
        if cancel.is_cancelled() {
            break;
        }
        let mut scenario = driver.level(&level).await?;
        if let Some(fault) = driver.fault() {
            scenario.warnings.push(fault);
            scenario.valid = false;
        }
        scenarios.push(scenario);
    }
    display.finish();
    Ok(scenarios)
}

/// One level: what is sent, and how.
struct Level {
    plan: Plan,
    pacing: Pacing,
    /// As in the report.
    level: Option<f64>,
    asked_rps: Option<f64>,
    duration: Option<Duration>,
    /// Over which arrivals are looked at.
    window: Duration,
}

/// All levels, each made when it is taken. Their requests go on where those of the level before ended, so
/// that what is meant to be new is new.
fn planned(spec: &Spec, seed: u64) -> Box<dyn Iterator<Item = Level> + Send + '_> {
    let mut begun = 0;
    let mut take = move |count: usize| {
        let from = begun;
        begun += count as u64;
        spec.workload.as_ref().map_or_else(Vec::new, |it| it.requests_from(seed, from, count))
    };
    let most = spec.requests.unwrap_or(usize::MAX);
    match &spec.load {
        Load::Concurrency(levels) => Box::new(levels.iter().map(move |&concurrency| {
            let per_second = (PER_PLACE_AND_SECOND * concurrency as f64).min(PER_SECOND);
            let wanted = (per_second * spec.duration.as_secs_f64()) as usize;
            let count = wanted.clamp(concurrency, MOST_PLANNED).min(most);
            Level {
                plan: Plan::closed(take(count)),
                pacing: Pacing::Closed { concurrency },
                level: Some(concurrency as f64),
                asked_rps: None,
                duration: Some(spec.duration),
                window: spec.duration,
            }
        })),
        Load::Arrivals(levels) => Box::new(levels.iter().enumerate().map(move |(at, level)| {
            let (arrivals, lasts) = level;
            let mut times =
                arrivals.times(seed.wrapping_mul(1_000_003).wrapping_add(at as u64), *lasts);
            times.truncate(most);
            let plan = Plan::open(take(times.len()), &times);
            let level = (levels.len() > 1).then_some(arrivals.rate());
            let asked_rps = Some(times.len() as f64 / lasts.as_secs_f64());
            let pacing = Pacing::Open;
            Level { plan, pacing, level, asked_rps, duration: None, window: *lasts }
        })),
        Load::Recorded { requests, .. } => {
            let plan = Plan { requests: requests.iter().take(most).cloned().collect() };
            Box::new(std::iter::once(Level {
                plan,
                pacing: Pacing::Open,
                level: None,
                asked_rps: None,
                duration: None,
                window: spec.duration,
            }))
        }
    }
}

/// Sends the first request alone and looks whether anything was there already, then everything that
/// stays.
async fn warm_up(driver: &Driver<'_>) -> Result<()> {
    let (spec, seed) = (driver.arm.spec, driver.seed);
    let ours = driver.ground.stack.is_some();
    if !ours && spec.warm_up == WarmUp::Cold {
        return Ok(());
    }
    let mut residents = match &spec.load {
        Load::Recorded { requests, .. } => requests.iter().take(1).cloned().collect(),
        _ => spec.workload.as_ref().map_or_else(Vec::new, |it| it.residents(seed)),
    };
    if residents.is_empty() {
        // Its seed is one that no level has.
        residents = spec.workload.as_ref().map_or_else(Vec::new, |it| it.requests(!seed, 1));
    }
    for request in &mut residents {
        (request.at, request.after, request.burst) = (None, None, None);
        request.max_tokens = request.max_tokens.min(WARM_TOKENS);
    }
    let rest = residents.split_off(1.min(residents.len()));
    driver.begin("first probe", None);
    let first =
        driver.send(Plan::closed(residents), Pacing::Closed { concurrency: 1 }, None).await?;
    if let [probe] = first.exchanges.as_slice() {
        // What somebody else's servers answer is for the report to say.
        if let (Ended::Failed(failure), true) = (&probe.ended, ours) {
            bail!("the first request failed: {}", failure.label());
        }
        let found = probe.cached_tokens.unwrap_or(0).max(probe.predicted_tokens.unwrap_or(0));
        if found > 0 && ours {
            bail!("the first request already found {found} tokens: the stack was not empty");
        }
    }
    let (plan, pacing) = match &spec.warm_up {
        WarmUp::Cold => return Ok(()),
        WarmUp::Residents => {
            let pods = driver.ground.engines.len().max(1);
            let concurrency = (WARM_PER_POD * pods).min(rest.len());
            (Plan::closed(rest), Pacing::Closed { concurrency })
        }
        WarmUp::Level(arrivals, lasts) => {
            let times = arrivals.times(!seed, *lasts);
            let requests = spec.workload.as_ref().map(|it| it.requests(seed, times.len()));
            (Plan::open(requests.unwrap_or_default(), &times), Pacing::Open)
        }
    };
    if !plan.requests.is_empty() {
        driver.begin("warm-up", None);
        let warmed = driver.send(plan, pacing, None).await?;
        let failed = warmed.exchanges.iter().find_map(|exchange| match &exchange.ended {
            Ended::Failed(failure) => Some(failure.label()),
            _ => None,
        });
        if let (Some(failed), true) = (failed, ours) {
            bail!("a request of the warm-up failed: {failed}");
        }
    }
    Ok(())
}

/// What it takes to send.
struct Driver<'a> {
    arm: &'a Arm<'a>,
    common: &'a Common,
    ground: &'a mut Ground,
    progress: &'a Arc<Progress>,
    cancel: &'a CancellationToken,
    seed: u64,
}

impl Driver<'_> {
    /// Tells whoever watches what is done from now on.
    fn begin(&self, phase: &str, asked_rps: Option<f64>) {
        let (number, of) = self.arm.place;
        self.progress.begin(progress::Arm {
            scenario: format!("{} {phase}", self.arm.spec.name).trim_end().to_owned(),
            policy: self.policy_name(),
            number: u32::try_from(number).unwrap_or(u32::MAX),
            of: u32::try_from(of).unwrap_or(u32::MAX),
            asked_rps,
            takes: None,
        });
    }

    async fn send(&self, plan: Plan, pacing: Pacing, duration: Option<Duration>) -> Result<Driven> {
        let common = self.common;
        let drive = Drive {
            plan,
            target: self.ground.target.clone(),
            pacing,
            http: common.http.clone(),
            model: common.model.clone(),
            form: common.form,
            duration,
            grace: common.grace,
            timeout: common.timeout,
            threads: common.threads,
            progress: Arc::clone(self.progress),
            cancel: self.cancel.clone(),
        };
        tokio::task::spawn_blocking(move || drive::run(&drive)).await.context("sending panicked")?
    }

    /// A process of ours that ended by itself.
    fn fault(&mut self) -> Option<String> {
        self.ground.stack.as_mut()?.fault()
    }

    async fn level(&self, level: &Level) -> Result<Scenario> {
        let Arm { spec, repeat, .. } = *self.arm;
        self.begin(&level.level.map_or_else(String::new, |at| format!("at {at}")), level.asked_rps);
        let before = self.predictions().await;
        let watching = self.watch(spec);
        let shown = Some(Arc::clone(self.progress));
        let sampler = Sampler::start_showing(self.ground.components.clone(), SAMPLE, shown)?;
        let driven = self.send(level.plan.clone(), level.pacing, level.duration).await;
        let sampled = sampler.finish();
        let watched = match watching {
            Some(watching) => Some(watching.finish().await),
            None => None,
        };
        let driven = driven?;
        let after = self.predictions().await;
        let mut doubts = Vec::new();
        let watched = watched.and_then(|(origin, watched)| match watched {
            Ok(watched) => Some(seen_from(watched, origin, driven.started)),
            Err(error) => {
                doubts.push(format!("freshness was not measured: {error:#}"));
                None
            }
        });
        let (policy, gateway) = (self.policy_name(), self.gateway());
        let arrivals: Vec<Arrival> = level.plan.requests.iter().filter_map(arrival).collect();
        let dispersion = DISPERSION_WINDOWS
            .iter()
            .filter_map(|&window| {
                let index = dispersion(&arrivals, level.window, window)?;
                Some((window.as_secs_f64().to_string(), index))
            })
            .collect();
        // What was planned and not sent could not be reused either.
        let planned = |exchange: &Exchange| level.plan.requests.get(exchange.request as usize);
        let sent = driven.exchanges.iter().filter_map(planned);
        let ideal = hits::ideal_hits(sent, self.common.fleet.block_size);
        let options = MeasureOptions {
            name: &spec.name,
            policy: &policy,
            repeat,
            level: level.level,
            workload: spec.described(),
            seed: self.seed,
            asked_rps: level.asked_rps,
            block_size: u32::try_from(self.common.fleet.block_size).unwrap_or(u32::MAX),
            pacing: Some(level.pacing),
            threads: self.common.threads,
            cores: environment::cores(),
            pods: self.ground.engines.len(),
            gateway: &gateway,
            dispersion,
            prediction_source: "each answer",
            objectives: self.common.objectives,
            resources: Some(&sampled),
            probes: watched.as_ref().map_or(&[], |it| it.probes.as_slice()),
            backlog: watched.as_ref().map_or(&[], |it| it.backlog.as_slice()),
            event_bursts: watched.as_ref().map_or(&[], |it| it.event_bursts.as_slice()),
            ideal_hit_ratio: Some(ideal.ratio()),
            ..MeasureOptions::default()
        };
        let mut scenario = measure::scenario(&driven, &level.plan, &options);
        if let (Some(before), Some(after)) = (before, after) {
            add_predictions(&mut scenario, &before, &after);
        }
        if let Some(watched) = watched {
            scenario.freshness_us = Some(watched.freshness);
            scenario.storm = watched.storm;
            doubts.extend(watched.warnings);
        }
        if let (Pacing::Closed { .. }, Some(duration)) = (level.pacing, level.duration)
            && spec.requests.is_none()
            && driven.unsent == 0
            && driven.sending < duration.mul_f64(0.9)
        {
            doubts.push(format!(
                "all {} planned requests were sent before the time was over",
                level.plan.requests.len()
            ));
        }
        scenario.valid &= doubts.is_empty();
        scenario.warnings.extend(doubts);
        Ok(scenario)
    }

    /// What the endpoint picker counts of its own predictions.
    async fn predictions(&self) -> Option<Predictions> {
        self.ground.stack.as_ref()?.scrape_predictions().await.ok().flatten()
    }

    /// Our endpoint picker, if it routes by the index.
    fn picker_that_asks(&self) -> Option<SocketAddr> {
        let precise = *self.arm.policy == Policy::Precise;
        self.ground.stack.as_ref().filter(|_| precise)?.ext_proc()
    }

    fn policy_name(&self) -> String {
        match self.common.elsewhere {
            Some(_) => "gateway".to_owned(),
            None => self.arm.policy.to_string(),
        }
    }

    fn gateway(&self) -> String {
        match (&self.common.elsewhere, &self.common.envoy) {
            (Some(there), _) => there.url.clone(),
            (None, Some(envoy)) => format!("Envoy ({})", envoy.display()),
            (None, None) => "no gateway in this run".to_owned(),
        }
    }

    /// Asks the index how late it is until the returned is finished.
    fn watch(&self, spec: &Spec) -> Option<Watching> {
        let indexer = self.ground.indexer.filter(|_| spec.freshness)?;
        let options = WatchOptions {
            indexer,
            indexer_pid: self.ground.indexer_pid,
            model: PROBE_MODEL.to_owned(),
            probes_per_s: self.common.probes_per_s,
            condition: if self.common.delayed { "delayed" } else { "steady" }.to_owned(),
            engines: self.ground.engines.clone(),
            picker: self.picker_that_asks(),
            storm: spec.storm.clone(),
            progress: Some(Arc::clone(self.progress)),
            delayed: self.common.delayed,
        };
        let (origin, stop) = (Instant::now(), CancellationToken::new());
        let mut task = JoinSet::new();
        task.spawn(freshness::watch(options, origin, stop.clone()));
        Some(Watching { origin, stop, task })
    }
}

/// A measurement of freshness that is under way.
struct Watching {
    origin: Instant,
    stop: CancellationToken,
    task: JoinSet<Result<Watched>>,
}

impl Watching {
    async fn finish(mut self) -> (Instant, Result<Watched>) {
        self.stop.cancel();
        let ended = tokio::time::timeout(WATCH_ENDS, self.task.join_next()).await;
        let watched = match ended {
            Ok(Some(Ok(watched))) => watched,
            Ok(_) => Err(anyhow::anyhow!("it panicked")),
            Err(_) => Err(anyhow::anyhow!("it did not end in {} s", WATCH_ENDS.as_secs())),
        };
        (self.origin, watched)
    }
}

/// When a request of an open loop is meant to come.
fn arrival(request: &Planned) -> Option<Arrival> {
    request.at.map(|at| Arrival { at, burst: request.burst })
}

/// The same with times from the first request's.
fn seen_from(mut watched: Watched, origin: Instant, started: Instant) -> Watched {
    let shift = started.saturating_duration_since(origin).as_secs_f64();
    for at in watched.probes.iter_mut().chain(&mut watched.backlog) {
        at[0] -= shift;
    }
    for [begin, end] in &mut watched.event_bursts {
        (*begin, *end) = (*begin - shift, *end - shift);
    }
    watched
}

/// Adds what the endpoint picker counted between the two: its regret, and its promises where they do
/// not come with each answer.
fn add_predictions(scenario: &mut Scenario, before: &Predictions, after: &Predictions) {
    let compared = after.compared().saturating_sub(before.compared());
    let Some(hits) = scenario.hits.as_mut().filter(|_| compared > 0) else { return };
    let tokens = |before: f64, after: f64| (after - before).max(0.0).round() as u64;
    hits.regret_tokens = Some(tokens(before.regret_tokens, after.regret_tokens));
    if hits.predicted_tokens.is_some() {
        return;
    }
    hits.predicted_tokens = Some(tokens(before.predicted_tokens, after.predicted_tokens));
    let difference = after.difference_tokens - before.difference_tokens;
    hits.mean_abs_error_tokens = Some(difference.max(0.0) / compared as f64);
    hits.over = after.over.saturating_sub(before.over);
    hits.under = after.under.saturating_sub(before.under);
    hits.exact = after.exact.saturating_sub(before.exact);
    hits.source = "the endpoint picker's metrics".to_owned();
}
