//! Two writers want the same key after the same block, and one of them creates it.
//!
//! What a writer does is a turn of `Runs::lay` in `storage.rs`: under the parent's lock it looks for
//! the key behind the block and among the heads; else it appends it to the parent, or, if it may
//! not, begins a new run. At the start of a prompt there is no parent, and `Runs::publish` decides.

use loom::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    Side, fails, race_within,
    tables::{Heads, Real},
    versions::{Seqlock, seqlock},
};

const KEY: u64 = 7;
const TAG: u32 = 4;

/// Where the key is created.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// Both may append.
    Parent,
    /// One may append; somebody else holds all of the run for the other one.
    ParentOrRun,
    /// No one has room in the parent, and new runs do not check for one another.
    Run,
    /// There is no parent.
    Start,
}

struct Parent {
    version: AtomicU64,
    length: AtomicU64,
    /// The key behind the block, if `length` says that there is one.
    next: AtomicU64,
    heads: <Real as Heads>::Table,
    load: Mutex<<Real as Heads>::Load>,
    /// First keys of runs 0 and 1.
    firsts: [AtomicU64; 2],
}

impl Parent {
    fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            length: AtomicU64::new(0),
            next: AtomicU64::new(0),
            heads: Real::table(4),
            load: Mutex::default(),
            firsts: [0; 2].map(AtomicU64::new),
        }
    }

    fn has_head(&self) -> bool {
        let is_it = |run: u32| self.firsts[run as usize].load(Ordering::Relaxed) == KEY;
        Real::candidates(&self.heads, TAG).into_iter().any(is_it)
    }

    fn begin_run(&self, run: u32, check: bool) -> bool {
        self.firsts[run as usize].store(KEY, Ordering::Relaxed);
        let mut load = self.load.lock().unwrap();
        if check && self.has_head() {
            return false;
        }
        Real::insert(&mut load, &self.heads, TAG, run);
        true
    }

    fn lay(&self, may_append: bool, run: u32, check: bool) -> bool {
        let length = self.length.load(Ordering::Relaxed);
        let is_next = length > 0 && self.next.load(Ordering::Relaxed) == KEY;
        if is_next || self.has_head() {
            return false;
        }
        if may_append && length == 0 {
            self.next.store(KEY, Ordering::Relaxed);
            self.length.store(length + 1, Ordering::Relaxed);
            return true;
        }
        self.begin_run(run, check)
    }
}

/// `guard`: the parent is locked; at the start of a prompt, publishing looks for the key again.
fn one_creates(seqlock: Seqlock, place: Place, guard: bool) {
    let create = move |parent: &Parent, run: u32| {
        if place == Place::Start {
            return !parent.has_head() && parent.begin_run(run, guard);
        }
        let may_append = match place {
            Place::Parent => true,
            Place::ParentOrRun => run == 0,
            Place::Run | Place::Start => false,
        };
        if !guard {
            return parent.lay(may_append, run, place != Place::Run);
        }
        let version = (seqlock.lock)(&parent.version);
        let created = parent.lay(may_append, run, place != Place::Run);
        (seqlock.unlock)(&parent.version, version);
        created
    };
    let sides: [Side<_, _>; 2] = [
        Box::new(move |parent: &Parent| create(parent, 0)),
        Box::new(move |parent: &Parent| create(parent, 1)),
    ];
    race_within(Some(3), Parent::new, sides, |_, created| {
        assert_eq!(created.map(usize::from).iter().sum::<usize>(), 1, "creators");
    });
}

#[test]
fn one_of_two_appends() {
    one_creates(seqlock!(seqlock), Place::Parent, true);
}

#[test]
fn one_appends_or_the_other_begins_a_run() {
    one_creates(seqlock!(seqlock), Place::ParentOrRun, true);
}

#[test]
fn one_of_two_begins_a_run() {
    one_creates(seqlock!(seqlock), Place::Run, true);
}

#[test]
fn one_of_two_begins_a_prompt() {
    one_creates(seqlock!(seqlock), Place::Start, true);
}

fails! {
    both_append_without_the_lock:
        one_creates(seqlock!(seqlock), Place::Parent, false) => "creators";
    one_appends_and_one_begins_a_run_without_the_lock:
        one_creates(seqlock!(seqlock), Place::ParentOrRun, false) => "creators";
    both_begin_a_run_without_the_lock:
        one_creates(seqlock!(seqlock), Place::Run, false) => "creators";
    both_begin_a_prompt_without_a_second_look:
        one_creates(seqlock!(seqlock), Place::Start, false) => "creators";
    both_append_when_lock_is_relaxed:
        one_creates(seqlock!(lock_is_relaxed), Place::Parent, true) => "creators";
    both_append_when_lock_does_not_wait:
        one_creates(seqlock!(lock_does_not_wait), Place::Parent, true) => "creators";
}
