//! The fleet, the network before it and the indexer; what happens to them, and how they come to rest.

use std::{
    collections::HashMap,
    io::Write as _,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kv_indexer::{
    proto::kvindexer::{PodState, PodStatus, RegisterPodRequest},
    wire::encode::Form,
};
use tokio::runtime::Runtime;

use crate::{
    Settings,
    engine::{Engine, Options, Truth},
    indexer::{Client, Indexer, PATIENCE},
    judge::{self, Mismatch},
    proxy::{Link, Mode},
    stats::Stats,
    universe::{ENGINE_BLOCKS, INDEX_BLOCK, Universe},
};

/// Prompts of one call.
const PROMPTS_A_CALL: usize = 64;
/// Steps of an engine between the last fault and the judgement: so many times so many.
const CLEAN_ROUNDS: usize = 4;
const CLEAN_STEPS: usize = 8;
/// How long a fence may take until another one is sent.
const FENCE: Duration = Duration::from_millis(400);
/// Mismatches that are printed.
const PRINTED: usize = 20;

type Truths = Arc<RwLock<HashMap<String, Arc<Mutex<Truth>>>>>;

/// A pod: an engine, and the network before it.
struct Pod {
    name: String,
    kind: usize,
    incarnation: u64,
    truth: Arc<Mutex<Truth>>,
    engine: Arc<Mutex<Engine>>,
    gone: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    events: Arc<Link>,
    replay: Option<Arc<Link>>,
    /// When its network becomes whole again.
    mended_at: Option<Instant>,
}

impl Pod {
    fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        std::iter::once(&self.events).chain(&self.replay)
    }

    fn aim(&self) {
        let (events, replay) = self.engine.lock().unwrap().addresses();
        self.events.aim(events);
        if let (Some(link), Some(at)) = (&self.replay, replay) {
            link.aim(at);
        }
    }

    fn mend(&mut self) {
        self.mended_at = None;
        self.engine.lock().unwrap().mute = false;
        self.links().for_each(|link| link.set(Mode::Pass));
    }

    fn request(&self) -> RegisterPodRequest {
        RegisterPodRequest {
            pod: self.name.clone(),
            endpoint: format!("tcp://{}", self.events.address()),
            replay_endpoint: self
                .replay
                .as_ref()
                .map(|link| format!("tcp://{}", link.address()))
                .unwrap_or_default(),
            model: "m".to_owned(),
            dp_rank: Some(0),
            ..RegisterPodRequest::default()
        }
    }

    fn run(&mut self) {
        let (engine, gone) = (Arc::clone(&self.engine), Arc::clone(&self.gone));
        self.thread = Some(thread::spawn(move || {
            while !gone.load(Ordering::Relaxed) {
                let pace = {
                    let mut engine = engine.lock().unwrap();
                    engine.answer();
                    if engine.works {
                        engine.step();
                    }
                    engine.options().pace
                };
                thread::sleep(pace);
            }
        }));
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the thread of {} failed", self.name);
        }
    }
}

/// What judgements at rest found so far.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) live: u64,
    pub(crate) partial: u64,
    pub(crate) degraded: u64,
    pub(crate) mismatches: u64,
    pub(crate) self_tested: bool,
}

/// See the module's page.
pub(crate) struct World {
    settings: Settings,
    random: fastrand::Rng,
    runtime: Runtime,
    universe: Arc<Universe>,
    pub(crate) stats: Arc<Stats>,
    truths: Truths,
    pods: Vec<Pod>,
    incarnations: u64,
    pub(crate) indexer: Indexer,
    client: Client,
    config: tempfile::NamedTempFile,
    /// Of snapshots. Deleted with the value.
    directory: tempfile::TempDir,
    began: Instant,
    pub(crate) found: Found,
    watcher: Watcher,
}

impl World {
    pub(crate) fn start(settings: Settings) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut settings = settings;
        let mut config = yaml_file(&configuration(&settings, directory.path()));
        if settings.snapshots && !Indexer::accepts(config.path()) {
            settings.snapshots = false;
            config = yaml_file(&configuration(&settings, directory.path()));
        }
        println!("snapshots: {}", if settings.snapshots { "yes" } else { "no" });
        let indexer = Indexer::start(config.path());
        let client = runtime.block_on(async { Client::new(indexer.grpc) });
        let universe = Arc::new(Universe::new(settings.seed));
        let truths = Truths::default();
        let watcher = Watcher::start(&settings, &universe, &truths, client.clone(), &runtime);
        let mut world = Self {
            random: fastrand::Rng::with_seed(settings.seed),
            settings,
            runtime,
            universe,
            stats: Arc::default(),
            truths,
            pods: Vec::new(),
            incarnations: 0,
            indexer,
            client,
            config,
            directory,
            began: Instant::now(),
            found: Found::default(),
            watcher,
        };
        for number in 0..world.settings.pods {
            let pod = world.engine(number, format!("p{number}"), None);
            world.pods.push(pod);
            world.register(number);
        }
        world
    }

    /// An engine and, unless there are, the addresses before it.
    fn engine(
        &mut self,
        kind: usize,
        name: String,
        links: Option<(Arc<Link>, Option<Arc<Link>>)>,
    ) -> Pod {
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let truth = Arc::clone(self.truths.write().unwrap().entry(name.clone()).or_default());
        let options = options(kind, self.settings.pace);
        let seed = self.random.u64(..);
        let owner = (Arc::clone(&truth), incarnation);
        let engine = Engine::start(options, &name, &self.universe, &self.stats, owner, seed);
        let (events_at, replay_at) = engine.addresses();
        let runtime = self.runtime.handle();
        let (events, replay) = match links {
            // The address is used again.
            Some((events, replay)) => (events, replay),
            None => {
                let start = |at| Arc::new(Link::start(at, runtime));
                (start(events_at), replay_at.map(start))
            }
        };
        let engine = Arc::new(Mutex::new(engine));
        let gone = Arc::default();
        let mut pod = Pod {
            name,
            kind,
            incarnation,
            truth,
            engine,
            gone,
            thread: None,
            events,
            replay,
            mended_at: None,
        };
        pod.aim();
        pod.run();
        pod
    }

    /// A call that may take a few attempts, since the indexer may be starting.
    #[track_caller]
    fn insist<T, F: Future<Output = Result<T, tonic::Status>>>(
        &self,
        what: &str,
        call: impl Fn(Client) -> F,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.runtime.block_on(call(self.client.clone())) {
                Ok(answer) => return answer,
                Err(status) if Instant::now() >= deadline => {
                    panic!("{what}: {status}\n{}", self.indexer.last_words())
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn register(&self, at: usize) {
        let request = self.pods[at].request();
        self.insist("RegisterPod", |mut client| {
            let request = request.clone();
            async move { client.register(request).await }
        });
    }

    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Everything happens, for this long.
    pub(crate) fn rage(&mut self, time: Duration) {
        for pod in &self.pods {
            let mut engine = pod.engine.lock().unwrap();
            engine.works = true;
            engine.faulty = true;
        }
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.indexer.still_runs();
            self.watcher.still_runs();
            let now = Instant::now();
            for pod in &mut self.pods {
                if pod.mended_at.is_some_and(|at| at <= now) {
                    pod.mend();
                }
            }
            self.disturb();
            thread::sleep(Duration::from_millis(self.random.u64(2..40)));
        }
    }

    /// One thing goes wrong.
    fn disturb(&mut self) {
        let at = self.random.usize(..self.pods.len());
        match self.random.u32(..1000) {
            0..=299 => self.disturb_network(at),
            300..=349 => self.restart_engine(at, false),
            350..=389 => self.restart_engine(at, true),
            390..=419 => {
                self.stats.fault("restarted in place");
                self.pods[at].engine.lock().unwrap().restart_in_place();
            }
            420..=469 => {
                self.pods[at].engine.lock().unwrap().mute = true;
                let until = Instant::now() + Duration::from_millis(self.random.u64(50..1_500));
                self.pods[at].mended_at.get_or_insert(until);
            }
            470..=499 => self.replace_pod(at),
            500..=519 => {
                self.stats.fault("indexer stopped");
                self.indexer.stop();
                thread::sleep(Duration::from_millis(self.random.u64(20..700)));
                self.indexer.go_on();
            }
            520..=529 => self.kill_indexer(),
            530..=559 => {
                self.stats.fault("burst");
                let end = Instant::now() + Duration::from_millis(150);
                let mut engine = self.pods[at].engine.lock().unwrap();
                for _ in 0..10_000 {
                    if Instant::now() >= end {
                        break;
                    }
                    engine.step();
                }
            }
            _ => {}
        }
    }

    fn disturb_network(&mut self, at: usize) {
        let random = &mut self.random;
        let (kind, mode) = match random.u8(..7) {
            0 => ("cut", None),
            1 => ("half-open", Some(Mode::HalfOpen)),
            2 => ("late", Some(Mode::Late(Duration::from_millis(random.u64(1..60))))),
            3 => ("stalled", Some(Mode::Stalled)),
            4 => ("refused", Some(Mode::Refusing)),
            5 => ("truncated", Some(Mode::Truncating(random.usize(..6_000)))),
            _ => ("stalled and cut", Some(Mode::Stalled)),
        };
        self.stats.fault(kind);
        let until = Instant::now() + Duration::from_millis(random.u64(10..1_200));
        let which = random.u8(..4);
        let pod = &mut self.pods[at];
        let hit = |link: &Arc<Link>| {
            match mode {
                Some(mode) => link.set(mode),
                None => link.cut(),
            }
            if kind == "stalled and cut" {
                link.cut();
            }
        };
        if which != 0 {
            hit(&pod.events);
        }
        if let Some(replay) = pod.replay.as_ref().filter(|_| which < 2) {
            hit(replay);
        }
        if mode.is_some() {
            pod.mended_at.get_or_insert(until);
        }
    }

    /// A new life, at once at its next sequences: 0, or beyond those that the old one had.
    fn restart_engine(&mut self, at: usize, overtaking: bool) {
        let pod = &self.pods[at];
        let mut engine = pod.engine.lock().unwrap();
        let before = engine.next();
        if overtaking && before > 3_000 {
            return;
        }
        self.stats.fault(if overtaking { "restarted, overtaking" } else { "restarted" });
        if overtaking {
            // Nobody hears of the first messages.
            pod.events.set(Mode::Refusing);
        }
        engine.restart();
        if overtaking {
            // Without replay nothing tells the lives apart where numbers go on exactly.
            let least = before + if engine.options().replay_frames.is_some() { 0 } else { 8 };
            let beyond = least + self.random.u64(..20);
            let faulty = std::mem::replace(&mut engine.faulty, false);
            while engine.next() < beyond {
                engine.step();
            }
            engine.faulty = faulty;
        }
        drop(engine);
        pod.aim();
        if overtaking {
            pod.events.set(Mode::Pass);
        }
    }

    /// A pod goes; another one has its addresses, and sometimes its name.
    fn replace_pod(&mut self, at: usize) {
        self.stats.fault("replaced");
        let pod = self.pods.swap_remove(at);
        let (name, truth) = (pod.name.clone(), Arc::clone(&pod.truth));
        let (kind, links) = (pod.kind, (Arc::clone(&pod.events), pod.replay.clone()));
        // Whoever watches the fleet may be early or late.
        let (before, after) =
            if self.random.bool() { (Some(pod), None) } else { (None, Some(pod)) };
        drop(before);
        self.insist("UnregisterPod", |mut client| {
            let name = name.clone();
            async move { client.unregister(&name).await }
        });
        let now = Instant::now();
        truth.lock().unwrap().lives.iter_mut().for_each(|life| {
            life.ended.get_or_insert(now);
        });
        drop(after);
        for link in std::iter::once(&links.0).chain(&links.1) {
            link.cut();
            link.set(Mode::Pass);
        }
        let same = self.random.bool();
        let name = if same { name } else { format!("q{}", self.incarnations) };
        // With a replay socket or without: the addresses have to fit.
        let kinds: Vec<usize> =
            (0..12).filter(|&other| has_replay(other) == has_replay(kind)).collect();
        let kind = kinds[self.random.usize(..kinds.len())];
        let pod = self.engine(kind, name, Some(links));
        {
            let mut engine = pod.engine.lock().unwrap();
            engine.works = true;
            engine.faulty = true;
        }
        self.pods.push(pod);
        self.register(self.pods.len() - 1);
    }

    fn kill_indexer(&mut self) {
        self.stats.fault("indexer killed");
        self.indexer.kill();
        if self.settings.snapshots && self.random.u8(..) < 64 {
            self.stats.fault("snapshot lost");
            for entry in std::fs::read_dir(self.directory.path()).unwrap() {
                std::fs::remove_file(entry.unwrap().path()).unwrap();
            }
        }
        self.indexer = Indexer::start(self.config.path());
        let grpc = self.indexer.grpc;
        self.client = self.runtime.block_on(async { Client::new(grpc) });
        self.watcher.look_at(self.client.clone());
        for at in 0..self.pods.len() {
            self.register(at);
        }
    }

    /// Nothing goes wrong any more; everything that can be repaired is, and every pod is judged.
    pub(crate) fn rest(&mut self) {
        for pod in &mut self.pods {
            let mut engine = pod.engine.lock().unwrap();
            engine.works = false;
            engine.faulty = false;
            engine.flush();
            drop(engine);
            pod.mend();
        }
        self.settle();
        let barriers: Vec<u64> =
            self.pods.iter().map(|pod| pod.engine.lock().unwrap().next()).collect();
        // A few at a time, so that none of them finds a queue full.
        for _ in 0..CLEAN_ROUNDS {
            for pod in &self.pods {
                let mut engine = pod.engine.lock().unwrap();
                for _ in 0..CLEAN_STEPS {
                    engine.step();
                }
            }
            self.settle();
        }
        self.judge(&barriers);
    }

    fn listed(&self) -> HashMap<String, PodStatus> {
        let rows = self.insist("ListPods", |mut client| async move { client.pods().await });
        rows.into_iter().map(|row| (row.pod.clone(), row)).collect()
    }

    /// The confirmed depth of each prompt, by pod.
    fn depths(&self, prompts: &[Vec<u32>]) -> HashMap<String, Vec<u32>> {
        let mut depths = HashMap::<String, Vec<u32>>::new();
        for (part, some) in prompts.chunks(PROMPTS_A_CALL).enumerate() {
            let some: Vec<&[u32]> = some.iter().map(Vec::as_slice).collect();
            let answer = self.insist("Score", |mut client| {
                let some = some.clone();
                async move { client.score(&some).await }
            });
            for (at, pods) in answer.into_iter().enumerate() {
                for pod in pods {
                    let of = depths.entry(pod.pod).or_insert_with(|| vec![0; prompts.len()]);
                    of[part * PROMPTS_A_CALL + at] = pod.confirmed_depth;
                }
            }
        }
        depths
    }

    /// Waits until each pod shows the last message of its engine's present life, and is at rest.
    fn settle(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let mut fences: Vec<Option<(Vec<u32>, Instant)>> = vec![None; self.pods.len()];
        let mut left: Vec<usize> = (0..self.pods.len()).collect();
        loop {
            self.indexer.still_runs();
            for &at in &left {
                if fences[at].as_ref().is_none_or(|(_, sent)| sent.elapsed() > FENCE) {
                    let tokens = self.pods[at].engine.lock().unwrap().fence();
                    fences[at] = Some((tokens, Instant::now()));
                }
            }
            let prompts: Vec<Vec<u32>> =
                fences.iter().flatten().map(|(tokens, _)| tokens.clone()).collect();
            let depths = self.depths(&prompts);
            let rows = self.listed();
            left.retain(|&at| {
                let pod = &self.pods[at];
                let shown = depths.get(&pod.name).is_some_and(|depths| depths[at] > 0);
                let last = pod.engine.lock().unwrap().next() - 1;
                let rests = rows.get(&pod.name).is_some_and(|row| is_at_rest(row, last));
                !(shown && rests)
            });
            if left.is_empty() {
                return;
            }
            if Instant::now() >= deadline {
                for at in left {
                    let pod = &self.pods[at];
                    let last = pod.engine.lock().unwrap().next() - 1;
                    println!("{}: last sequence {last}, {:?}", pod.name, rows.get(&pod.name));
                }
                panic!("not at rest (seed {})\n{}", self.settings.seed, self.indexer.last_words());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn judge(&mut self, barriers: &[u64]) {
        let mut left: Vec<usize> = (0..self.pods.len()).collect();
        let (mut credited, mut phantoms, mut degraded, mut curable) = (0, 0, 0, 0);
        let mut all = self.watcher.found();
        let rests_since = Instant::now();
        let deadline = rests_since + PATIENCE;
        while !left.is_empty() {
            assert!(Instant::now() < deadline, "pods keep changing at rest");
            let before = self.listed();
            let depths = self.depths(self.universe.prompts());
            let after = self.listed();
            let none = vec![0; self.universe.prompts().len()];
            for at in std::mem::take(&mut left) {
                let pod = &self.pods[at];
                let held = pod.engine.lock().unwrap().held();
                let same = |rows: &HashMap<String, PodStatus>| {
                    let row = rows.get(&pod.name).filter(|row| is_at_rest(row, held.last))?;
                    Some((row.state, row.epoch, row.slot, row.blocks))
                };
                let Some(row) = after.get(&pod.name) else { panic!("{} is not listed", pod.name) };
                if same(&before).is_none() || same(&before) != same(&after) {
                    // A repair came in between.
                    left.push(at);
                    continue;
                }
                let depths = depths.get(&pod.name).unwrap_or(&none);
                let truth = pod.truth.lock().unwrap();
                let life = (pod.incarnation, barriers[at]);
                let mut verdict = judge::at_rest(&self.universe, row, depths, &held, &truth, life);
                if let Some(end) = self.settings.phantoms_end
                    && row.state() == PodState::Degraded
                    && verdict.phantoms > 0
                {
                    if rests_since.elapsed() < end {
                        left.push(at);
                        continue;
                    }
                    verdict.mismatches.push(Mismatch {
                        pod: pod.name.clone(),
                        prompt: None,
                        expected: format!("nothing more than the engine has after {end:?}"),
                        actual: format!("{} blocks more ({})", verdict.phantoms, row.reason),
                    });
                }
                match row.state() {
                    PodState::Live => self.found.live += 1,
                    PodState::Partial => self.found.partial += 1,
                    _ => {
                        self.found.degraded += 1;
                        degraded += 1;
                        credited += verdict.credited;
                        phantoms += verdict.phantoms;
                    }
                }
                let tells = pod.engine.lock().unwrap().can_tell_all();
                curable += u32::from(row.state() != PodState::Live && tells);
                let right = verdict.mismatches.is_empty();
                if right && row.state() == PodState::Live && !self.found.self_tested {
                    let tested = judge::self_test(
                        &self.universe,
                        row,
                        depths,
                        &held,
                        &truth,
                        pod.incarnation,
                    );
                    tested.unwrap_or_else(|fault| panic!("the harness does not notice: {fault}"));
                    self.found.self_tested = true;
                }
                all.extend(verdict.mismatches);
            }
        }
        self.report(&all);
        println!(
            "{:6.1} s  policy={} live={} partial={} degraded={degraded} credited={credited} \
             phantoms={phantoms} curable={curable} checks={} events={} faults={}",
            self.seconds(),
            self.settings.policy,
            self.found.live,
            self.found.partial,
            self.watcher.checks(),
            self.stats.all_events(),
            self.stats.all_faults(),
        );
    }

    fn report(&mut self, mismatches: &[Mismatch]) {
        // What concerns a whole pod comes first.
        let mut mismatches: Vec<&Mismatch> = mismatches.iter().collect();
        mismatches.sort_by_key(|mismatch| mismatch.prompt.is_some());
        for mismatch in mismatches.iter().take(PRINTED) {
            println!("MISMATCH seed {}: {mismatch}", self.settings.seed);
        }
        if !mismatches.is_empty() && self.found.mismatches == 0 {
            println!("--- the indexer's log\n{}\n---", self.indexer.last_words());
        }
        self.found.mismatches += mismatches.len() as u64;
    }

    /// Ends everything; what the watcher still found counts.
    pub(crate) fn finish(mut self) -> (Found, Arc<Stats>) {
        let late = self.watcher.found();
        self.report(&late);
        assert!(self.indexer.finish(), "not a good end\n{}", self.indexer.last_words());
        (std::mem::take(&mut self.found), Arc::clone(&self.stats))
    }
}

/// Some engines have no replay socket, as vLLM's by default.
fn has_replay(kind: usize) -> bool {
    kind % 6 != 4
}

/// Twelve kinds of engines: versions, and room for blocks, replays and slow subscribers.
fn options(kind: usize, pace: Duration) -> Options {
    let newer = kind.is_multiple_of(2);
    Options {
        block_size: ENGINE_BLOCKS[usize::from(kind % 4 == 3)],
        gpu_blocks: [60, 250, 700][kind % 3],
        form: if newer { Form::Map } else { Form::Array },
        replay_frames: has_replay(kind).then_some(if newer { 3 } else { 2 }),
        buffer: [100_000, 400, 10_000, 100_000][kind % 4],
        hwm: [1_000, 120, 100_000][kind % 3],
        pace,
    }
}

fn yaml_file(yaml: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    file.flush().unwrap();
    file
}

/// Has the row applied this message and nothing to do?
fn is_at_rest(row: &PodStatus, last: u64) -> bool {
    let settled = [PodState::Live, PodState::Partial, PodState::Degraded];
    settled.contains(&row.state()) && row.applied_sequence == Some(last)
}

/// Quick to notice and quick to try again, so that much happens in little time. Every other seed has
/// little room in every queue.
fn configuration(settings: &Settings, directory: &std::path::Path) -> String {
    let narrow = settings.seed % 2 == 1;
    let mut yaml = format!(
        "tokenProcessorConfig: {{blockSizeTokens: {INDEX_BLOCK}}}
kvEventsConfig:
  heartbeatMs: 200
  reconnectMs: 10
  reconnectMaxMs: 100
  replay: {{idleMs: 300, attempts: 3, cooldownMs: 500{}}}
",
        if narrow { ", heldMessages: 64" } else { "" }
    );
    if narrow {
        yaml.push_str("  queueBatches: 48\n  receiveHighWaterMark: 64\n  orphanBlocks: 64\n");
    }
    yaml.push_str(&settings.more_config);
    if settings.snapshots {
        yaml.push_str(&format!("snapshot: {{dir: '{}', intervalMs: 500}}\n", directory.display()));
    }
    yaml
}

/// Looks at answers while everything is in motion.
struct Watcher {
    shared: Arc<Watched>,
    thread: Option<JoinHandle<()>>,
}

struct Watched {
    client: Mutex<Client>,
    stop: AtomicBool,
    checks: AtomicU64,
    found: Mutex<Vec<Mismatch>>,
}

impl Watcher {
    fn start(
        settings: &Settings,
        universe: &Arc<Universe>,
        truths: &Truths,
        client: Client,
        runtime: &Runtime,
    ) -> Self {
        let shared = Arc::new(Watched {
            client: Mutex::new(client),
            stop: AtomicBool::new(false),
            checks: AtomicU64::new(0),
            found: Mutex::default(),
        });
        let (own, universe, truths) =
            (Arc::clone(&shared), Arc::clone(universe), Arc::clone(truths));
        let (handle, mut random) =
            (runtime.handle().clone(), fastrand::Rng::with_seed(!settings.seed));
        let snapshots = settings.snapshots;
        let thread = thread::spawn(move || {
            while !own.stop.load(Ordering::Relaxed) {
                let numbers: Vec<usize> = (0..8).map(|_| universe.pick(&mut random)).collect();
                let prompts: Vec<&[u32]> =
                    numbers.iter().map(|&number| universe.prompts()[number].as_slice()).collect();
                let mut client = own.client.lock().unwrap().clone();
                let asked = Instant::now();
                if let Ok(answer) = handle.block_on(client.score(&prompts)) {
                    for (&number, rows) in numbers.iter().zip(&answer) {
                        for row in rows {
                            let truth = truths.read().unwrap().get(&row.pod).cloned();
                            let truth = truth.as_ref().map(|truth| truth.lock().unwrap());
                            let wrong = judge::in_motion(
                                &universe,
                                number,
                                row,
                                truth.as_deref(),
                                asked,
                                snapshots,
                            );
                            own.found.lock().unwrap().extend(wrong);
                            own.checks.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        Self { shared, thread: Some(thread) }
    }

    fn look_at(&self, client: Client) {
        *self.shared.client.lock().unwrap() = client;
    }

    fn checks(&self) -> u64 {
        self.shared.checks.load(Ordering::Relaxed)
    }

    fn found(&self) -> Vec<Mismatch> {
        std::mem::take(&mut *self.shared.found.lock().unwrap())
    }

    fn still_runs(&self) {
        let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        assert!(!ended, "the watcher ended");
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            drop(thread.join());
        }
    }
}
