//! Which blocks every endpoint was last sent.
//!
//! # Cost
//!
//! Matching asks each endpoint for about log₂(blocks) of a prompt's blocks, with no lock anywhere; a
//! prompt that nobody or everybody knows costs one or two questions per endpoint. Memory: 27 to 37
//! bytes per block and endpoint; 64 endpoints with 31 250 blocks each take 64 MiB.

use std::sync::Arc;

use super::{hashing::Chains, recency::Recency};
use crate::epp::{
    datalayer::{Endpoint, EndpointId, Endpoints},
    plugins::lives::Lives,
};

/// The blocks of every endpoint.
#[derive(Debug)]
pub struct PrefixStore {
    lives: Lives<Recency>,
}

impl PrefixStore {
    /// A store that knows nothing; `endpoints` says who lives.
    #[must_use]
    pub fn new(endpoints: &Arc<Endpoints>) -> Self {
        Self { lives: Lives::new(endpoints) }
    }

    /// How many leading blocks of the chains, taken together, each of `endpoints` was sent.
    #[must_use]
    pub fn matches(&self, chains: &Chains, endpoints: &[Arc<Endpoint>]) -> Vec<u32> {
        let lives = self.lives.read();
        let depth = |endpoint: &Arc<Endpoint>| {
            let Some(recency) = lives.get(endpoint.id()) else { return 0 };
            chains.iter().map(|chain| recency.depth(chain)).sum::<usize>() as u32
        };
        endpoints.iter().map(depth).collect()
    }

    /// Remembers that an endpoint was sent the chains. `capacity` counts when it is sent the first
    /// ones. Gives by how many blocks the store has grown.
    pub fn insert(&self, endpoint: EndpointId, chains: &Chains, capacity: usize) -> usize {
        let recency = self.lives.get_or_make(endpoint, || Recency::new(capacity));
        recency.map_or(0, |recency| chains.iter().map(|chain| recency.insert(chain)).sum())
    }

    /// Forgets an endpoint for good. Gives by how many blocks the store has shrunk.
    pub fn remove(&self, endpoint: EndpointId) -> usize {
        self.lives.remove(endpoint).map_or(0, |recency| recency.close())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicI64, Ordering::Relaxed},
        thread,
    };

    use xxhash_rust::xxh3::xxh3_64;

    use super::*;
    use crate::epp::plugins::prefix::testing::{info, pods};

    fn chain(salt: u64, blocks: u64) -> Chains {
        let hashes: Vec<u64> =
            (0..blocks).map(|block| xxh3_64(&(salt << 32 | block).to_le_bytes())).collect();
        let mut chains = Chains::default();
        chains.push(&hashes);
        chains
    }

    #[test]
    fn each_endpoint_has_its_own() {
        let endpoints = pods(3);
        let (store, list) = (PrefixStore::new(&endpoints), endpoints.list());
        let (long, short) = (chain(1, 8), chain(1, 5));
        assert_eq!(store.insert(list[0].id(), &short, 100), 5);
        assert_eq!(store.insert(list[2].id(), &long, 100), 8);
        assert_eq!(store.matches(&long, &list), [5, 0, 8]);
        assert_eq!(store.matches(&short, &list), [5, 0, 5]);
        assert_eq!(store.matches(&chain(2, 8), &list), [0, 0, 0]);
        // The capacity of the first time stays.
        assert_eq!(store.insert(list[0].id(), &chain(3, 500), 7), 95);

        let mut both = chain(1, 3);
        both.push(chain(4, 2).iter().next().unwrap());
        assert_eq!(store.insert(list[1].id(), &both, 100), 5);
        assert_eq!(store.matches(&both, &list), [0, 5, 3], "chains are matched apart");

        endpoints.remove(&info(2).name);
        assert_eq!(store.remove(list[2].id()), 8);
        assert_eq!(store.insert(list[2].id(), &long, 100), 0, "it is gone");
        assert_eq!(store.matches(&long, &list), [0, 3, 0]);
    }

    /// Readers, writers and removals at once: nobody panics or waits for ever, the count of blocks
    /// adds up, and what was sent last is known.
    #[test]
    fn threads_do_not_disturb_each_other() {
        let endpoints = pods(4);
        let store = PrefixStore::new(&endpoints);
        let (size, list) = (AtomicI64::new(0), endpoints.list());
        thread::scope(|scope| {
            for salt in 0..4_u64 {
                let (store, size, list) = (&store, &size, &list);
                scope.spawn(move || {
                    for round in 0..200 {
                        let pod = &list[(round % 3) as usize];
                        let prompt = chain(salt * 1000 + round % 20, 100 + round);
                        size.fetch_add(store.insert(pod.id(), &prompt, 2000) as i64, Relaxed);
                        let matched = store.matches(&prompt, list);
                        assert_eq!(matched.len(), 4);
                        assert!(matched.iter().all(|&depth| u64::from(depth) <= 100 + round));
                        assert_eq!(matched[3], 0, "was sent nothing");
                    }
                });
            }
            let (store, size, list, endpoints) = (&store, &size, &list, &endpoints);
            scope.spawn(move || {
                endpoints.remove(&info(2).name);
                size.fetch_sub(store.remove(list[2].id()) as i64, Relaxed);
            });
        });
        let held: usize = store.lives.read().all().map(|recency| recency.hashes().len()).sum();
        assert_eq!(size.load(Relaxed), held as i64);
        assert_eq!(store.remove(list[0].id()) + store.remove(list[1].id()), held);
        let last = chain(7, 50);
        let other = PrefixStore::new(&endpoints);
        other.insert(list[0].id(), &last, 2000);
        assert_eq!(other.matches(&last, &list)[0], 50);
    }
}
