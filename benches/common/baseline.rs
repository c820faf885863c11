//! The baseline that the index is measured against: one concurrent map from request key to pods, and
//! per pod a map from engine key to request key. What one writes first. It knows no tiers, groups,
//! copies, orphans or other block sizes, and so does less than the index does.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use dashmap::{DashMap, Entry};
use kv_indexer::{
    hash::Scheme,
    model::{EngineKey, PodSlot, RequestKey},
};
use smallvec::SmallVec;

/// Keys are hashes already; a multiplication spreads them over both ends of the word.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(self.0 ^ u64::from(byte)));
    }
    fn write_u64(&mut self, key: u64) {
        let product = u128::from(key) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

type Hash = BuildHasherDefault<KeyHasher>;
type Names = Mutex<HashMap<EngineKey, RequestKey, Hash>>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct MapIndex {
    scheme: Arc<Scheme>,
    blocks: DashMap<RequestKey, SmallVec<[PodSlot; 4]>, Hash>,
    pods: Vec<Names>,
}

impl MapIndex {
    pub(crate) fn new(pods: u32) -> Self {
        Self {
            scheme: super::scheme(),
            blocks: DashMap::default(),
            pods: (0..pods).map(|_| Mutex::default()).collect(),
        }
    }

    /// A dense store; of an unknown parent nothing is known.
    pub(crate) fn store(
        &self,
        pod: PodSlot,
        keys: &[EngineKey],
        parent: Option<EngineKey>,
        tokens: &[u32],
    ) {
        let mut names = self.pods[pod.0 as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = match parent {
            Some(parent) => match names.get(&parent) {
                Some(&key) => key,
                None => return,
            },
            None => self.scheme.root("model", ""),
        };
        let mut scratch = Vec::new();
        for (&name, tokens) in keys.iter().zip(tokens.chunks_exact(super::BLOCK as usize)) {
            before = self.scheme.next(before, tokens, &[], &mut scratch);
            names.insert(name, before);
            let mut pods = self.blocks.entry(before).or_default();
            if !pods.contains(&pod) {
                pods.push(pod);
            }
        }
    }

    pub(crate) fn remove(&self, pod: PodSlot, keys: &[EngineKey]) {
        let mut names = self.pods[pod.0 as usize].lock().unwrap_or_else(PoisonError::into_inner);
        for name in keys {
            let Some(key) = names.remove(name) else { continue };
            let Entry::Occupied(mut pods) = self.blocks.entry(key) else { continue };
            pods.get_mut().retain(|held| *held != pod);
            if pods.get().is_empty() {
                pods.remove();
            }
        }
    }

    /// The pods that hold `keys[0]`, and how many leading blocks they hold.
    pub(crate) fn depths(&self, keys: &[RequestKey], out: &mut Vec<(PodSlot, u32)>) {
        out.clear();
        let mut active: SmallVec<[PodSlot; 64]> = SmallVec::new();
        let mut depth = 0;
        for (at, key) in keys.iter().enumerate() {
            let Some(pods) = self.blocks.get(key) else { break };
            if at == 0 {
                active.extend_from_slice(&pods);
            } else if pods.len() < active.len() || active.iter().ne(pods.iter()) {
                active.retain(|pod| {
                    let goes_on = pods.contains(pod);
                    if !goes_on {
                        out.push((*pod, at as u32));
                    }
                    goes_on
                });
            }
            if active.is_empty() {
                return;
            }
            depth = at as u32 + 1;
        }
        out.extend(active.iter().map(|&pod| (pod, depth)));
    }
}
