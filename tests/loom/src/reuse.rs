//! A run is freed; its number, and its storage, go to others. Nobody takes theirs for its own.
//!
//! What a reader does is `Snapshot::find` to `Snapshot::is_consistent` of `storage.rs`, what writers
//! do is `Locked::free`, `Runs::new_run` with `Runs::publish`, and `Locked::append`.

use loom::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering, fence},
};

use crate::{
    Side, fails, race, race_within,
    tables::{Heads, Real},
    versions::{Seqlock, seqlock},
};

/// Keys of the two runs; what either run says is its key tenfold.
const OLD: u64 = 1;
const NEW: u64 = 2;
/// Both keys have it, so that either one's search meets the other's run.
const TAG: u32 = 4;
const RUN: u32 = 0;

struct Number {
    table: <Real as Heads>::Table,
    /// What the table's writers lock.
    load: Mutex<<Real as Heads>::Load>,
    version: AtomicU64,
    first: AtomicU64,
    word: AtomicU64,
    is_free: Mutex<bool>,
}

impl Number {
    /// The number belongs to the run that begins with `OLD`.
    fn new() -> Self {
        let (mut load, table) = (Default::default(), Real::table(2));
        Real::insert(&mut load, &table, TAG, RUN);
        Self {
            table,
            load: Mutex::new(load),
            version: AtomicU64::new(0),
            first: AtomicU64::new(OLD),
            word: AtomicU64::new(10 * OLD),
            is_free: Mutex::new(false),
        }
    }

    fn free(&self, seqlock: Seqlock) {
        let version = (seqlock.lock)(&self.version);
        Real::remove(&mut self.load.lock().unwrap(), &self.table, TAG, RUN);
        self.word.store(0, Ordering::Relaxed);
        self.first.store(0, Ordering::Relaxed);
        (seqlock.unlock)(&self.version, version);
        *self.is_free.lock().unwrap() = true;
    }

    fn reuse(&self, seqlock: Seqlock) {
        if !std::mem::take(&mut *self.is_free.lock().unwrap()) {
            return;
        }
        let version = (seqlock.lock)(&self.version);
        self.first.store(NEW, Ordering::Relaxed);
        self.word.store(10 * NEW, Ordering::Relaxed);
        Real::insert(&mut self.load.lock().unwrap(), &self.table, TAG, RUN);
        (seqlock.unlock)(&self.version, version);
    }

    /// What the run that begins with `key` says.
    fn read(&self, seqlock: Seqlock, key: u64, compare_first: bool) -> Option<u64> {
        for _ in Real::candidates(&self.table, TAG) {
            loop {
                let version = (seqlock.begin)(&self.version);
                let first = self.first.load(Ordering::Relaxed);
                let word = self.word.load(Ordering::Relaxed);
                let consistent = (seqlock.unchanged)(&self.version, version);
                let is_it = word != 0 && (first == key || !compare_first);
                if consistent && !is_it {
                    break;
                }
                if consistent {
                    return Some(word);
                }
            }
        }
        None
    }
}

/// A reader looks for `key`. `apart`: another thread than the one that frees the number uses it
/// again.
fn a_number_is_reused(seqlock: Seqlock, key: u64, apart: bool, compare_first: bool) {
    let free = move |number: &Number| {
        number.free(seqlock);
        if !apart {
            number.reuse(seqlock);
        }
        None
    };
    let reuse = move |number: &Number| {
        number.reuse(seqlock);
        None
    };
    let read = move |number: &Number| number.read(seqlock, key, compare_first);
    let check = move |read: Option<u64>| {
        assert!(read.is_none_or(|word| word == 10 * key), "another run's word: {read:?}");
    };
    if apart {
        let sides: [Side<_, _>; 3] = [Box::new(free), Box::new(reuse), Box::new(read)];
        race_within(Some(2), Number::new, sides, move |_, [.., read]| check(read));
    } else {
        let sides: [Side<_, _>; 2] = [Box::new(free), Box::new(read)];
        race_within(Some(3), Number::new, sides, move |_, [.., read]| check(read));
    }
}

/// When the new owner of storage takes it.
#[derive(Clone, Copy, PartialEq)]
enum Taking {
    /// Before it locks its run, like `new_run`.
    BeforeLock,
    /// Afterwards, like `append` and `take_words`.
    UnderLock,
    /// Afterwards, with another fence when the storage is there.
    UnderLockWithFence,
}

/// Two runs and a block, which the first one gives back and the second one takes.
struct Storage {
    versions: [AtomicU64; 2],
    length: AtomicU64,
    block: AtomicU64,
    is_free: Mutex<bool>,
}

fn storage_is_reused(seqlock: Seqlock, taking: Taking) {
    race(
        || Storage {
            versions: [0; 2].map(AtomicU64::new),
            length: AtomicU64::new(1),
            block: AtomicU64::new(OLD),
            is_free: Mutex::new(false),
        },
        [
            Box::new(move |storage: &Storage| {
                let version = (seqlock.lock)(&storage.versions[0]);
                storage.length.store(0, Ordering::Relaxed);
                *storage.is_free.lock().unwrap() = true;
                (seqlock.unlock)(&storage.versions[0], version);
                None
            }),
            Box::new(move |storage: &Storage| {
                let take = || std::mem::take(&mut *storage.is_free.lock().unwrap());
                if taking == Taking::BeforeLock && !take() {
                    return None;
                }
                let version = (seqlock.lock)(&storage.versions[1]);
                if taking == Taking::BeforeLock || take() {
                    if taking == Taking::UnderLockWithFence {
                        fence(Ordering::Release);
                    }
                    storage.block.store(NEW, Ordering::Relaxed);
                }
                (seqlock.unlock)(&storage.versions[1], version);
                None
            }),
            Box::new(move |storage: &Storage| {
                let version = (seqlock.begin)(&storage.versions[0]);
                let length = storage.length.load(Ordering::Relaxed);
                let block = storage.block.load(Ordering::Relaxed);
                let consistent = (seqlock.unchanged)(&storage.versions[0], version);
                (consistent && length == 1).then_some(block)
            }),
        ],
        |_, [.., read]| assert!(read.is_none_or(|key| key == OLD), "another run's block"),
    );
}

#[test]
fn a_reused_number_is_not_the_old_run() {
    a_number_is_reused(seqlock!(seqlock), OLD, false, true);
}

#[test]
fn a_reused_number_is_not_yet_the_new_run() {
    a_number_is_reused(seqlock!(seqlock), NEW, false, true);
}

#[test]
fn a_number_reused_elsewhere_is_not_the_old_run() {
    a_number_is_reused(seqlock!(seqlock), OLD, true, true);
}

#[test]
fn storage_taken_before_the_lock_is_no_ones_but_its_owners() {
    storage_is_reused(seqlock!(seqlock), Taking::BeforeLock);
}

#[test]
fn storage_taken_under_the_lock_and_fenced_is_no_ones_but_its_owners() {
    storage_is_reused(seqlock!(seqlock), Taking::UnderLockWithFence);
}

fails! {
    another_runs_word_when_first_keys_are_not_compared:
        a_number_is_reused(seqlock!(seqlock), OLD, false, false) => "another run's word";
    another_runs_word_when_versions_are_not_compared:
        a_number_is_reused(seqlock!(version_is_not_compared), OLD, false, true) => "another run's word";
    another_runs_word_without_a_fence_in_lock:
        a_number_is_reused(seqlock!(lock_has_no_fence), OLD, false, true) => "another run's word";
    another_runs_block_when_versions_are_not_compared:
        storage_is_reused(seqlock!(version_is_not_compared), Taking::BeforeLock)
            => "another run's block";
    // The lock's fence came before the storage was taken and does not order its former owner's
    // version before what is written there. `storage.rs` relies on the processor for that.
    another_runs_block_when_taken_under_the_lock:
        storage_is_reused(seqlock!(seqlock), Taking::UnderLock) => "another run's block";
}
