//! Chaos: engines, networks and indexers fail in every way, and the index has to stay true.
//!
//! ```text
//! CHAOS_SEED=7 CHAOS_SECONDS=120 cargo test --release --test chaos
//! ```
//!
//! Mock engines with vLLM's own cache publish over real sockets, behind proxies that know nothing but
//! bytes, to the real program. For a few seconds everything goes wrong; then nothing does any more, and
//! once every pod has shown its engine's last message, the index is compared with the engines' caches:
//!
//! * a `live` pod holds exactly what its engine holds, block for block;
//! * a `partial` one never more;
//! * a `degraded` one only in addition what was removed, or lived, before the last loss.
//!
//! Meanwhile a watcher asks for scores: no pod may be credited with blocks that no single life of it ever
//! announced. The judges are tested on falsified caches in every run.
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `CHAOS_SEED` | of all random choices; the order of events is still the machine's | random, printed |
//! | `CHAOS_SECONDS` | how long it goes on, rests included | 20 |
//! | `CHAOS_PODS` | engines at a time | 12 |
//! | `CHAOS_PACE_US` | from step to step of each engine, microseconds | 1500, 5000 without optimization |
//! | `CHAOS_POLICY` | what the indexer does about lost events: `keep`, `age-out` (after two seconds) or `clear` | `keep`, the program's own |
//! | `CHAOS_SNAPSHOTS` | 0: the indexer starts from nothing and the engines' replays, not from its snapshot | 1 |
//!
//! The last line is `events=N faults=N live_pods=N degraded_pods=N mismatches=N`; pods are counted once
//! for each rest. The run fails on any mismatch, and if no live pod was ever compared.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test without libtest: its last line is its result"
)]

mod engine;
mod indexer;
mod judge;
mod proxy;
mod stats;
mod universe;
mod world;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use self::world::World;

/// Time of the policy `age-out`.
const AGE_OUT_MS: u64 = 2_000;

/// What a run is like.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) seed: u64,
    time: Duration,
    pub(crate) pods: usize,
    pub(crate) pace: Duration,
    /// As printed.
    pub(crate) policy: String,
    /// So long after everything is at rest no degraded pod has more than its engine, if the policy
    /// promises that.
    pub(crate) phantoms_end: Option<Duration>,
    pub(crate) snapshots: bool,
    /// YAML for `kvEventsConfig`.
    pub(crate) more_config: String,
}

impl Settings {
    fn from_environment() -> Self {
        let policy = std::env::var("CHAOS_POLICY").ok();
        let (more_config, phantoms_end) = match policy.as_deref() {
            None => (String::new(), None),
            Some(policy) => (
                format!("  loss: {{policy: {policy}, ageOutMs: {AGE_OUT_MS}}}\n"),
                match policy {
                    "age-out" => Some(Duration::from_millis(3 * AGE_OUT_MS)),
                    "clear" => Some(Duration::from_millis(AGE_OUT_MS)),
                    _ => None,
                },
            ),
        };
        let pace = if cfg!(debug_assertions) { 5_000 } else { 1_500 };
        Self {
            seed: variable("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32)),
            time: Duration::from_secs(variable("CHAOS_SECONDS").unwrap_or(20)),
            pods: variable("CHAOS_PODS").unwrap_or(12) as usize,
            pace: Duration::from_micros(variable("CHAOS_PACE_US").unwrap_or(pace)),
            policy: policy.unwrap_or_else(|| "keep".to_owned()),
            phantoms_end,
            snapshots: variable("CHAOS_SNAPSHOTS") != Some(0),
            more_config,
        }
    }
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: {text:?} is no number")))
}

/// Would libtest run a test of this name with these arguments?
fn is_asked_for() -> bool {
    let arguments = std::env::args().skip(1);
    let filters: Vec<String> = arguments.filter(|argument| !argument.starts_with('-')).collect();
    filters.is_empty() || filters.iter().any(|filter| "chaos".contains(filter.as_str()))
}

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        println!("chaos: test");
        return ExitCode::SUCCESS;
    }
    if !is_asked_for() {
        return ExitCode::SUCCESS;
    }
    let settings = Settings::from_environment();
    println!("CHAOS_SEED={} CHAOS_SECONDS={}", settings.seed, settings.time.as_secs());
    let end = Instant::now() + settings.time;
    let mut random = fastrand::Rng::with_seed(settings.seed.rotate_left(32));
    let mut world = World::start(settings);
    world.rest();
    while Instant::now() < end {
        let left = end.saturating_duration_since(Instant::now());
        world.rage(left.min(Duration::from_millis(random.u64(1_500..5_000))));
        world.rest();
    }
    let (found, stats) = world.finish();
    println!("{}", stats.faults_by_kind());
    println!(
        "events={} faults={} live_pods={} degraded_pods={} mismatches={}",
        stats.all_events(),
        stats.all_faults(),
        found.live,
        found.degraded,
        found.mismatches,
    );
    let sound = found.mismatches == 0 && found.live > 0 && found.self_tested;
    if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
