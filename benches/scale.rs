//! `cargo bench --bench scale -- [--svg FILE] [--most ENTRIES]`: how a lookup's cost grows with what the
//! index holds, and with the pods that hold the prompt.
//!
//! Measures: `RunIndex::depths` alone, hashing excluded.
//! Model: all pods hold four system prompts of 16 blocks; each conversation goes on for 112 blocks
//! on one pod. Asked is a conversation: the answer names every pod, one of them with all 128.
//! An entry is a block that one pod holds. *Warm*: 16 conversations by turns. *Cold*: before each
//! lookup, memory larger than the caches is read; the keys asked for are read again, as they would
//! have just been hashed.
//! Reads as: median time per lookup, the clock's own 20 to 50 ns included; bytes per entry as the
//! index estimates them. Up to 10⁷ entries; `--most 3e7` for more, `--most 1e5` for a glance.

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a bench talks to its user")]

mod common;

use std::{
    hint::black_box,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Parser;
use kv_indexer::{
    index::{BlockIndex, IndexConfig, runs::RunIndex},
    model::{EngineKey, PodSlot, RequestKey},
};

use self::common::{BLOCK, Random};

const ENTRIES: [u64; 4] = [100_000, 1_000_000, 10_000_000, 30_000_000];
const PODS: [u32; 5] = [1, 8, 64, 256, 1024];
const SYSTEMS: u64 = 4;
const SYSTEM_BLOCKS: usize = 16;
const OWN_BLOCKS: usize = 112;
const WARM_LOOKUPS: usize = 4000;
const COLD_LOOKUPS: usize = 64;
/// Larger than the last-level cache's share of one core on any machine that this has run on.
const EVICTING_BYTES: usize = 64 << 20;

#[derive(Debug, Parser)]
struct Args {
    /// Where to write the plot.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Entries at most, such as 3e7.
    #[arg(long, default_value_t = 1e7)]
    most: f64,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What was measured at one size.
#[derive(Clone, Copy, Debug)]
struct Point {
    entries: u64,
    pods: u32,
    warm: Duration,
    cold: Duration,
    bytes: f64,
}

/// An index of that size, and the keys of some conversations in it.
fn build(entries: u64, pods: u32) -> (RunIndex, Vec<Vec<RequestKey>>) {
    let index = RunIndex::new(IndexConfig { cap_bytes: u64::MAX >> 1, ..IndexConfig::default() });
    let mut random = Random(entries ^ u64::from(pods));
    let mut names = Random(17);
    let slots: Vec<PodSlot> =
        (0..pods).map(|_| index.register(common::spec()).expect("room for the pods")).collect();
    let systems: Vec<(Vec<u32>, Vec<EngineKey>)> = (0..SYSTEMS)
        .map(|_| {
            let tokens = random.tokens(SYSTEM_BLOCKS as u32 * BLOCK);
            (tokens, (0..SYSTEM_BLOCKS).map(|_| EngineKey(names.next())).collect())
        })
        .collect();
    for (tokens, engine) in &systems {
        slots.iter().for_each(|&slot| common::store(&index, slot, engine, None, tokens));
    }
    let shared = SYSTEMS * SYSTEM_BLOCKS as u64 * u64::from(pods);
    let conversations = (entries.saturating_sub(shared) / OWN_BLOCKS as u64).max(1);
    let every = (conversations / COLD_LOOKUPS as u64).max(1);
    let mut asked = Vec::new();
    for at in 0..conversations {
        let (system, parent) = &systems[(at % SYSTEMS) as usize];
        let tokens = random.tokens(OWN_BLOCKS as u32 * BLOCK);
        let engine: Vec<EngineKey> = (0..OWN_BLOCKS).map(|_| EngineKey(names.next())).collect();
        let slot = slots[random.next() as usize % slots.len()];
        common::store(&index, slot, &engine, parent.last().copied(), &tokens);
        if at % every == 0 && asked.len() < COLD_LOOKUPS {
            asked.push(common::keys(&[&**system, &*tokens].concat()));
        }
    }
    (index, asked)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn measure(entries: u64, pods: u32, evicting: &[u64]) -> Point {
    let (index, asked) = build(entries, pods);
    let mut out = Vec::new();
    for keys in &asked {
        index.depths(keys, &mut out);
        let whole = out.iter().filter(|(_, depth)| *depth as usize == keys.len()).count();
        assert_eq!((out.len(), whole), (pods as usize, 1), "everybody begins, one goes on");
    }
    let mut time = |keys: &[RequestKey]| {
        let start = Instant::now();
        index.depths(black_box(keys), &mut out);
        start.elapsed()
    };
    let hot = &asked[..asked.len().min(16)];
    let warm: Vec<Duration> =
        hot.iter().cycle().take(WARM_LOOKUPS).map(|keys| time(keys)).collect();
    let cold = asked.iter().map(|keys| {
        black_box(evicting.iter().step_by(8).fold(0, |sum: u64, word| sum.wrapping_add(*word)));
        time(black_box(&keys.clone()))
    });
    let (warm, cold) = (median(warm.into_iter().skip(hot.len()).collect()), median(cold.collect()));
    let usage = index.usage();
    let held: u64 = (0..pods).map(|pod| index.pod_usage(PodSlot(pod)).blocks).sum();
    Point { entries, pods, warm, cold, bytes: usage.bytes as f64 / held as f64 }
}

fn table(points: &[Point]) -> String {
    let mut out = String::from("| entries | pods | warm p50 | cold p50 | bytes per entry |\n");
    out += "| ---: | ---: | ---: | ---: | ---: |\n";
    for Point { entries, pods, warm, cold, bytes } in points {
        let micros = |time: &Duration| time.as_nanos() as f64 / 1e3;
        let (warm, cold) = (micros(warm), micros(cold));
        let row = format!("| {entries} | {pods} | {warm:.2} µs | {cold:.2} µs | {bytes:.1} |\n");
        out += &row;
    }
    out
}

/// Lines of one panel: a name, and points of x and y.
type Lines = Vec<(String, Vec<(f64, f64)>)>;

/// Lines of the warm or cold times, grouped by one size and along the other.
fn lines(
    points: &[Point],
    by: impl Fn(&Point) -> (String, f64),
    time: impl Fn(&Point) -> Duration,
) -> Lines {
    let mut lines = Lines::new();
    for point in points {
        let (name, x) = by(point);
        let own = (x, time(point).as_nanos().max(1) as f64 / 1e3);
        match lines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, line)) => line.push(own),
            None => lines.push((name, vec![own])),
        }
    }
    lines
}

const COLOURS: [&str; 5] = ["#4361a8", "#b5562d", "#3a7d44", "#8c4a91", "#6b6b6b"];

/// One panel of logarithmic axes at an offset: `warm` solid, `cold` dashed.
fn panel(left: f64, title: &str, ticks: &[f64], warm: &Lines, cold: &Lines) -> String {
    const WIDTH: f64 = 340.0;
    const HEIGHT: f64 = 260.0;
    const TOP: f64 = 40.0;
    let times = || warm.iter().chain(cold).flat_map(|(_, line)| line).map(|point| point.1);
    let low = times().fold(f64::MAX, f64::min).log10().floor();
    let high = times().fold(f64::MIN, f64::max).log10().ceil().max(low + 1.0);
    let (first, last) = (ticks[0].log10(), ticks[ticks.len() - 1].log10());
    let x = |value: f64| left + (value.log10() - first) / (last - first).max(0.1) * WIDTH;
    let y = |value: f64| TOP + HEIGHT - (value.log10() - low) / (high - low) * HEIGHT;
    let text = |x: f64, y: f64, anchor: &str, colour: &str, what: &str| {
        format!(
            "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' fill='{colour}'>{what}</text>\n"
        )
    };
    let rule = |x1: f64, y1: f64, x2: f64, y2: f64| {
        format!("<path d='M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}' stroke='#ddd'/>\n")
    };
    let mut out = text(left, TOP - 16.0, "start", "#222", title);
    for power in low as i32..=high as i32 {
        let at = 10f64.powi(power);
        out += &rule(left, y(at), left + WIDTH, y(at));
        out += &text(left - 6.0, y(at) + 4.0, "end", "#555", &format!("{at} µs"));
    }
    for &tick in ticks {
        out += &rule(x(tick), TOP, x(tick), TOP + HEIGHT);
        let name = if tick < 1e5 { format!("{tick}") } else { format!("{tick:e}") };
        out += &text(x(tick), TOP + HEIGHT + 16.0, "middle", "#555", &name);
    }
    for (lines, dash) in [(warm, "none"), (cold, "5 4")] {
        for (at, (name, line)) in lines.iter().enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            let path: Vec<String> =
                line.iter().map(|&(size, time)| format!("{:.1} {:.1}", x(size), y(time))).collect();
            out += &format!(
                "<path d='M{}' fill='none' stroke='{colour}' stroke-dasharray='{dash}' \
                 stroke-width='1.6' stroke-linecap='round'/>\n",
                path.join("L")
            );
            for &(size, time) in line {
                out += &format!(
                    "<circle cx='{:.1}' cy='{:.1}' r='2.4' fill='{colour}'/>\n",
                    x(size),
                    y(time)
                );
            }
            if dash == "none" {
                let below = TOP + HEIGHT + 36.0 + 14.0 * (at / 3) as f64;
                out += &text(left + 120.0 * (at % 3) as f64, below, "start", colour, name);
            }
        }
    }
    out
}

fn plot(points: &[Point], entries: &[u64]) -> String {
    let entries: Vec<f64> = entries.iter().map(|&size| size as f64).collect();
    let by_pods = |point: &Point| (format!("{} pods", point.pods), point.entries as f64);
    let by_entries =
        |point: &Point| (format!("{:e} entries", point.entries), f64::from(point.pods));
    let pair = |by: &dyn Fn(&Point) -> (String, f64)| {
        (lines(points, by, |point| point.warm), lines(points, by, |point| point.cold))
    };
    let ((warm, cold), (warm_by_pods, cold_by_pods)) = (pair(&by_pods), pair(&by_entries));
    let pods: Vec<f64> = PODS.iter().map(|&pods| f64::from(pods)).collect();
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 860 370' font-family='sans-serif' \
         font-size='11'>\n<rect width='860' height='370' fill='white'/>\n{}{}</svg>\n",
        panel(70.0, "Lookup p50 by entries; dashed: cold caches", &entries, &warm, &cold),
        panel(490.0, "by pods that hold its start", &pods, &warm_by_pods, &cold_by_pods),
    )
}

fn main() {
    let args = Args::parse();
    let evicting: Vec<u64> = (0..EVICTING_BYTES as u64 / 8).collect();
    let entries: Vec<u64> =
        ENTRIES.into_iter().filter(|&entries| entries as f64 <= args.most).collect();
    let points: Vec<Point> = entries
        .iter()
        .flat_map(|&entries| PODS.map(|pods| (entries, pods)))
        .map(|(entries, pods)| measure(entries, pods, &evicting))
        .collect();
    print!("{}", table(&points));
    if let Some(file) = args.svg {
        std::fs::write(&file, plot(&points, &entries)).expect("the plot's file can be written");
        println!("\nplot: {}", file.display());
    }
}
