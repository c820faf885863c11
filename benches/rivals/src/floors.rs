//! What plain Rust takes for the least that any answer needs.

use std::{hint::black_box, time::Duration};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    report::{FLOOR, Report},
    sample::{Sample, batches},
    stream::Random,
};

/// Blocks of a hashed prompt.
const HASHED: usize = 512;

/// Measures and reports all.
pub(crate) fn measure(report: &mut Report, budget: Duration) {
    let mut random = Random(5);
    for count in [512, 4096] {
        let keys: Vec<u64> = (0..count).map(|_| random.next()).collect();
        let same = keys.clone();
        let time = batches(budget, |_| {
            let (keys, same) = (black_box(&keys), black_box(&same));
            black_box(keys.iter().zip(same).take_while(|(one, other)| one == other).count());
        });
        floor(report, &format!("{count} keys compared, to the first that differs"), time.clone());
        let time = batches(budget, |_| {
            black_box(black_box(&keys[..]) == black_box(&same[..]));
        });
        floor(report, &format!("{count} keys compared at once"), time);
    }
    for pods in [64, 256, 1024] {
        let words = vec![u64::MAX; pods / 64];
        let mut out: Vec<(u32, u32)> = Vec::with_capacity(pods);
        let time = batches(budget, |_| {
            out.clear();
            for (at, word) in black_box(&words).iter().enumerate() {
                let mut left = *word;
                while left != 0 {
                    out.push((at as u32 * 64 + left.trailing_zeros(), 512));
                    left &= left - 1;
                }
            }
            black_box(&mut out);
        });
        floor(report, &format!("{pods} pods written from a bitset"), time);
        let time = batches(budget, |_| {
            out.clear();
            for (at, word) in black_box(&words).iter().enumerate() {
                let first = at as u32 * 64;
                if *word == u64::MAX {
                    out.extend((first..first + 64).map(|pod| (pod, 512)));
                }
            }
            black_box(&mut out);
        });
        floor(report, &format!("{pods} pods written, full words at once"), time);
    }
    let bytes: Vec<[u8; 64]> =
        (0..HASHED).map(|_| std::array::from_fn(|_| random.next() as u8)).collect();
    let time = chained(std::slice::from_ref(&bytes), budget);
    floor(report, "512 blocks of 64 B, XXH3 chained by seed", time);
    let mut keys = Vec::with_capacity(HASHED);
    let alone = batches(budget, |_| {
        keys.clear();
        keys.extend(black_box(&bytes).iter().map(|block| xxh3_64_with_seed(block, 1337)));
        black_box(&mut keys);
    });
    floor(report, "512 blocks of 64 B, XXH3 each on its own", alone);
}

/// Hashing prompts in turn, each block seeded by the one before.
pub(crate) fn chained(prompts: &[Vec<[u8; 64]>], budget: Duration) -> Sample {
    batches(budget, |at| {
        let chain = black_box(&prompts[at % prompts.len()]).iter();
        black_box(chain.fold(0, |key, block| xxh3_64_with_seed(block, key)));
    })
}

fn floor(report: &mut Report, what: &str, mut time: Sample) {
    report.add(FLOOR, what, &[("ours", time.median())], "");
}
