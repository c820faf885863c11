//! The version word: readers see one write, writers take turns.

use loom::sync::atomic::{AtomicU64, Ordering};

use crate::{fails, race};

/// The functions of one `seqlock.rs`.
#[derive(Clone, Copy)]
pub(crate) struct Seqlock {
    pub(crate) lock: fn(&AtomicU64) -> u64,
    pub(crate) unlock: fn(&AtomicU64, u64),
    pub(crate) begin: fn(&AtomicU64) -> u64,
    pub(crate) unchanged: fn(&AtomicU64, u64) -> bool,
}

macro_rules! seqlock {
    ($module:ident) => {{
        use crate::$module::{begin, lock, unchanged, unlock};
        crate::versions::Seqlock { lock, unlock, begin, unchanged }
    }};
}
pub(crate) use seqlock;

struct Pair {
    version: AtomicU64,
    words: [AtomicU64; 2],
}

impl Pair {
    fn new() -> Self {
        Self { version: AtomicU64::new(0), words: [0; 2].map(AtomicU64::new) }
    }

    fn write(&self, seqlock: Seqlock, value: u64) {
        let version = (seqlock.lock)(&self.version);
        for word in &self.words {
            word.store(value, Ordering::Relaxed);
        }
        (seqlock.unlock)(&self.version, version);
    }

    /// Both words, if nobody came between.
    fn read(&self, seqlock: Seqlock) -> Option<[u64; 2]> {
        let version = (seqlock.begin)(&self.version);
        let [one, two] = &self.words;
        let read = [one.load(Ordering::Relaxed), two.load(Ordering::Relaxed)];
        (seqlock.unchanged)(&self.version, version).then_some(read)
    }
}

fn no_read_mixes_writes(seqlock: Seqlock) {
    race(
        Pair::new,
        [
            Box::new(move |pair: &Pair| {
                pair.write(seqlock, 1);
                pair.write(seqlock, 2);
                None
            }),
            Box::new(move |pair| pair.read(seqlock)),
        ],
        |_, [_, read]| assert!(read.is_none_or(|[one, two]| one == two), "mixed: {read:?}"),
    );
}

fn writers_exclude_each_other(seqlock: Seqlock) {
    let count = move |pair: &Pair| {
        let version = (seqlock.lock)(&pair.version);
        let seen = pair.words[0].load(Ordering::Relaxed);
        pair.words[0].store(seen + 1, Ordering::Relaxed);
        (seqlock.unlock)(&pair.version, version);
    };
    race(Pair::new, [Box::new(count), Box::new(count)], |pair, _| {
        assert_eq!(pair.words[0].load(Ordering::Relaxed), 2, "a turn is lost");
    });
}

/// `after`: the read begins when the writer has been joined.
fn the_last_write_is_seen(seqlock: Seqlock, after: bool) {
    race(
        Pair::new,
        [
            Box::new(move |pair: &Pair| {
                pair.write(seqlock, 1);
                pair.write(seqlock, 2);
                None
            }),
            Box::new(move |pair| if after { None } else { pair.read(seqlock) }),
        ],
        move |pair, [_, before]| {
            let read = if after { pair.read(seqlock) } else { before };
            assert_eq!(read, Some([2; 2]), "not the last write");
        },
    );
}

#[test]
fn a_consistent_read_is_of_one_write() {
    no_read_mixes_writes(seqlock!(seqlock));
}

#[test]
fn two_writers_take_turns() {
    writers_exclude_each_other(seqlock!(seqlock));
}

#[test]
fn after_the_writer_its_last_write_is_read() {
    the_last_write_is_seen(seqlock!(seqlock), true);
}

fails! {
    mixes_without_a_fence_in_lock: no_read_mixes_writes(seqlock!(lock_has_no_fence)) => "mixed";
    mixes_when_unlock_is_relaxed: no_read_mixes_writes(seqlock!(unlock_is_relaxed)) => "mixed";
    mixes_when_begin_is_relaxed: no_read_mixes_writes(seqlock!(begin_is_relaxed)) => "mixed";
    mixes_when_begin_does_not_wait: no_read_mixes_writes(seqlock!(begin_does_not_wait)) => "mixed";
    mixes_without_a_fence_in_unchanged:
        no_read_mixes_writes(seqlock!(unchanged_has_no_fence)) => "mixed";
    mixes_when_versions_are_not_compared:
        no_read_mixes_writes(seqlock!(version_is_not_compared)) => "mixed";
    a_turn_is_lost_when_lock_is_relaxed:
        writers_exclude_each_other(seqlock!(lock_is_relaxed)) => "a turn is lost";
    a_turn_is_lost_when_lock_does_not_wait:
        writers_exclude_each_other(seqlock!(lock_does_not_wait)) => "a turn is lost";
    a_turn_is_lost_when_unlock_is_relaxed:
        writers_exclude_each_other(seqlock!(unlock_is_relaxed)) => "a turn is lost";
    an_older_write_is_read_without_a_join:
        the_last_write_is_seen(seqlock!(seqlock), false) => "not the last write";
}
