//! The service's rows, and whose they are.
//!
//! # Model
//!
//! [`Rows`] is one answer to `ListPods`: which row a slot means under one version of the slot table,
//! and how prompts are hashed. Only states change in it, as `WatchPods` tells them; whatever else
//! changes is a new answer. [`Joined`] is that together with one list of endpoints.
//!
//! # Concurrency
//!
//! Both are immutable but for the states, which are atomic; readers take whole ones.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointId},
        precise::{Addressing, RowState},
    },
    hash::{Algorithm, Scheme},
    model::PodState,
    proto::kvindexer as pb,
};

/// Slots are dense; one beyond this is nonsense, and would cost memory.
const MAX_SLOTS: u32 = 1 << 20;

/// Names in a finding, at most.
const NAMED: usize = 5;

/// One row of the service.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) pod: Arc<str>,
    pub(super) rank: Option<u32>,
    pub(super) model: Arc<str>,
    pub(super) slot: u32,
    /// Blocks held when last told.
    blocks: AtomicU64,
    /// A `pb::PodState`.
    state: AtomicU8,
}

impl Row {
    fn new(status: &pb::PodStatus) -> Self {
        let row = Self {
            pod: status.pod.as_str().into(),
            rank: status.dp_rank,
            model: status.model.as_str().into(),
            slot: status.slot,
            blocks: AtomicU64::default(),
            state: AtomicU8::default(),
        };
        row.set(status);
        row
    }

    fn set(&self, status: &pb::PodStatus) {
        let state = u8::try_from(status.state).unwrap_or(u8::MAX);
        self.state.store(state, Ordering::Relaxed);
        self.blocks.store(status.blocks, Ordering::Relaxed);
    }

    /// Is this the row of which `status` tells?
    fn is(&self, status: &pb::PodStatus) -> bool {
        *self.pod == *status.pod
            && self.rank == status.dp_rank
            && *self.model == *status.model
            && self.slot == status.slot
    }

    /// What it can be trusted for. Stale hides the state beneath; a state that we do not know may mean
    /// anything, so it counts as degraded.
    pub(super) fn state(&self) -> RowState {
        let of = |state| RowState { state, stale: false };
        match pb::PodState::try_from(i32::from(self.state.load(Ordering::Relaxed))) {
            Ok(pb::PodState::Connecting) => of(PodState::Connecting),
            Ok(pb::PodState::Replaying) => of(PodState::Replaying),
            Ok(pb::PodState::Live) => of(PodState::Live),
            Ok(pb::PodState::Partial) => of(PodState::Partial),
            Ok(pb::PodState::Stale) => RowState { state: PodState::default(), stale: true },
            Ok(pb::PodState::Degraded | pb::PodState::Unspecified) | Err(_) => {
                of(PodState::Degraded)
            }
        }
    }
}

/// Hash settings, or why they cannot be used.
type Settings = Result<Arc<Scheme>, String>;

/// All rows under one version of the slot table.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) version: u64,
    pub(super) rows: Vec<Row>,
    /// Slot → place in `rows`.
    by_slot: Vec<Option<u32>>,
    /// Models that rows have, with their hash settings.
    models: HashMap<Arc<str>, Settings>,
    /// Models that have settings of their own.
    listed: BTreeSet<String>,
    aliases: HashMap<String, String>,
}

impl Rows {
    /// Reads an answer to `ListPods`.
    ///
    /// # Errors
    ///
    /// What is nonsense in it.
    pub(super) fn new(answer: pb::ListPodsResponse) -> Result<Self, String> {
        let default = settings(answer.hash.as_ref());
        let listed: HashMap<String, Settings> = answer
            .models
            .into_iter()
            .map(|listed| (listed.model, settings(listed.hash.as_ref())))
            .collect();
        let rows: Vec<Row> = answer.pods.iter().map(Row::new).collect();
        let (mut by_slot, mut models) = (Vec::new(), HashMap::new());
        for (at, row) in (0_u32..).zip(&rows) {
            if row.slot >= MAX_SLOTS {
                return Err(format!("slot {} of pod {}", row.slot, row.pod));
            }
            let slot = row.slot as usize;
            by_slot.resize(by_slot.len().max(slot + 1), None);
            if by_slot[slot].replace(at).is_some() {
                return Err(format!("two pods have slot {slot}"));
            }
            // A row whose model is not known yet holds nothing.
            if !row.model.is_empty() && !models.contains_key(&row.model) {
                let scheme = listed.get(&*row.model).unwrap_or(&default).clone();
                models.insert(Arc::clone(&row.model), scheme);
            }
        }
        Ok(Self {
            version: answer.slot_table_version,
            rows,
            by_slot,
            models,
            listed: listed.into_keys().collect(),
            aliases: answer.aliases,
        })
    }

    /// The row with this slot, by its place.
    pub(super) fn at_slot(&self, slot: u32) -> Option<usize> {
        self.by_slot.get(slot as usize).copied().flatten().map(|at| at as usize)
    }

    /// Takes in what `WatchPods` tells; `false` if that needs another look at the whole.
    pub(super) fn told(&self, status: &pb::PodStatus) -> bool {
        // An empty table has an end, and no row.
        if status.pod.is_empty() {
            return self.rows.is_empty() && status.slot_table_version == self.version;
        }
        match self.at_slot(status.slot).and_then(|at| self.rows.get(at)) {
            Some(row) if !status.removed && row.is(status) => {
                row.set(status);
                true
            }
            _ => false,
        }
    }

    /// The name under which a served one is indexed, and the adapter that it is.
    fn name<'a>(&'a self, served: &'a str) -> Option<(&'a Arc<str>, &'a str)> {
        let canonical = self.aliases.get(served).map_or(served, String::as_str);
        if let Some((model, _)) = self.models.get_key_value(canonical) {
            return Some((model, ""));
        }
        let named = self.aliases.contains_key(served) || self.listed.contains(served);
        let mut models = self.models.keys();
        match (models.next(), models.next()) {
            (Some(only), None) if !named && !served.is_empty() => Some((only, served)),
            _ => None,
        }
    }

    /// See [`PrefixIndex::addressing`](crate::epp::precise::PrefixIndex::addressing).
    pub(super) fn addressing(&self, served: &str) -> Option<Addressing> {
        let (model, lora) = self.name(served)?;
        let scheme = self.models.get(model)?.as_ref().ok()?;
        Some(Addressing { model: Arc::clone(model), lora: lora.into(), scheme: Arc::clone(scheme) })
    }
}

/// Reads hash settings as the service tells them.
fn settings(info: Option<&pb::HashInfo>) -> Settings {
    let info = info.ok_or("the indexer does not tell its hash settings")?;
    let algorithm: Algorithm = info.algorithm.parse()?;
    if info.block_size == 0 {
        return Err("the indexer's blocks have no tokens".to_owned());
    }
    let scheme = Scheme::new(algorithm, info.seed.as_str(), info.block_size);
    if scheme.fingerprint() != info.fingerprint {
        return Err(format!(
            "the fingerprint of {algorithm} with blocks of {} tokens is {:#018x} there and {:#018x} \
             here",
            info.block_size,
            info.fingerprint,
            scheme.fingerprint()
        ));
    }
    Ok(Arc::new(scheme))
}

/// An endpoint's rows.
#[derive(Debug, Default)]
pub(super) struct Owned {
    /// Places in [`Rows::rows`].
    pub(super) rows: Vec<u32>,
    /// Whom a speculative entry names: a pod, and a rank if others of its ranks are not the
    /// endpoint's.
    pub(super) mark: Option<(Arc<str>, Option<u32>)>,
}

/// Rows and one list of endpoints.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) rows: Arc<Rows>,
    pub(super) endpoints: Arc<Vec<Arc<Endpoint>>>,
    owned: HashMap<EndpointId, Owned>,
}

/// Things by a key; one that two share is nobody's.
#[derive(Debug)]
struct Unique<K>(HashMap<K, Option<usize>>);

impl<K: Hash + Eq> Unique<K> {
    fn of(keys: impl Iterator<Item = K>) -> Self {
        let mut found = HashMap::new();
        for (at, key) in keys.enumerate() {
            match found.entry(key) {
                Entry::Vacant(free) => _ = free.insert(Some(at)),
                Entry::Occupied(mut taken) => _ = taken.insert(None),
            }
        }
        Self(found)
    }

    fn get<Q>(&self, key: &Q) -> Option<usize>
    where
        K: std::borrow::Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0.get(key).copied().flatten()
    }
}

impl Joined {
    /// Finds out whose each row is: by `ip:port`, else by name, with namespace or without, else by
    /// name and rank (`<pod>-rank-<n>`), else by IP. What several endpoints share says nothing.
    pub(super) fn new(rows: Arc<Rows>, endpoints: Arc<Vec<Arc<Endpoint>>>) -> Self {
        let each = || endpoints.iter().map(|endpoint| endpoint.info());
        let addresses: Unique<SocketAddr> = Unique::of(each().map(|info| info.address));
        let names: Unique<&str> = Unique::of(each().map(|info| info.name.name.as_str()));
        let full: Unique<String> = Unique::of(each().map(|info| info.name.to_string()));
        let ips: Unique<IpAddr> = Unique::of(each().map(|info| info.address.ip()));
        let owner = |row: &Row| {
            let pod = &*row.pod;
            let address = pod.parse().ok().and_then(|address: SocketAddr| addresses.get(&address));
            let ranked = || {
                let name = format!("{pod}-rank-{}", row.rank?);
                names.get(name.as_str()).or_else(|| full.get(&name))
            };
            let ip = || pod.parse().ok().and_then(|ip: IpAddr| ips.get(&ip));
            address.or_else(|| names.get(pod)).or_else(|| full.get(pod)).or_else(ranked).or_else(ip)
        };
        let mut owned: HashMap<EndpointId, Owned> = HashMap::new();
        let mut of_pod: HashMap<&str, usize> = HashMap::new();
        for (at, row) in (0_u32..).zip(&rows.rows) {
            *of_pod.entry(&row.pod).or_default() += 1;
            if let Some(endpoint) = owner(row).and_then(|at| endpoints.get(at)) {
                owned.entry(endpoint.id()).or_default().rows.push(at);
            }
        }
        for owned in owned.values_mut() {
            let theirs = || owned.rows.iter().filter_map(|&at| rows.rows.get(at as usize));
            owned.mark = theirs().next().map(|first| {
                let same = theirs().filter(|row| row.pod == first.pod).count();
                let all = of_pod.get(&*first.pod) == Some(&same);
                (Arc::clone(&first.pod), if all { None } else { first.rank })
            });
        }
        Self { rows, endpoints, owned }
    }

    /// The rows of an endpoint; none if nobody indexes it.
    pub(super) fn of(&self, endpoint: &Endpoint) -> Option<&Owned> {
        self.owned.get(&endpoint.id())
    }

    /// See [`PrefixIndex::impediments`](crate::epp::precise::PrefixIndex::impediments).
    pub(super) fn impediments(&self, served: &str) -> Vec<String> {
        let rows = &*self.rows;
        if rows.rows.is_empty() {
            return vec!["the indexer has no pods".to_owned()];
        }
        let mut findings = Vec::new();
        match rows.name(served) {
            None => {
                let models: BTreeSet<&str> = rows.models.keys().map(|model| &**model).collect();
                let known = some(models.iter());
                findings.push(format!(
                    "no pod of the indexer has model {served:?}; its models are: {}",
                    if known.is_empty() { "none yet" } else { &known }
                ));
            }
            Some((model, _)) => {
                if let Some(Err(why)) = rows.models.get(model) {
                    findings.push(format!("hash settings of model {model:?}: {why}"));
                }
                let of_model: Vec<&Row> =
                    rows.rows.iter().filter(|row| row.model == *model).collect();
                let all = |is: &dyn Fn(&Row) -> bool| of_model.iter().all(|row| is(row));
                if all(&|row| row.state().stale) {
                    findings.push(format!(
                        "every pod of model {model:?} is stale: disconnected, or serving without \
                         sending events"
                    ));
                } else if all(&|row| row.state().state == PodState::Connecting) {
                    findings.push(format!(
                        "no pod of model {model:?} has sent an event yet: are KV events on?"
                    ));
                } else if all(&|row| row.blocks.load(Ordering::Relaxed) == 0) {
                    findings.push(format!("no pod of model {model:?} holds a block"));
                }
            }
        }
        let unknown: Vec<_> =
            self.endpoints.iter().filter(|endpoint| self.of(endpoint).is_none()).collect();
        if !unknown.is_empty() {
            let names = some(
                unknown
                    .iter()
                    .map(|endpoint| format!("{} ({})", endpoint.info().name, endpoint.address())),
            );
            let pods = some(rows.rows.iter().map(|row| &row.pod));
            findings.push(format!(
                "some endpoints have no pod in the indexer: {} of {}, {names}; its pods are: {pods}",
                unknown.len(),
                self.endpoints.len()
            ));
        }
        findings
    }
}

/// The first few names.
fn some<T: ToString>(names: impl Iterator<Item = T>) -> String {
    let mut names: Vec<String> = names.take(NAMED + 1).map(|name| name.to_string()).collect();
    if names.len() > NAMED {
        names[NAMED] = "…".to_owned();
    }
    names.join(", ")
}

#[cfg(test)]
mod tests;
