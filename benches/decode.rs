//! `cargo bench --bench decode`: cost of decoding event batches, beside a walk that keeps nothing.
//!
//! Measures: `BatchReader::new` and every event of a batch, scratch space reused; of that, `header`,
//! which validates the payload; and a scalar walk over the heads of the same values, which is what
//! any reader of these bytes has to do at least.
//! Model: stores of 32 blocks; an engine in steady state, 8 blocks stored a step, one removal event
//! per stored block. Tokens take three bytes, five, or as those of a vocabulary of 150 000 do.
//! Reads as: the three by turns, 101 times; medians in ns a block stored. The target: at most 2 ×
//! the walk.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench talks to its user")]

mod common;

use std::{hint::black_box, time::Instant};

use kv_indexer::wire::{BatchReader, Limits, Scratch, encode::Form, header};

/// Blocks that each stream stores.
const BLOCKS: usize = 2048;

fn decode(stream: &[Vec<u8>], limits: &Limits, scratch: &mut Scratch) {
    for payload in stream {
        let mut reader = BatchReader::new(black_box(payload), limits).expect("a valid batch");
        while let Some(event) = reader.next_event(scratch) {
            black_box(event).expect("a valid event");
        }
    }
}

fn validate(stream: &[Vec<u8>], limits: &Limits) {
    for payload in stream {
        black_box(header(black_box(payload), limits)).expect("a valid batch");
    }
}

/// Passes over one value with everything inside it, and returns where it ends; `None` if the bytes
/// end before.
fn walk(bytes: &[u8]) -> Option<usize> {
    let long = |at: usize, len: usize| {
        let number = bytes.get(at..at + len)?;
        Some(number.iter().fold(0, |number, &byte| number << 8 | usize::from(byte)))
    };
    let (mut at, mut left) = (0, 1);
    while left > 0 {
        left -= 1;
        let marker = *bytes.get(at)?;
        at += 1;
        match marker {
            0x00..=0x7f | 0xc0..=0xc3 | 0xe0..=0xff => {}
            0xcc | 0xd0 => at += 1,
            0xcd | 0xd1 => at += 2,
            0xca | 0xce | 0xd2 => at += 4,
            0xcb | 0xcf | 0xd3 => at += 8,
            0xa0..=0xbf => at += usize::from(marker & 0x1f),
            0x90..=0x9f => left += usize::from(marker & 0x0f),
            0x80..=0x8f => left += 2 * usize::from(marker & 0x0f),
            0xc4 | 0xd9 => at += 1 + long(at, 1)?,
            0xc5 | 0xda => at += 2 + long(at, 2)?,
            0xc6 | 0xdb => at += 4 + long(at, 4)?,
            0xdc => (left, at) = (left + long(at, 2)?, at + 2),
            0xdd => (left, at) = (left + long(at, 4)?, at + 4),
            0xde => (left, at) = (left + 2 * long(at, 2)?, at + 2),
            0xdf => (left, at) = (left + 2 * long(at, 4)?, at + 4),
            0xd4..=0xd8 => at += 1 + (1 << (marker - 0xd4)),
            0xc7 => at += 2 + long(at, 1)?,
            0xc8 => at += 3 + long(at, 2)?,
            0xc9 => at += 5 + long(at, 4)?,
        }
    }
    (at <= bytes.len()).then_some(at)
}

fn walk_all(stream: &[Vec<u8>]) {
    for payload in stream {
        assert_eq!(walk(black_box(payload)), Some(payload.len()));
    }
}

fn compare(name: &str, stream: &[Vec<u8>], rounds: usize) {
    let limits = Limits::default();
    let mut scratch = Scratch::default();
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        let start = Instant::now();
        decode(stream, &limits, &mut scratch);
        let decoded = Instant::now();
        validate(stream, &limits);
        let validated = Instant::now();
        walk_all(stream);
        let walked = validated.elapsed();
        for (times, took) in times.iter_mut().zip([decoded - start, validated - decoded, walked]) {
            times.push(took.as_nanos() as f64 / BLOCKS as f64);
        }
    }
    let [ours, header, walk] = times.map(|mut times| {
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    });
    let bytes = stream.iter().map(Vec::len).sum::<usize>() / BLOCKS;
    let ratio = ours / walk;
    println!("| {name} | {bytes} | {ours:.0} | {header:.0} | {walk:.0} | {ratio:.2} |");
}

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 101 } else { 3 };
    println!(
        "| stream | bytes a block | decode, ns a block | of it header | walk | decode / walk |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (form, encoding) in [(Form::Array, "array"), (Form::Map, "map")] {
        for percent in [0, 57, 100] {
            let name = format!("32-block stores, {encoding}, {percent} % of five bytes");
            compare(&name, &common::stores(BLOCKS / 32, 32, percent, form), rounds);
        }
        let stream = common::steady_stream(BLOCKS / 8, 8, 64, form);
        compare(&format!("8 stored and removed a step, {encoding}"), &stream, rounds);
    }
}
