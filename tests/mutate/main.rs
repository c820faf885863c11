//! The fuzz targets without a fuzzer: what is in their corpora is mutated at random, on a stable compiler,
//! in one process. It knows nothing of coverage; what it lacks in aim it has in speed.
//!
//! ```text
//! MUTATE_EXECUTIONS=10000000 MUTATE_SEED=7 MUTATE_TARGETS=decode,request cargo test --release --test mutate
//! ```
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `MUTATE_EXECUTIONS` | of each target | 5000 |
//! | `MUTATE_SECONDS` | of each target at most | 600 |
//! | `MUTATE_SEED` | of all random choices: a run with one is made again exactly | random, printed |
//! | `MUTATE_TARGETS` | names, by commas | all |
//!
//! An input that breaks a property, or takes a second, is written to `corpus/<target>/` with its number, and the run fails.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test without libtest: its last lines are its result"
)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use self::targets::TARGETS;

/// Inputs do not grow beyond this, bytes.
const LONGEST: usize = 4 << 10;
/// An input that takes so long is a fault of its own.
const SLOW: Duration = Duration::from_secs(1);
/// Numbers at which something often changes.
const EDGES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, 0x90, 0x9f, 0xc0, 0xc4, 0xcf, 0xdc, 0xdd];

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target)
}

/// A new input out of two old ones.
fn mutated(seeds: &[Vec<u8>], random: &mut fastrand::Rng, out: &mut Vec<u8>) {
    out.clear();
    let other = &seeds[random.usize(..seeds.len())];
    if random.u8(..) > 8 {
        out.extend_from_slice(&seeds[random.usize(..seeds.len())]);
    } else {
        let length = random.usize(..256);
        out.extend(std::iter::repeat_with(|| random.u8(..)).take(length));
    }
    for _ in 0..1 << random.u32(..5) {
        change(out, other, random);
    }
    out.truncate(LONGEST);
}

fn change(out: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
    if out.is_empty() {
        return out.push(random.u8(..));
    }
    let at = random.usize(..out.len());
    let span = |random: &mut fastrand::Rng, of: usize| {
        let from = random.usize(..of);
        from..from + random.usize(..=(of - from).min(32))
    };
    match random.u8(..10) {
        0 => out[at] ^= 1 << random.u8(..8),
        1 => out[at] = random.u8(..),
        2 => out[at] = EDGES[random.usize(..EDGES.len())],
        3 => out[at] = out[at].wrapping_add(random.u8(..16)).wrapping_sub(8),
        4 => out.insert(at, random.u8(..)),
        5 => {
            let gone = span(random, out.len());
            out.drain(gone);
        }
        6 => {
            let again = span(random, out.len());
            let again = out[again].to_vec();
            out.splice(at..at, again);
        }
        7 => out.truncate(at),
        8 if !other.is_empty() => {
            let taken = span(random, other.len());
            out.splice(at..at, other[taken].iter().copied());
        }
        _ => {
            // A number of several bytes.
            let end = out.len().min(at + (1 << random.u8(..4)));
            let fill = [0, 0xff, random.u8(..)][random.usize(..3)];
            out[at..end].fill(fill);
        }
    }
}

struct Outcome {
    executions: u64,
    took: Duration,
    slowest: Duration,
    fault: Option<String>,
}

fn run(target: &str, holds: fn(&[u8]), executions: u64, most: Duration, seed: u64) -> Outcome {
    let mut files: Vec<PathBuf> =
        fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    // As the file system lists them would differ from machine to machine.
    files.sort();
    let seeds: Vec<Vec<u8>> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut input = Vec::new();
    let began = Instant::now();
    let mut outcome =
        Outcome { executions: 0, took: Duration::ZERO, slowest: Duration::ZERO, fault: None };
    let mut before = began;
    while outcome.executions < executions && before - began < most {
        mutated(&seeds, &mut random, &mut input);
        let held = catch_unwind(AssertUnwindSafe(|| holds(&input)));
        outcome.executions += 1;
        let now = Instant::now();
        let took = now - before;
        before = now;
        outcome.slowest = outcome.slowest.max(took);
        if held.is_err() || took > SLOW {
            let path = corpus(target).join(format!("found-{seed}-{}", outcome.executions));
            fs::write(&path, &input).unwrap();
            outcome.fault = Some(format!("{} after {took:?}", path.display()));
            break;
        }
    }
    outcome.took = began.elapsed();
    outcome
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: {text:?} is no number")))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("mutate: test");
        return ExitCode::SUCCESS;
    }
    let mut filters = arguments.iter().filter(|argument| !argument.starts_with('-')).peekable();
    if filters.peek().is_some() && !filters.any(|filter| "mutate".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let executions = variable("MUTATE_EXECUTIONS").unwrap_or(5_000);
    let most = Duration::from_secs(variable("MUTATE_SECONDS").unwrap_or(600));
    let seed = variable("MUTATE_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    let asked = std::env::var("MUTATE_TARGETS").ok();
    println!("MUTATE_SEED={seed}");
    let (mut total, mut faults) = (0, 0);
    for (target, _, holds) in TARGETS {
        if asked.as_ref().is_some_and(|asked| !asked.split(',').any(|name| name == target)) {
            continue;
        }
        let outcome = run(target, holds, executions, most, seed);
        total += outcome.executions;
        let each = outcome.took.as_nanos() / u128::from(outcome.executions.max(1));
        println!(
            "{target}: {} executions in {:.1} s, {each} ns each, slowest {:?}",
            outcome.executions,
            outcome.took.as_secs_f64(),
            outcome.slowest,
        );
        if let Some(fault) = outcome.fault {
            faults += 1;
            println!("FAULT {target}: {fault}");
        }
    }
    println!("executions={total} faults={faults}");
    if faults == 0 && total > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
