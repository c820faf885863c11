//! The reference: recorded events → every chain of blocks ever stored; an engine's cache → how deep a
//! pod holds each chain. DESIGN "Semantics" word for word, with plain maps and no hashing.
//!
//! A *node* is the content of an engine block together with everything before it. Engine keys with
//! equal content share a node, so "any key mapped there is held" becomes "the node is held". A
//! *request block* is interned by its content too: parent, tokens, extras.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::streams::{
    decode::{self, Event, Extra, Key, Stored},
    truth::{Cached, Fixture},
};

pub(crate) type NodeId = usize;

/// A multimodal item in a block: content hash, and its first token in the prompt.
type Item = (String, usize);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    parent: Option<NodeId>,
    /// Position of its first token.
    start: usize,
    tokens: Vec<u32>,
    items: Vec<Item>,
    /// Of the first block.
    salt: Option<String>,
    lora: String,
}

/// The tree of all blocks, shared by the ranks of a stream.
#[derive(Debug, Default)]
pub(crate) struct Chains {
    nodes: Vec<Node>,
    index: HashMap<Node, NodeId>,
}

/// What a router would send for a chain.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Query {
    pub(crate) tokens: Vec<u32>,
    pub(crate) lora: String,
    pub(crate) salt: String,
    /// Content hash, first token, length.
    pub(crate) items: Vec<(String, usize, usize)>,
}

impl Chains {
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Nodes that no chain goes through.
    pub(crate) fn leaves(&self) -> HashSet<NodeId> {
        let parents: HashSet<_> = self.nodes.iter().filter_map(|node| node.parent).collect();
        (0..self.len()).filter(|node| !parents.contains(node)).collect()
    }

    /// From the root to `node`.
    pub(crate) fn path(&self, node: NodeId) -> Vec<NodeId> {
        let mut path: Vec<_> =
            std::iter::successors(Some(node), |&node| self.nodes[node].parent).collect();
        path.reverse();
        path
    }

    pub(crate) fn query(&self, node: NodeId) -> Query {
        let path = self.path(node);
        let mut ends: BTreeMap<(usize, String), usize> = BTreeMap::new();
        for &at in &path {
            let node = &self.nodes[at];
            for (id, start) in &node.items {
                ends.insert((*start, id.clone()), node.start + node.tokens.len());
            }
        }
        let root = &self.nodes[path[0]];
        Query {
            tokens: path.iter().flat_map(|&at| self.nodes[at].tokens.iter().copied()).collect(),
            lora: root.lora.clone(),
            salt: root.salt.clone().unwrap_or_default(),
            items: ends.into_iter().map(|((start, id), end)| (id, start, end - start)).collect(),
        }
    }

    fn intern(&mut self, node: Node) -> NodeId {
        if let Some(&id) = self.index.get(&node) {
            return id;
        }
        self.nodes.push(node.clone());
        self.index.insert(node, self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    /// The nodes of a dense event's blocks.
    fn place(&mut self, stored: &Stored, parent: Option<NodeId>) -> Vec<NodeId> {
        let mut parent = parent;
        let mut placed = Vec::new();
        for (at, tokens) in stored.tokens.chunks(stored.block_size).enumerate() {
            let start = parent.map_or(0, |parent| {
                let parent = &self.nodes[parent];
                assert_eq!(parent.lora, stored.lora, "a chain changes its adapter");
                parent.start + parent.tokens.len()
            });
            let mut salt = stored.salt.clone().filter(|_| start == 0);
            let mut items = Vec::new();
            for extra in stored.extras.get(at).into_iter().flatten() {
                match extra {
                    Extra::Text(text) if *text == stored.lora => {}
                    Extra::Text(text) if start == 0 => salt = Some(text.clone()),
                    Extra::Text(text) => panic!("text {text:?} in a later block"),
                    Extra::Item { id, offset } => {
                        let first = i64::try_from(start).unwrap() + offset;
                        items.push((id.clone(), usize::try_from(first).unwrap()));
                    }
                }
            }
            let (tokens, lora) = (tokens.to_vec(), stored.lora.clone());
            parent = Some(self.intern(Node { parent, start, tokens, items, salt, lora }));
            placed.extend(parent);
        }
        placed
    }
}

/// One publisher's cache as its events tell it.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    /// One removal ends all copies, a second store adds none.
    set_semantics: bool,
    /// Where each key was last stored.
    place: HashMap<Key, NodeId>,
    counts: Cached,
    /// Window by group; absent = full attention.
    groups: BTreeMap<u32, Option<usize>>,
}

impl Worker {
    pub(crate) fn new(set_semantics: bool) -> Self {
        Self { set_semantics, ..Self::default() }
    }

    pub(crate) fn apply(&mut self, chains: &mut Chains, event: &Event) {
        match event {
            Event::Stored(stored) => {
                self.groups.entry(stored.group).or_insert(stored.window);
                if stored.is_dense() {
                    let parent = stored.parent.map(|parent| self.place[&parent]);
                    let placed = chains.place(stored, parent);
                    self.place.extend(stored.keys.iter().copied().zip(placed));
                } else {
                    let placeholder = stored.tokens.is_empty();
                    assert!(placeholder || stored.window.is_some(), "neither: {stored:?}");
                }
                for &key in &stored.keys {
                    let slot = (stored.medium.clone(), stored.group, key);
                    let count = self.counts.entry(slot).or_default();
                    *count = if self.set_semantics { 1 } else { *count + 1 };
                }
            }
            Event::Removed { keys, group, medium } => {
                for &key in keys {
                    let slot = (medium.clone(), *group, key);
                    let count = self.counts.remove(&slot).unwrap_or_default();
                    if count > 1 && !self.set_semantics {
                        self.counts.insert(slot, count - 1);
                    }
                }
            }
            Event::Cleared => self.counts.clear(),
        }
    }

    /// The engine was restarted.
    pub(crate) fn restart(&mut self) {
        self.counts.clear();
    }

    pub(crate) fn counts(&self) -> &Cached {
        &self.counts
    }

    /// A cache's blocks by place, per group; of one tier or of all.
    pub(crate) fn held(&self, cached: &Cached, tier: Option<&str>) -> Held {
        let groups = self.groups.iter().map(|(&group, &window)| {
            let in_group = |slot: &&(String, u32, Key)| {
                slot.1 == group && tier.is_none_or(|tier| tier_of(&slot.0) == tier)
            };
            let nodes = cached.keys().filter(in_group).map(|slot| self.place[&slot.2]).collect();
            Group { window, nodes }
        });
        Held(groups.collect())
    }

    /// The tiers of a cache.
    pub(crate) fn tiers(cached: &Cached) -> BTreeSet<String> {
        cached.keys().map(|(medium, _, _)| tier_of(medium)).collect()
    }
}

fn tier_of(medium: &str) -> String {
    let name = medium.to_lowercase();
    if name == "cpu_pinned" { "cpu".to_owned() } else { name }
}

/// What a publisher holds.
#[derive(Clone, Debug)]
pub(crate) struct Held(Vec<Group>);

#[derive(Clone, Debug)]
struct Group {
    window: Option<usize>,
    nodes: HashSet<NodeId>,
}

impl Held {
    /// As if window groups asked for nothing.
    pub(crate) fn without_windows(mut self) -> Self {
        self.0.retain(|group| group.window.is_none());
        self
    }

    /// Window and held nodes of each group.
    pub(crate) fn groups(&self) -> impl Iterator<Item = (Option<usize>, &HashSet<NodeId>)> {
        self.0.iter().map(|group| (group.window, &group.nodes))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RequestBlock {
    parent: Option<usize>,
    lora: String,
    tokens: Vec<u32>,
    extras: Vec<String>,
}

/// The chains, cut into request blocks.
#[derive(Debug)]
pub(crate) struct Requests {
    block_size: usize,
    /// By node: the request blocks that end in it.
    ending: Vec<Vec<usize>>,
    /// By request block: for each engine-block position that it overlaps, the nodes there.
    overlapped: Vec<Vec<HashSet<NodeId>>>,
}

impl Requests {
    pub(crate) fn new(chains: &Chains, block_size: usize) -> Self {
        let mut requests = Self { block_size, ending: Vec::new(), overlapped: Vec::new() };
        let mut index: HashMap<RequestBlock, usize> = HashMap::new();
        // A node's parent is older than the node, so its last request block is known.
        let mut last: Vec<Option<usize>> = Vec::new();
        for (id, node) in chains.nodes.iter().enumerate() {
            let mut parent = node.parent.and_then(|parent| last[parent]);
            let end = node.start + node.tokens.len();
            let mut ending = Vec::new();
            for block in node.start / block_size..end / block_size {
                let (from, to) = (block * block_size, (block + 1) * block_size);
                let mut nodes: Vec<NodeId> =
                    std::iter::successors(Some(id), |&at| chains.nodes[at].parent)
                        .take_while(|&at| {
                            chains.nodes[at].start + chains.nodes[at].tokens.len() > from
                        })
                        .collect();
                nodes.reverse();
                let content = request_block(chains, &nodes, from, to, parent);
                let count = index.len();
                let request = *index.entry(content).or_insert(count);
                if request == count {
                    requests.overlapped.push(vec![HashSet::new(); nodes.len()]);
                }
                let positions = &mut requests.overlapped[request];
                assert_eq!(positions.len(), nodes.len(), "block sizes differ within a stream");
                for (position, node) in positions.iter_mut().zip(nodes) {
                    position.insert(node);
                }
                ending.push(request);
                parent = Some(request);
            }
            last.push(parent);
            requests.ending.push(ending);
        }
        requests
    }

    /// The request blocks of the chain that ends with `node`.
    pub(crate) fn of(&self, chains: &Chains, node: NodeId) -> Vec<usize> {
        let path = chains.path(node);
        path.iter().flat_map(|&node| self.ending[node].iter().copied()).collect()
    }

    fn holds(&self, block: usize, group: &Group) -> bool {
        let any = |nodes: &HashSet<NodeId>| nodes.iter().any(|node| group.nodes.contains(node));
        self.overlapped[block].iter().all(any)
    }

    /// The largest L that every group allows.
    pub(crate) fn depth(&self, blocks: &[usize], held: &Held) -> usize {
        if held.0.is_empty() {
            return 0;
        }
        let allows = |group: &Group, length: usize| {
            let needed = match group.window {
                None => length,
                Some(window) => (window - 1).div_ceil(self.block_size).min(length),
            };
            blocks[length - needed..length].iter().all(|&block| self.holds(block, group))
        };
        (0..=blocks.len())
            .rev()
            .find(|&length| held.0.iter().all(|group| allows(group, length)))
            .unwrap_or_default()
    }

    /// Sum over the first `depth` blocks of the largest weight among the tiers that hold the block in
    /// every full group; `None` if a block is held only by several tiers together.
    pub(crate) fn score(
        &self,
        blocks: &[usize],
        depth: usize,
        tiers: &[(f64, Held)],
    ) -> Option<f64> {
        let full = |held: &Held, block: usize| {
            let mut groups = held.0.iter().filter(|group| group.window.is_none());
            groups.all(|group| self.holds(block, group))
        };
        blocks[..depth].iter().try_fold(0.0, |score, &block| {
            let weights =
                tiers.iter().filter(|(_, held)| full(held, block)).map(|(weight, _)| *weight);
            weights.reduce(f64::max).map(|weight| score + weight)
        })
    }
}

/// The content of request block `from..to`, which overlaps exactly `nodes`.
fn request_block(
    chains: &Chains,
    nodes: &[NodeId],
    from: usize,
    to: usize,
    parent: Option<usize>,
) -> RequestBlock {
    let mut tokens = Vec::new();
    let mut items: Vec<(usize, &str)> = Vec::new();
    for &at in nodes {
        let node = &chains.nodes[at];
        let inside = from.saturating_sub(node.start)..(to - node.start).min(node.tokens.len());
        tokens.extend_from_slice(&node.tokens[inside]);
        items.extend(node.items.iter().filter(|item| item.1 < to).map(|(id, s)| (*s, id.as_str())));
    }
    items.sort_unstable();
    let mut extras: Vec<String> = Vec::new();
    for (_, id) in items {
        if !extras.iter().any(|extra| extra == id) {
            extras.push(id.to_owned());
        }
    }
    let first = &chains.nodes[nodes[0]];
    if from == 0 {
        extras.extend(first.salt.clone());
    }
    let lora = if parent.is_none() { first.lora.clone() } else { String::new() };
    RequestBlock { parent, lora, tokens, extras }
}

/// A stream's chains and, per rank, the worker after the whole stream. `at_moment` sees each worker
/// right at each moment of the truth.
pub(crate) fn replay(
    fixture: &Fixture,
    mut at_moment: impl FnMut(&Worker, &super::truth::Rank, usize),
) -> (Chains, Vec<Worker>) {
    let mut chains = Chains::default();
    let mut workers = Vec::new();
    for rank in &fixture.ranks {
        let mut worker = Worker::new(fixture.reannounces());
        for (at, batch) in rank.stream.batches.iter().enumerate() {
            if at > 0 && batch.sequence == 0 {
                worker.restart();
            }
            let (announced, events) = decode::batch(&batch.payload);
            assert!(announced.is_none_or(|announced| announced == u64::from(rank.stream.rank)));
            for event in &events {
                worker.apply(&mut chains, event);
            }
            for (moment, _) in
                rank.moments.iter().enumerate().filter(|(_, moment)| moment.published == at + 1)
            {
                at_moment(&worker, rank, moment);
            }
        }
        workers.push(worker);
    }
    (chains, workers)
}
