//! Memory while an index grows, while its content turns over, and after a clear.
//!
//! Each measurement has a process of its own: nothing that ran before is in its heap or its
//! resident memory. The process counts what all maps of the index take, its writer's included.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use kv_indexer::model::EngineKey;

use crate::{
    contender::{Contender, Event, Place, What, Writer},
    heap,
    sample::nanos,
    stream::{Prompt, Random, TAIL, TRAFFIC_PODS},
};

/// What the pods hold while the index grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Holding {
    /// Each pod its own tails.
    Unique,
    /// Sixteen pods the same tails, under the same engine keys.
    Equal,
    /// Sixteen pods the same tails, each under engine keys of its own.
    Own,
}

/// What comes on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum More {
    Nothing,
    /// 5 % of the stores are announced twice.
    Twice,
    /// 30 % of the stores are announced in the second tier too.
    Tier,
}

/// Heap bytes per entry at the worst of many checkpoints, from `most / 4` entries or a million on;
/// and resident bytes per entry at the end.
pub(crate) fn grow<C: Contender>(holding: Holding, more: More, most: usize) -> Vec<f64> {
    const CHECK: usize = 1 << 16;
    let (heap, resident) = (heap::live(), heap::resident());
    let index = C::new(TRAFFIC_PODS);
    let mut writer = index.writer();
    let mut random = Random(41);
    let (mut entries, mut checked, mut worst) = (0, most.min(1_000_000) - 1, 0.0f64);
    while entries < most {
        {
            let blocks = 1 + random.below(TAIL);
            let prompt = Prompt::new(&mut random, blocks);
            let pods = match holding {
                Holding::Unique => {
                    let pod = random.below(TRAFFIC_PODS as usize) as u32;
                    pod..pod + 1
                }
                _ => 0..TRAFFIC_PODS,
            };
            for pod in pods {
                let own = match holding {
                    Holding::Own => prompt.renamed(u64::from(pod) << 32),
                    _ => prompt.clone(),
                };
                let event = own.stored(pod, Place::Gpu, 0..blocks);
                let percent = random.below(100);
                if more == More::Twice && percent < 5 {
                    writer.apply(C::prepare(&event));
                }
                if more == More::Tier && percent < 30 {
                    writer.apply(C::prepare(&Event { place: Place::Cpu, ..event.clone() }));
                }
                writer.apply(C::prepare(&event));
                entries += blocks;
            }
        }
        if entries > checked || entries >= most {
            checked = entries + CHECK;
            writer.flush();
            worst = worst.max((heap::live() - heap) / entries as f64);
        }
    }
    vec![worst, (heap::resident() - resident) / entries as f64]
}

/// Twenty times the live set goes through. Heap and resident bytes after the last pass, by those
/// after the first.
pub(crate) fn churn<C: Contender>(live: usize, sweep: bool) -> Vec<f64> {
    const CHAIN: usize = 256;
    const PASSES: usize = 20;
    let heap = heap::live();
    let index = C::new(TRAFFIC_PODS);
    let mut writer = index.writer();
    let mut random = Random(43);
    let chains = live / CHAIN;
    let mut held: VecDeque<(u32, Vec<EngineKey>)> = VecDeque::with_capacity(chains + 1);
    let mut after = Vec::new();
    // The first pass fills the index, the second is the first that turns it over.
    for _ in 0..=PASSES {
        for at in 0..chains {
            let pod = at as u32 % TRAFFIC_PODS;
            let prompt = Prompt::new(&mut random, CHAIN);
            writer.apply(C::prepare(&prompt.stored(pod, Place::Gpu, 0..CHAIN)));
            held.push_back((pod, prompt.keys.to_vec()));
            if held.len() > chains
                && let Some((pod, keys)) = held.pop_front()
            {
                let what = What::Removed(keys.into_iter().rev().collect());
                writer.apply(C::prepare(&Event { pod, place: Place::Gpu, what }));
            }
        }
        writer.flush();
        if sweep {
            writer.sweep();
        }
        let kept = (held.len() * CHAIN * size_of::<EngineKey>()) as f64;
        after.push((heap::live() - heap - kept, heap::resident()));
    }
    let worst = after[2..]
        .iter()
        .fold((0.0, 0.0), |worst: (f64, f64), now| (worst.0.max(now.0), worst.1.max(now.1)));
    vec![worst.0 / after[1].0, worst.1 / after[1].1, worst.0 / 1e6]
}

/// A pod that holds `blocks` blocks is cleared. Milliseconds until no lookup sees any of 64 of its
/// prompts, and until nine tenths of its memory are back (at most two seconds).
pub(crate) fn clear<C: Contender>(blocks: usize) -> Vec<f64> {
    const LONGEST: Duration = Duration::from_secs(2);
    let index = C::new(TRAFFIC_PODS);
    let mut writer = index.writer();
    let mut random = Random(47);
    let mut fill = |pod: u32, blocks: usize, mut each: Box<dyn FnMut(&Prompt) + '_>| {
        let mut stored = 0;
        while stored < blocks {
            let prompt = {
                let blocks = 1 + random.below(TAIL);
                Prompt::new(&mut random, blocks)
            };
            writer.apply(C::prepare(&prompt.stored(pod, Place::Gpu, 0..prompt.blocks())));
            stored += prompt.blocks();
            each(&prompt);
        }
        writer.flush();
    };
    fill(1, blocks / 10, Box::new(|_| ()));
    let before = heap::live();
    let mut queries: Vec<C::Query> = Vec::new();
    let every = (blocks / (TAIL / 2) / 64).max(1);
    let mut at = 0;
    fill(
        0,
        blocks,
        Box::new(|prompt| {
            at += 1;
            if at % every == 0 {
                queries.push(C::query(&prompt.tokens));
            }
        }),
    );
    let full = heap::live();
    let cleared = C::prepare(&Event { pod: 0, place: Place::Gpu, what: What::Cleared });
    let (ready, begin, gone) = (AtomicBool::new(false), Instant::now(), AtomicU64::new(0));
    let start = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut answer = C::Answer::default();
            ready.store(true, Ordering::Release);
            for query in &queries {
                while {
                    index.lookup(query, &mut answer);
                    C::depths(&answer).iter().any(|(pod, _)| *pod == 0)
                } {}
            }
            gone.store(begin.elapsed().as_nanos() as u64, Ordering::Release);
        });
        while !ready.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let start = begin.elapsed();
        writer.apply(cleared);
        writer.flush();
        start
    });
    let goal = before + (full - before) / 10.0;
    while heap::live() > goal && begin.elapsed() - start < LONGEST {
        std::thread::yield_now();
    }
    let invisible = gone.load(Ordering::Acquire) as f64 - nanos(start);
    vec![invisible / 1e6, nanos(begin.elapsed().saturating_sub(start)) / 1e6]
}
