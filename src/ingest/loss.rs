//! What becomes of a row's blocks when events were lost that may have been removals.
//!
//! # Model
//!
//! At a loss everything that the row holds is in doubt until the engine names it again
//! ([`BlockIndex::doubt`]), and the row counts by set semantics, so that each further removal heals.
//! The policy decides about what stays unconfirmed:
//!
//! * `keep`: it scores on. Nothing that the engine holds is missed, and phantoms stay until the
//!   engine removes their keys, clears, or begins a new life.
//! * `age-out`: it is dropped a *term* after the loss. Of the losses during a term the last one's term
//!   is waited for next, so that losses without end cannot keep phantoms alive: none lives longer than
//!   two terms after the loss that made it.
//! * `clear`: everything is dropped at once. Scores are low until the cache has turned over.
//!
//! # Cost
//!
//! Nothing but a branch per store and removal while there is no doubt. Dropping goes in slices
//! between the batches of the lane's other rows.

use std::time::{Duration, Instant};

use crate::{
    index::{BlockIndex, Dropped},
    model::PodSlot,
};

/// What is done about blocks that may be phantoms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LossPolicy {
    /// They stay.
    #[default]
    Keep,
    /// They go if the engine does not name them in time.
    AgeOut,
    /// They go at once, with all others.
    Clear,
}

impl LossPolicy {
    /// Every policy under its name in documents.
    pub const NAMES: [(&str, Self); 3] =
        [("keep", Self::Keep), ("age-out", Self::AgeOut), ("clear", Self::Clear)];

    /// Name in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, policy)| *policy == self).map_or("", |(name, _)| name)
    }
}

/// The policy of pods that declare none, and its term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LossConfig {
    /// The policy.
    pub policy: LossPolicy,
    /// Of `age-out`: from the loss until what is unconfirmed goes. Looked at twice a second.
    pub age_out: Duration,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self { policy: LossPolicy::Keep, age_out: Duration::from_secs(300) }
    }
}

/// One row's doubt, under its policy.
#[derive(Debug)]
pub(crate) struct Doubt {
    policy: LossPolicy,
    term: Duration,
    /// When the term under way ends, and the number of its doubt.
    due: Option<(Instant, u64)>,
    /// The same of the last loss during it.
    next: Option<(Instant, u64)>,
}

impl Doubt {
    pub(crate) fn new(config: &LossConfig, own: Option<LossPolicy>) -> Self {
        Self { policy: own.unwrap_or(config.policy), term: config.age_out, due: None, next: None }
    }

    /// Events were lost just now, before everything that is applied from here on.
    pub(crate) fn lost(&mut self, index: &dyn BlockIndex, slot: PodSlot, now: Instant) {
        match self.policy {
            LossPolicy::Keep => {
                index.doubt(slot);
            }
            LossPolicy::Clear => index.clear(slot),
            LossPolicy::AgeOut => {
                let doubt = index.doubt(slot);
                let due = now.checked_add(self.term).map(|due| (due, doubt));
                *(if self.due.is_none() { &mut self.due } else { &mut self.next }) = due;
            }
        }
    }

    /// Nothing from before is left.
    pub(crate) fn forget(&mut self) {
        (self.due, self.next) = (None, None);
    }

    /// Drops a slice of what is due. There is more only if there is anything to do at once.
    pub(crate) fn age(&mut self, index: &dyn BlockIndex, slot: PodSlot, now: Instant) -> Dropped {
        let Some((_, doubt)) = self.due.filter(|&(due, _)| due <= now) else {
            return Dropped::default();
        };
        let dropped = index.drop_unconfirmed(slot, doubt);
        if !dropped.more {
            self.due = self.next.take();
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hash::Models,
        index::{IndexConfig, PodSpec, Remove, Store, runs::RunIndex},
        model::{CountMode, EngineKey, RequestKey, TierTable},
    };

    /// A row that holds blocks 1 to 4 of one prompt, in doubt under a policy, with a term of 10 s.
    struct Fixture {
        index: RunIndex,
        slot: PodSlot,
        doubt: Doubt,
        start: Instant,
        tokens: Vec<u32>,
    }

    impl Fixture {
        fn new(policy: LossPolicy) -> Self {
            let index = RunIndex::new(IndexConfig::default());
            let scheme = Models::default().default;
            let spec = PodSpec { scheme, model: "m".into(), count_mode: CountMode::Counted };
            let slot = index.register(spec).unwrap();
            let config = LossConfig { policy: LossPolicy::Keep, age_out: Duration::from_secs(10) };
            let doubt = Doubt::new(&config, Some(policy));
            let it = Self { index, slot, doubt, start: Instant::now(), tokens: (0..64).collect() };
            it.store(1..=4);
            it
        }

        fn store(&self, keys: std::ops::RangeInclusive<u64>) {
            let from = *keys.start() as usize - 1;
            let parent = (from > 0).then_some(EngineKey(from as u64));
            let tokens = &self.tokens[from * 16..*keys.end() as usize * 16];
            let keys: Vec<EngineKey> = keys.map(EngineKey).collect();
            self.index.store(self.slot, &Store::simple(&keys, parent, tokens, 16));
        }

        fn lost(&mut self, seconds: u64) {
            let now = self.start + Duration::from_secs(seconds);
            self.doubt.lost(&self.index, self.slot, now);
        }

        /// Everything that is due.
        fn age(&mut self, seconds: u64) -> u64 {
            let now = self.start + Duration::from_secs(seconds);
            let mut blocks = 0;
            loop {
                let dropped = self.doubt.age(&self.index, self.slot, now);
                blocks += dropped.blocks;
                if !dropped.more {
                    return blocks;
                }
            }
        }

        /// Blocks held, and how many of them are in doubt.
        #[track_caller]
        fn check(&self, held: u64, unconfirmed: u64) {
            let usage = self.index.pod_usage(self.slot);
            assert_eq!((usage.blocks, usage.unconfirmed), (held, unconfirmed));
        }

        fn keys(&self) -> Vec<RequestKey> {
            let scheme = Models::default().default;
            let mut key = scheme.root("m", "");
            let next = self.tokens.chunks_exact(16).map(|tokens| {
                key = scheme.next(key, tokens, &[], &mut Vec::new());
                key
            });
            next.collect()
        }
    }

    #[test]
    fn names_are_those_of_documents() {
        assert_eq!(
            LossPolicy::NAMES.map(|(_, policy)| policy.as_str()),
            ["keep", "age-out", "clear"]
        );
    }

    #[test]
    fn keep_counts_what_is_in_doubt_and_drops_nothing() {
        let mut it = Fixture::new(LossPolicy::Keep);
        it.lost(0);
        it.check(4, 4);
        it.store(1..=2);
        it.check(4, 2);
        // A second loss puts all in doubt again.
        it.lost(1);
        it.check(4, 4);
        it.index.confirm(it.slot, &it.keys()[..3]);
        it.check(4, 1);
        let keys = [EngineKey(4)];
        let remove = Remove { keys: &keys, group: None, tier: TierTable::GPU, sequence: 9 };
        it.index.remove(it.slot, &remove);
        it.check(3, 0);
        assert_eq!(it.age(100_000), 0);
        it.check(3, 0);
    }

    #[test]
    fn age_out_drops_exactly_what_was_not_named() {
        let mut it = Fixture::new(LossPolicy::AgeOut);
        it.lost(0);
        it.store(1..=2);
        assert_eq!(it.age(9), 0);
        it.check(4, 2);
        assert_eq!(it.age(10), 2);
        it.check(2, 0);
        let keys = it.keys();
        let removed = |block: usize| it.index.removed_at(it.slot, keys[block]);
        assert_eq!((removed(1), removed(2)), (None, Some(crate::index::DROPPED)));
        assert_eq!(it.age(100), 0);
        it.check(2, 0);
    }

    #[test]
    fn losses_without_end_do_not_keep_phantoms() {
        let mut it = Fixture::new(LossPolicy::AgeOut);
        for second in 0..10 {
            it.lost(second);
            it.store(1..=2);
        }
        it.lost(9);
        it.store(1..=1);
        assert_eq!(it.age(10), 2, "what was never named again");
        it.check(2, 1);
        assert_eq!(it.age(18), 0);
        assert_eq!(it.age(19), 1, "what the last loss put in doubt");
        it.check(1, 0);
        // A clear ends what was under way.
        it.store(1..=4);
        it.lost(30);
        it.index.clear(it.slot);
        it.doubt.forget();
        it.store(1..=4);
        assert_eq!(it.age(100), 0);
        it.check(4, 0);
    }

    #[test]
    fn clear_leaves_nothing_of_before() {
        let mut it = Fixture::new(LossPolicy::Clear);
        it.lost(0);
        it.check(0, 0);
        it.store(1..=1);
        it.check(1, 0);
        assert_eq!(it.age(100), 0);
    }

    #[test]
    fn a_large_row_goes_in_slices() {
        let mut it = Fixture::new(LossPolicy::AgeOut);
        let blocks: u32 = 40_000;
        let tokens: Vec<u32> = (0..blocks * 16).map(|at| at + 1000).collect();
        let keys: Vec<EngineKey> = (0..u64::from(blocks)).map(|at| EngineKey(at + 100)).collect();
        it.index.store(it.slot, &Store::simple(&keys, None, &tokens, 16));
        it.lost(0);
        let now = it.start + Duration::from_secs(10);
        let first = it.doubt.age(&it.index, it.slot, now);
        assert!(first.more && (16_000..20_000).contains(&first.blocks), "{first:?}");
        assert_eq!(first.blocks + it.age(10), u64::from(blocks) + 4);
        it.check(0, 0);
        assert_eq!(it.index.usage().keys, 0);
    }
}
