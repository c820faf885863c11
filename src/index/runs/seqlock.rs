//! The version word of a run: writers take turns on it, readers see whether one came between.
//!
//! Everything it guards is atomic, read and written with relaxed order, so that a torn read is a
//! wrong number and nothing worse; [`unchanged`] tells. The orders are those of H.-J. Boehm, "Can
//! Seqlocks Get Along With Programming Language Memory Models?" (MSPC 2012), section 4.

#[cfg(not(loom))]
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
use loom::{
    hint::spin_loop,
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};

/// Spins before a waiting thread lets others run: about as long as a short write takes.
const SPINS: u32 = 64;

/// Waits for its turn to write. Returns the version for [`unlock`].
pub(super) fn lock(word: &AtomicU64) -> u64 {
    let mut spins = 0;
    loop {
        let version = word.load(Ordering::Relaxed);
        let free = version & 1 == 0;
        if free
            && word
                .compare_exchange_weak(version, version + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        {
            // No write of the guarded words may become visible before the odd version.
            fence(Ordering::Release);
            return version;
        }
        pause(&mut spins);
    }
}

/// Ends the turn that began with `version`.
pub(super) fn unlock(word: &AtomicU64, version: u64) {
    word.store(version + 2, Ordering::Release);
}

/// The version with which a read begins; waits while somebody writes.
pub(super) fn begin(word: &AtomicU64) -> u64 {
    let mut spins = 0;
    loop {
        let version = word.load(Ordering::Acquire);
        if version & 1 == 0 {
            return version;
        }
        pause(&mut spins);
    }
}

/// Has nobody written since [`begin`]? Then what was read in between belongs together.
pub(super) fn unchanged(word: &AtomicU64, version: u64) -> bool {
    fence(Ordering::Acquire);
    word.load(Ordering::Relaxed) == version
}

fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS && cfg!(not(loom)) {
        spin_loop();
    } else {
        // The writer may have lost its processor.
        yield_now();
    }
}
