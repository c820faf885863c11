//! The hash table: a run that stays is found, whatever happens around it.

use loom::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use crate::{fails, race};

/// The types of one `heads.rs`.
pub(crate) trait Heads: 'static {
    type Table: Send + Sync;
    type Load: Default + Send;
    fn table(slots: usize) -> Self::Table;
    fn candidates(table: &Self::Table, tag: u32) -> Vec<u32>;
    fn insert(
        load: &mut Self::Load,
        table: &Self::Table,
        tag: u32,
        run: u32,
    ) -> Option<Self::Table>;
    fn remove(load: &mut Self::Load, table: &Self::Table, tag: u32, run: u32);
}

macro_rules! heads {
    ($($name:ident = $module:ident;)*) => {$(
        pub(crate) struct $name;

        impl Heads for $name {
            type Table = crate::$module::Table;
            type Load = crate::$module::Load;

            fn table(slots: usize) -> Self::Table {
                Self::Table::new(slots)
            }

            fn candidates(table: &Self::Table, tag: u32) -> Vec<u32> {
                table.candidates(tag).collect()
            }

            fn insert(
                load: &mut Self::Load, table: &Self::Table, tag: u32, run: u32,
            ) -> Option<Self::Table> {
                load.insert(table, tag, run)
            }

            fn remove(load: &mut Self::Load, table: &Self::Table, tag: u32, run: u32) {
                load.remove(table, tag, run);
            }
        }
    )*};
}

heads! {
    Real = heads;
    InsertIsRelaxed = insert_is_relaxed;
    SearchIsRelaxed = search_is_relaxed;
    SearchEndsAtTombstones = search_ends_at_tombstones;
    RemoveLeavesNoTombstone = remove_leaves_no_tombstone;
    CopyIsEmpty = copy_is_empty;
}

/// Slots; a table of so many has room for three runs. Tags that are multiples collide.
const SLOTS: u32 = 4;

/// A shard: what its writers lock, and the table that the readers' snapshot names.
pub(crate) struct Shard<H: Heads> {
    load: Mutex<H::Load>,
    table: Mutex<Arc<H::Table>>,
}

impl<H: Heads> Shard<H> {
    /// A shard with these runs, whose tags all begin their search at the same slot.
    pub(crate) fn new(runs: impl IntoIterator<Item = u32>) -> Self {
        let (mut load, table) = (H::Load::default(), H::table(SLOTS as usize));
        for run in runs {
            assert!(H::insert(&mut load, &table, tag(run), run).is_none());
        }
        Self { load: Mutex::new(load), table: Mutex::new(Arc::new(table)) }
    }

    pub(crate) fn snapshot(&self) -> Arc<H::Table> {
        Arc::clone(&self.table.lock().unwrap())
    }

    /// Publishes a run, unless `refuse` says no, which is asked while nobody else writes.
    pub(crate) fn insert(
        &self,
        tag: u32,
        run: u32,
        refuse: impl FnOnce(&H::Table) -> bool,
    ) -> bool {
        let mut load = self.load.lock().unwrap();
        let table = self.snapshot();
        if refuse(&table) {
            return false;
        }
        if let Some(new) = H::insert(&mut load, &table, tag, run) {
            *self.table.lock().unwrap() = Arc::new(new);
        }
        true
    }

    pub(crate) fn remove(&self, tag: u32, run: u32) {
        let mut load = self.load.lock().unwrap();
        H::remove(&mut load, &self.snapshot(), tag, run);
    }

    fn finds(&self, run: u32) -> bool {
        H::candidates(&self.snapshot(), tag(run)) == [run]
    }
}

fn tag(run: u32) -> u32 {
    run * SLOTS
}

/// Beside run 1 others come and go in the slots before and behind it.
fn a_run_stays<H: Heads>() {
    race(
        || Shard::<H>::new([0, 1]),
        [
            Box::new(|shard: &Shard<H>| {
                shard.remove(tag(0), 0);
                // In the slot of the removed one, and then in a new one.
                shard.insert(tag(2), 2, |_| false);
                shard.insert(tag(3), 3, |_| false);
                shard.remove(tag(2), 2);
                true
            }),
            Box::new(|shard| shard.finds(1)),
        ],
        |shard, [_, found]| {
            assert!(found && [1, 3].iter().all(|run| shard.finds(*run)), "a run is not found");
        },
    );
}

/// The table is full: it is copied, and the copy goes on to change.
fn a_run_stays_while_its_table_is_copied<H: Heads>() {
    race(
        || Shard::<H>::new([0, 1, 2]),
        [
            Box::new(|shard: &Shard<H>| {
                shard.insert(tag(3), 3, |_| false);
                shard.remove(tag(0), 0);
                true
            }),
            Box::new(|shard| shard.finds(1)),
        ],
        |shard, [_, found]| assert!(found && shard.finds(1), "a run is not found"),
    );
}

/// Two writers, one of whom copies. `swap_late`: the copy appears when others may write again.
fn no_run_is_lost<H: Heads>(swap_late: bool) {
    let insert = move |shard: &Shard<H>, run: u32| {
        if !swap_late {
            shard.insert(tag(run), run, |_| false);
            return;
        }
        let mut load = shard.load.lock().unwrap();
        let new = H::insert(&mut load, &shard.snapshot(), tag(run), run);
        drop(load);
        if let Some(new) = new {
            *shard.table.lock().unwrap() = Arc::new(new);
        }
    };
    race(
        || Shard::<H>::new([0, 1, 2]),
        [
            Box::new(move |shard: &Shard<H>| insert(shard, 3)),
            Box::new(move |shard| insert(shard, 4)),
        ],
        |shard, _| assert!((0..5).all(|run| shard.finds(run)), "a run is not found"),
    );
}

/// Who gets a run's number sees what was written before it was published.
fn a_number_brings_its_header<H: Heads>() {
    race(
        || (H::table(SLOTS as usize), AtomicU64::new(0)),
        [
            Box::new(|(table, header): &(H::Table, AtomicU64)| {
                header.store(1, Ordering::Relaxed);
                H::insert(&mut H::Load::default(), table, tag(1), 1);
                true
            }),
            Box::new(|(table, header)| {
                H::candidates(table, tag(1)).is_empty() || header.load(Ordering::Relaxed) == 1
            }),
        ],
        |_, [_, whole]| assert!(whole, "no header"),
    );
}

#[test]
fn a_run_that_stays_is_found() {
    a_run_stays::<Real>();
}

#[test]
fn a_run_that_stays_is_found_during_a_copy() {
    a_run_stays_while_its_table_is_copied::<Real>();
}

#[test]
fn two_writers_lose_no_run() {
    no_run_is_lost::<Real>(false);
}

#[test]
fn a_number_is_published_after_its_header() {
    a_number_brings_its_header::<Real>();
}

fails! {
    not_found_when_search_ends_at_tombstones:
        a_run_stays::<SearchEndsAtTombstones>() => "a run is not found";
    not_found_when_remove_leaves_no_tombstone:
        a_run_stays::<RemoveLeavesNoTombstone>() => "a run is not found";
    not_found_when_the_copy_is_empty:
        a_run_stays_while_its_table_is_copied::<CopyIsEmpty>() => "a run is not found";
    lost_when_the_copy_appears_late: no_run_is_lost::<Real>(true) => "a run is not found";
    no_header_when_insert_is_relaxed: a_number_brings_its_header::<InsertIsRelaxed>() => "no header";
    no_header_when_search_is_relaxed: a_number_brings_its_header::<SearchIsRelaxed>() => "no header";
}
