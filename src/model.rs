//! The vocabulary: identities, keys and states that every layer shares. No I/O, no dependencies.

use std::{fmt, sync::Arc};

/// A block's key in *our* hash space: a chained hash of the whole prefix that ends with the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(pub u64);

/// The opaque hash that an engine reported for a block. Byte hashes keep their last 8 bytes,
/// big-endian; signed integers keep their bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineKey(pub u64);

/// Dense number of a (pod, rank) row. Reused only after every trace of its former owner is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodSlot(pub u32);

/// Identity of a score row: a pod, and its data-parallel rank when one is declared or announced.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    /// Configured name, or the pod id of the topic.
    pub pod: Arc<str>,
    /// Absent only if neither the declaration nor a batch names one.
    pub rank: Option<u32>,
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "{}#{rank}", self.pod),
            None => f.write_str(&self.pod),
        }
    }
}

/// Dense number of a tier name in a [`TierTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TierId(pub u8);

/// How stores and removals of one engine key add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CountMode {
    /// Every store announces one physical copy, every removal ends one.
    #[default]
    Counted,
    /// A store is idempotent, one removal clears.
    Set,
}

/// What a pod's score can be trusted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PodState {
    /// Subscribed, nothing received yet.
    #[default]
    Connecting,
    /// Rebuilding from replay.
    Replaying,
    /// Every event since the start of this life of the engine is applied.
    Live,
    /// History before we joined is missing: scores may be low, never high.
    Partial,
    /// Removals may have been lost: scores may be high.
    Degraded,
}

impl PodState {
    /// Every state, in the order of its label.
    pub const ALL: [Self; 5] =
        [Self::Connecting, Self::Replaying, Self::Live, Self::Partial, Self::Degraded];

    /// Label value for metrics and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Replaying => "replaying",
            Self::Live => "live",
            Self::Partial => "partial",
            Self::Degraded => "degraded",
        }
    }
}

/// What an attention group of a hybrid model asks of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Full attention (also MLA, sink-full, and events without a group): every block of the prefix.
    Full,
    /// Sliding window of this many tokens: only the blocks that end the prefix.
    Sliding {
        /// Width in tokens, at least 1.
        window: u32,
    },
    /// Mamba, chunked, cross, encoder: not scored; the pod is flagged.
    Unsupported,
}

/// One extra hash input of an engine block, as the engine reports it beside the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// A bare string: LoRA name, multimodal identifier (vLLM 0.17–0.18) or cache salt.
    Text(&'a str),
    /// A multimodal item and where it starts, in tokens relative to the block's first token.
    Item {
        /// The item's content hash.
        id: &'a str,
        /// May be negative: the item began in an earlier block.
        offset: i64,
    },
    /// A digest of prompt embeddings.
    Bytes(&'a [u8]),
}

/// Tier names, dense ids and weights. At most [`TierTable::MAX`] names; later ones share `other`.
#[derive(Debug)]
pub struct TierTable {
    names: std::sync::RwLock<Vec<(Arc<str>, f64)>>,
    configured: Vec<(Arc<str>, f64)>,
    unlisted: f64,
}

impl TierTable {
    /// Names per server, `other` included.
    pub const MAX: usize = 16;
    /// Tier of a store without medium.
    pub const GPU: TierId = TierId(0);
    const OTHER: &'static str = "other";
    const DEFAULTS: [(&'static str, f64); 7] = [
        ("gpu", 1.0),
        ("cpu", 0.8),
        ("disk", 0.5),
        ("fs", 0.5),
        ("storage", 0.5),
        ("object", 0.3),
        ("external", 0.3),
    ];

    /// A table with the default weights, overridden and extended by `configured`; names that are
    /// in neither weigh `unlisted`.
    #[must_use]
    pub fn new(configured: &[(String, f64)], unlisted: f64) -> Self {
        let mut all: Vec<(Arc<str>, f64)> =
            Self::DEFAULTS.iter().map(|&(name, weight)| (Arc::from(name), weight)).collect();
        for (name, weight) in configured {
            let name = Self::normalize(name);
            match all.iter_mut().find(|(known, _)| **known == *name) {
                Some(entry) => entry.1 = *weight,
                None => all.push((Arc::from(name.as_str()), *weight)),
            }
        }
        let gpu = all.first().cloned().into_iter().collect();
        Self { names: std::sync::RwLock::new(gpu), configured: all, unlisted }
    }

    /// The id of a medium as the wire names it, assigned at first sight. Lower-cased;
    /// `cpu_pinned` is `cpu`; absent or empty is `gpu`.
    #[must_use]
    pub fn id(&self, medium: Option<&str>) -> TierId {
        let medium = medium.unwrap_or_default();
        if medium.is_empty() || medium == "GPU" || medium == "gpu" {
            return Self::GPU;
        }
        let name = Self::normalize(medium);
        let find = |names: &[(Arc<str>, f64)]| {
            names.iter().position(|(known, _)| **known == *name).map(|at| TierId(at as u8))
        };
        if let Some(id) = find(&self.read()) {
            return id;
        }
        let mut names = match self.names.write() {
            Ok(names) => names,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(id) = find(&names) {
            return id;
        }
        if names.len() >= Self::MAX {
            return TierId((Self::MAX - 1) as u8);
        }
        let entry = if names.len() == Self::MAX - 1 {
            (Arc::from(Self::OTHER), self.unlisted)
        } else {
            self.configured
                .iter()
                .find(|(known, _)| **known == *name)
                .cloned()
                .unwrap_or_else(|| (Arc::from(name.as_str()), self.unlisted))
        };
        names.push(entry);
        TierId((names.len() - 1) as u8)
    }

    /// The tier's name; `other` for an id that was never given out.
    #[must_use]
    pub fn name(&self, id: TierId) -> Arc<str> {
        let names = self.read();
        names.get(usize::from(id.0)).map_or_else(|| Arc::from(Self::OTHER), |(n, _)| Arc::clone(n))
    }

    /// Weights by id; ids that were not given out weigh `unlisted`.
    #[must_use]
    pub fn weights(&self) -> [f64; Self::MAX] {
        let mut weights = [self.unlisted; Self::MAX];
        for (slot, (_, weight)) in weights.iter_mut().zip(self.read().iter()) {
            *slot = *weight;
        }
        weights
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<(Arc<str>, f64)>> {
        match self.names.read() {
            Ok(names) => names,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    fn normalize(medium: &str) -> String {
        let name: String = medium.chars().take(64).flat_map(char::to_lowercase).collect();
        if name == "cpu_pinned" { "cpu".to_owned() } else { name }
    }
}

impl Default for TierTable {
    fn default() -> Self {
        Self::new(&[], 0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_normalized_and_bounded() {
        let table = TierTable::default();
        assert_eq!(table.id(None), TierTable::GPU);
        assert_eq!(table.id(Some("CPU_PINNED")), table.id(Some("cpu")));
        assert!((table.weights()[usize::from(table.id(Some("CPU")).0)] - 0.8).abs() < 1e-6);
        for i in 0..40 {
            let id = table.id(Some(&format!("tier-{i}")));
            assert!(usize::from(id.0) < TierTable::MAX);
        }
        assert_eq!(&*table.name(table.id(Some("tier-39"))), "other");
        assert_eq!(&*table.name(table.id(Some("tier-3"))), "tier-3");
    }
}
