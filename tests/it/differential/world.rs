//! A small universe in which random streams collide: few pods, few tokens, short paths.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use kv_indexer::{
    hash::{Algorithm, MultimodalItem, Prompt, Scheme},
    index::{
        Anchors, BlockIndex, Extras, ImageBuilder, PodSpec, Remove, RowImage, Store, StoreOutcome,
    },
    model::{CountMode, EngineKey, ExtraKey, GroupKind, PodSlot, RequestKey, TierId},
};
use proptest::prelude::*;

pub(super) const PODS: usize = 3;

/// Tokens per request block and per engine block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) request: u32,
    pub(super) engine: u32,
}

pub(super) fn sizes() -> impl Strategy<Value = Sizes> {
    prop_oneof![
        4 => Just((4, 4)),
        2 => Just((4, 2)),
        2 => Just((2, 4)),
        1 => Just((6, 4)),
        1 => Just((4, 6)),
        1 => Just((5, 3)),
        1 => Just((8, 2)),
        1 => Just((1, 3)),
    ]
    .prop_map(|(request, engine)| Sizes { request, engine })
}

/// A random operation; the numbers choose among what the world knows by then.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Store {
        pod: usize,
        group: usize,
        parent: usize,
        contents: Vec<u8>,
        tier: u8,
        extra: u8,
        lora: bool,
        shape: Shape,
        /// Distinguishes engine keys of equal prefixes.
        variant: u8,
    },
    Remove {
        pod: usize,
        group: usize,
        block: usize,
        count: usize,
        tier: u8,
    },
    /// The same block is removed as it was stored: most removals of real engines.
    RemoveKnown {
        pod: usize,
        block: usize,
    },
    Clear {
        pod: usize,
    },
    Mode {
        pod: usize,
        set: bool,
    },
    Mute {
        pod: usize,
        muted: bool,
    },
    Speculate {
        pod: usize,
        path: usize,
        length: usize,
        mark: u64,
    },
    Unspeculate {
        pod: usize,
        path: usize,
        length: usize,
        mark: u64,
    },
    ExpireOrphans {
        pod: usize,
    },
    Doubt {
        pod: usize,
    },
    DropUnconfirmed {
        pod: usize,
        doubt: u64,
    },
    Confirm {
        pod: usize,
        path: usize,
        length: usize,
    },
    /// The row is exported and restored in place.
    Restore {
        pod: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Shape {
    Dense,
    /// All tokens, every second key.
    Sparse,
    /// Keys of a known path, no tokens.
    Placeholder,
    /// Dense, but the parent's event is left out.
    Orphan,
    /// Dense, under the engine key of another block.
    Conflict,
}

/// As [`ops`], for rows that others write beside, or where there is no room: restoring asks for an
/// index that nobody else writes to.
pub(super) fn ops_beside(length: usize, pods: usize) -> impl Strategy<Value = Vec<Op>> {
    ops(length, pods).prop_map(|mut ops| {
        ops.retain(|op| !matches!(op, Op::Restore { .. }));
        ops
    })
}

pub(super) fn ops(length: usize, pods: usize) -> impl Strategy<Value = Vec<Op>> {
    let pod = 0..pods;
    let shape = prop_oneof![
        8 => Just(Shape::Dense),
        2 => Just(Shape::Sparse),
        2 => Just(Shape::Placeholder),
        2 => Just(Shape::Orphan),
        1 => Just(Shape::Conflict),
    ];
    let contents = prop::collection::vec(0u8..3, 1..4);
    let group = prop_oneof![5 => Just(0usize), 2 => Just(1usize), 3 => 2..5usize];
    let store = (
        (pod.clone(), group.clone(), any::<usize>(), contents),
        (prop_oneof![4 => Just(0u8), 1 => 1u8..3], prop_oneof![3 => Just(0u8), 1 => 1u8..6]),
        (prop::bool::weighted(0.2), shape, prop_oneof![4 => Just(0u8), 1 => Just(1u8)]),
    )
        .prop_map(|((pod, group, parent, contents), (tier, extra), (lora, shape, variant))| {
            Op::Store { pod, group, parent, contents, tier, extra, lora, shape, variant }
        });
    let remove = (pod.clone(), group, any::<usize>(), 1..4usize, 0u8..3)
        .prop_map(|(pod, group, block, count, tier)| Op::Remove { pod, group, block, count, tier });
    let path = (pod.clone(), any::<usize>(), 1..6usize, 1..4u64);
    let op = prop_oneof![
        20 => store,
        2 => remove,
        12 => (pod.clone(), any::<usize>()).prop_map(|(pod, block)| Op::RemoveKnown { pod, block }),
        1 => pod.clone().prop_map(|pod| Op::Clear { pod }),
        1 => (pod.clone(), any::<bool>()).prop_map(|(pod, set)| Op::Mode { pod, set }),
        1 => (pod.clone(), any::<bool>()).prop_map(|(pod, muted)| Op::Mute { pod, muted }),
        2 => path.clone().prop_map(|(pod, path, length, mark)|
            Op::Speculate { pod, path, length, mark }),
        1 => path.clone().prop_map(|(pod, path, length, mark)|
            Op::Unspeculate { pod, path, length, mark }),
        1 => pod.clone().prop_map(|pod| Op::ExpireOrphans { pod }),
        2 => pod.clone().prop_map(|pod| Op::Doubt { pod }),
        1 => (pod.clone(), 0..6u64).prop_map(|(pod, doubt)| Op::DropUnconfirmed { pod, doubt }),
        2 => path.prop_map(|(pod, path, length, _)| Op::Confirm { pod, path, length }),
        2 => pod.prop_map(|pod| Op::Restore { pod }),
    ];
    prop::collection::vec(op, 1..length)
}

/// A prefix as a client would describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Path {
    lora: String,
    tokens: Vec<u32>,
    salt: String,
    items: Vec<(String, u32, u32)>,
    variant: u8,
}

impl Path {
    fn engine_key(&self) -> EngineKey {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        EngineKey(hasher.finish())
    }

    fn keys(&self, request: u32) -> Vec<RequestKey> {
        let multimodal: Vec<MultimodalItem> = self
            .items
            .iter()
            .map(|(hash, offset, length)| MultimodalItem {
                hash: hash.clone(),
                offset: *offset,
                length: *length,
            })
            .collect();
        let prompt = Prompt {
            model: "m",
            lora: &self.lora,
            tokens: &self.tokens,
            cache_salt: &self.salt,
            multimodal: &multimodal,
        };
        prompt.keys(&Scheme::new(Algorithm::Xxh3, "seed", request)).unwrap()
    }
}

/// An operation made concrete; applied to the subject and to the oracle alike.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) pod: usize,
    what: What,
}

impl Event {
    pub(super) fn names_a_key_twice(&self) -> bool {
        let What::Store { keys, .. } = &self.what else { return false };
        (1..keys.len()).any(|at| keys[..at].contains(&keys[at]))
    }
}

#[derive(Clone, Debug)]
enum What {
    Store {
        keys: Vec<EngineKey>,
        parent: Option<EngineKey>,
        tokens: Vec<u32>,
        lora: Option<String>,
        extras: Vec<Vec<OwnedExtra>>,
        group: usize,
        tier: u8,
    },
    Remove {
        keys: Vec<EngineKey>,
        group: usize,
        tier: u8,
        sequence: u64,
    },
    Clear,
    Mode(CountMode),
    Mute(bool),
    Speculate(Vec<RequestKey>, u64),
    Unspeculate(Vec<RequestKey>, u64),
    ExpireOrphans,
    Doubt,
    DropUnconfirmed(u64),
    Confirm(Vec<RequestKey>),
    Restore,
}

#[derive(Clone, Debug)]
enum OwnedExtra {
    Text(&'static str),
    Item(&'static str, i64),
    Bytes(&'static [u8]),
}

/// What the stream named so far.
#[derive(Debug)]
pub(super) struct World {
    sizes: Sizes,
    slots: BTreeMap<usize, PodSlot>,
    /// Every path of every pod, with its engine key: pods share prefixes.
    paths: Vec<(Path, EngineKey)>,
    /// The engine keys of `paths`.
    known: BTreeSet<EngineKey>,
    /// The keys of every path, and of what goes on beyond it.
    queries: BTreeSet<Vec<RequestKey>>,
    /// Streams have a window group.
    windows: bool,
    stored: Vec<Vec<(EngineKey, usize, u8)>>,
    sequence: u64,
}

/// The one of [`group`] that slides.
const WINDOW_GROUP: usize = 2;

/// Attention groups: none, full, sliding, full, unsupported.
fn group(at: usize) -> (Option<u32>, Option<GroupKind>) {
    match at {
        0 => (None, None),
        1 => (Some(0), Some(GroupKind::Full)),
        2 => (Some(1), Some(GroupKind::Sliding { window: 8 })),
        3 => (Some(2), Some(GroupKind::Full)),
        _ => (Some(3), Some(GroupKind::Unsupported)),
    }
}

const TIERS: [&str; 3] = ["gpu", "cpu", "disk"];

impl World {
    pub(super) fn new(sizes: Sizes, pods: usize) -> Self {
        Self {
            sizes,
            slots: BTreeMap::new(),
            paths: Vec::new(),
            known: BTreeSet::new(),
            queries: BTreeSet::new(),
            windows: true,
            stored: vec![Vec::new(); pods],
            sequence: 0,
        }
    }

    /// From now on, what would be in the window group is in the full one before it.
    pub(super) fn without_windows(&mut self) {
        self.windows = false;
    }

    pub(super) fn has_windows(&self) -> bool {
        self.windows
    }

    /// The pod begins anew: nothing that it stored is there to be removed.
    pub(super) fn forget(&mut self, pod: usize) {
        self.stored[pod].clear();
    }

    pub(super) fn slot(&self, pod: usize) -> PodSlot {
        self.slots[&pod]
    }

    pub(super) fn add(&mut self, pod: usize, slot: PodSlot) {
        self.slots.insert(pod, slot);
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = PodSlot> + '_ {
        self.slots.values().copied()
    }

    /// The keys of every path that the stream named, and of one that goes on beyond each.
    pub(super) fn queries(&self) -> impl Iterator<Item = &Vec<RequestKey>> {
        self.queries.iter()
    }

    pub(super) fn event(&mut self, op: &Op) -> Event {
        self.sequence += 1;
        let request = self.sizes.request;
        let (pod, what) = match op {
            Op::Store { pod, .. } => (*pod, self.store(op)),
            Op::Remove { pod, group, block, count, tier } => {
                let group = &self.group(*group);
                let keys = (0..*count)
                    .filter_map(|at| pick(&self.paths, block.wrapping_add(at)))
                    .map(|(_, key)| *key)
                    .collect();
                let (group, tier) = (*group, *tier);
                (*pod, What::Remove { keys, group, tier, sequence: self.sequence })
            }
            Op::RemoveKnown { pod, block } => {
                let stored = &mut self.stored[*pod];
                let at = block.checked_rem(stored.len());
                let (keys, group, tier) = match at {
                    Some(at) => {
                        let (key, group, tier) = stored.swap_remove(at);
                        (vec![key], group, tier)
                    }
                    None => (Vec::new(), 0, 0),
                };
                (*pod, What::Remove { keys, group, tier, sequence: self.sequence })
            }
            Op::Clear { pod } => {
                self.stored[*pod].clear();
                (*pod, What::Clear)
            }
            Op::Mode { pod, set } => {
                (*pod, What::Mode(if *set { CountMode::Set } else { CountMode::Counted }))
            }
            Op::Mute { pod, muted } => (*pod, What::Mute(*muted)),
            Op::Speculate { pod, path, length, mark } => {
                let keys = pick(&self.paths, *path).map_or_else(Vec::new, |(p, _)| p.keys(request));
                (*pod, What::Speculate(keys.into_iter().take(*length).collect(), *mark))
            }
            Op::Unspeculate { pod, path, length, mark } => {
                let keys = pick(&self.paths, *path).map_or_else(Vec::new, |(p, _)| p.keys(request));
                (*pod, What::Unspeculate(keys.into_iter().take(*length).collect(), *mark))
            }
            Op::ExpireOrphans { pod } => (*pod, What::ExpireOrphans),
            Op::Doubt { pod } => (*pod, What::Doubt),
            Op::DropUnconfirmed { pod, doubt } => (*pod, What::DropUnconfirmed(*doubt)),
            Op::Confirm { pod, path, length } => {
                let keys = pick(&self.paths, *path).map_or_else(Vec::new, |(p, _)| p.keys(request));
                (*pod, What::Confirm(keys.into_iter().take(*length).collect()))
            }
            Op::Restore { pod } => (*pod, What::Restore),
        };
        Event { pod, what }
    }

    fn group(&self, group: usize) -> usize {
        if group == WINDOW_GROUP && !self.windows { group - 1 } else { group }
    }

    fn store(&mut self, op: &Op) -> What {
        let Op::Store { pod, group, parent, contents, tier, extra, lora, shape, variant } = op
        else {
            unreachable!("called for stores")
        };
        let group = &self.group(*group);
        // Every third store begins a prompt.
        let mut base = match pick(&self.paths, *parent) {
            Some((path, key)) if parent % 3 != 0 => Some((path.clone(), *key)),
            _ => None,
        };
        let mut path = base.as_ref().map_or_else(
            || Path { lora: if *lora { "sql" } else { "" }.to_owned(), ..Path::default() },
            |(path, _)| path.clone(),
        );
        path.variant = *variant;
        if *shape == Shape::Orphan {
            // The block in between is never announced, or only later.
            self.extend(&mut path, contents[0], 0);
            base = Some((path.clone(), path.engine_key()));
            self.remember(&path);
        }
        let (mut keys, mut tokens, mut extras) = (Vec::new(), Vec::new(), Vec::new());
        for content in contents {
            let from = path.tokens.len();
            extras.push(self.extend(&mut path, *content, *extra));
            tokens.extend_from_slice(&path.tokens[from..]);
            let mut key = path.engine_key();
            if *shape == Shape::Conflict
                && let Some((_, other)) = pick(&self.paths, parent.wrapping_add(1))
            {
                key = *other;
            }
            self.remember(&path);
            keys.push(key);
        }
        match shape {
            Shape::Sparse => {
                let mut nth = 0;
                keys.retain(|_| {
                    nth += 1;
                    nth % 2 == 0
                });
                extras.clear();
            }
            Shape::Placeholder => {
                tokens.clear();
                extras.clear();
            }
            _ => {}
        }
        self.stored[*pod].extend(keys.iter().map(|key| (*key, *group, *tier)));
        What::Store {
            keys,
            parent: base.map(|(_, key)| key),
            tokens,
            lora: (!path.lora.is_empty()).then(|| path.lora.clone()),
            extras,
            group: *group,
            tier: *tier,
        }
    }

    /// Adds one engine block to the path; returns its extras as the engine reports them.
    fn extend(&self, path: &mut Path, content: u8, extra: u8) -> Vec<OwnedExtra> {
        let start = path.tokens.len() as u32;
        let engine = self.sizes.engine;
        path.tokens.extend((0..engine).map(|at| u32::from(content) * 100 + at));
        let mut extras = Vec::new();
        if !path.lora.is_empty() {
            extras.push(OwnedExtra::Text("sql"));
        }
        let mut item = |id: &str, from: u32| {
            path.items.push((id.to_owned(), start + from, engine - from));
        };
        match extra {
            1 if start == 0 => {
                extras.push(OwnedExtra::Text("salt"));
                path.salt = "salt".to_owned();
            }
            2 => {
                extras.push(OwnedExtra::Item("image-a", 1));
                item("image-a", 1);
            }
            3 => {
                extras.push(OwnedExtra::Item("image-a", -3));
                extras.push(OwnedExtra::Item("image-b", 0));
                item("image-a", 0);
                item("image-b", 0);
            }
            4 if start > 0 => {
                extras.push(OwnedExtra::Text("bare"));
                item("bare", 0);
            }
            5 => {
                extras.push(OwnedExtra::Bytes(b"digest"));
                item("digest", 0);
            }
            _ => {}
        }
        extras
    }

    fn remember(&mut self, path: &Path) {
        let key = path.engine_key();
        if self.known.insert(key) {
            self.paths.push((path.clone(), key));
            let mut longer = path.clone();
            longer.tokens.extend([7; 5]);
            self.queries.insert(longer.keys(self.sizes.request));
        }
    }

    pub(super) fn apply(&self, index: &dyn BlockIndex, event: &Event) -> StoreOutcome {
        self.apply_at(index, self.slots[&event.pod], event)
    }

    pub(super) fn apply_at(
        &self,
        index: &dyn BlockIndex,
        slot: PodSlot,
        event: &Event,
    ) -> StoreOutcome {
        let tiers = kv_indexer::model::TierTable::default();
        let ids: Vec<TierId> = TIERS.iter().map(|tier| tiers.id(Some(tier))).collect();
        match &event.what {
            What::Store { keys, parent, tokens, lora, extras, group: at, tier } => {
                let flat: Vec<ExtraKey<'_>> = extras
                    .iter()
                    .flatten()
                    .map(|extra| match extra {
                        OwnedExtra::Text(text) => ExtraKey::Text(text),
                        OwnedExtra::Item(id, offset) => ExtraKey::Item { id, offset: *offset },
                        OwnedExtra::Bytes(bytes) => ExtraKey::Bytes(bytes),
                    })
                    .collect();
                let mut ends = Vec::new();
                for extra in extras {
                    ends.push(ends.last().copied().unwrap_or(0) + extra.len() as u32);
                }
                let (group, kind) = group(*at);
                return index.store(
                    slot,
                    &Store {
                        keys,
                        parent: *parent,
                        tokens,
                        block_size: if tokens.is_empty() { 0 } else { self.sizes.engine },
                        lora: lora.as_deref(),
                        extras: Extras { items: &flat, ends: &ends },
                        salt: None,
                        group,
                        kind,
                        tier: ids[usize::from(*tier)],
                        at: Instant::now(),
                    },
                );
            }
            What::Remove { keys, group: at, tier, sequence } => index.remove(
                slot,
                &Remove {
                    keys,
                    group: group(*at).0,
                    tier: ids[usize::from(*tier)],
                    sequence: *sequence,
                },
            ),
            What::Clear => index.clear(slot),
            What::Mode(mode) => index.set_count_mode(slot, *mode),
            What::Mute(muted) => index.set_muted(slot, *muted),
            What::Speculate(keys, mark) => index.speculate(slot, keys, *mark),
            What::Unspeculate(keys, mark) => index.unspeculate(slot, keys, *mark),
            What::Doubt => {
                index.doubt(slot);
            }
            What::DropUnconfirmed(doubt) => {
                // One index drops in slices, the other at once.
                let mut dropped = 0;
                loop {
                    let slice = index.drop_unconfirmed(slot, *doubt);
                    dropped += slice.blocks;
                    if !slice.more {
                        break;
                    }
                }
                return StoreOutcome { placed: dropped as u32, ..StoreOutcome::default() };
            }
            What::Confirm(keys) => index.confirm(slot, keys),
            What::ExpireOrphans => {
                // Everything that waits is old.
                let later = Instant::now() + std::time::Duration::from_secs(1);
                let outcome = index.expire_orphans(slot, later);
                return StoreOutcome { orphaned: outcome as u32, ..StoreOutcome::default() };
            }
            What::Restore => {
                let image = index.export(slot).unwrap();
                index.restore(slot, &through_bytes(&image), &mut Anchors::default()).unwrap();
            }
        }
        StoreOutcome::default()
    }

    /// A store of `blocks` engine blocks that no random stream touches.
    pub(super) fn full_store(&self, blocks: u32) -> Event {
        let tokens: Vec<u32> = (0..blocks * self.sizes.engine).map(|at| 5000 + at).collect();
        let keys = (0..u64::from(blocks)).map(|at| EngineKey(9_000_000 + at)).collect();
        let what = What::Store {
            keys,
            parent: None,
            tokens,
            lora: None,
            extras: Vec::new(),
            group: 0,
            tier: 0,
        };
        Event { pod: 0, what }
    }

    /// The request keys of [`Self::full_store`].
    pub(super) fn full_keys(&self, blocks: u32) -> Vec<RequestKey> {
        let tokens = (0..blocks * self.sizes.engine).map(|at| 5000 + at).collect();
        Path { tokens, ..Path::default() }.keys(self.sizes.request)
    }
}

/// What is left of an image after it was written and read; the oracle's has no bytes.
pub(super) fn through_bytes(image: &RowImage) -> RowImage {
    let (mut builder, mut parts) = (ImageBuilder::default(), 0);
    let read = image.encode(50, |part| {
        parts += 1;
        builder.add(part)
    });
    read.unwrap();
    if parts == 0 { image.clone() } else { builder.finish() }
}

fn pick<T>(from: &[T], at: usize) -> Option<&T> {
    from.get(at.checked_rem(from.len())?)
}

/// The over-credit of an index that matches block contents without their prefix.
pub(super) fn rejoining_suffix(index: &dyn BlockIndex) {
    let sizes = Sizes { request: 4, engine: 4 };
    let spec = PodSpec {
        scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "seed", 4)),
        model: Arc::from("m"),
        count_mode: CountMode::Counted,
    };
    let mut world = World::new(sizes, PODS);
    world.add(0, index.register(spec.clone()).unwrap());
    world.add(1, index.register(spec).unwrap());
    let store = |pod, contents: &[u8]| Op::Store {
        pod,
        group: 0,
        parent: 0,
        contents: contents.to_vec(),
        tier: 0,
        extra: 0,
        lora: false,
        shape: Shape::Dense,
        variant: 0,
    };
    for op in [store(0, &[0]), store(1, &[2, 1])] {
        let event = world.event(&op);
        world.apply(index, &event);
    }
    let mut path = Path::default();
    world.extend(&mut path, 0, 0);
    world.extend(&mut path, 1, 0);
    let mut found = Vec::new();
    index.lookup(&path.keys(4), true, &mut found);
    let depths: Vec<_> = found.iter().map(|found| (found.slot.0, found.confirmed)).collect();
    assert_eq!(depths, [(0, 1)]);
}
