//! State that a plugin keeps for each endpoint, for as long as the endpoint lives.
//!
//! # Concurrency
//!
//! Reads take no lock: the table is replaced when an endpoint comes or goes, which is rare. State is
//! made when an endpoint is first needed, and never for one that is gone: otherwise a request that
//! was routed just before a removal would leave it behind for ever.

use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwap, Guard};

use crate::{
    epp::datalayer::{EndpointId, Endpoints},
    support::sync::lock,
};

/// One `T` per endpoint.
#[derive(Debug)]
pub(super) struct Lives<T> {
    endpoints: Arc<Endpoints>,
    table: ArcSwap<Table<T>>,
    changing: Mutex<()>,
}

/// Ordered by endpoint.
type Table<T> = Vec<(EndpointId, Arc<T>)>;

/// The states of one moment.
pub(super) struct Reading<T>(Guard<Arc<Table<T>>>);

impl<T> Reading<T> {
    /// The state of an endpoint, if it has any.
    pub(super) fn get(&self, id: EndpointId) -> Option<&Arc<T>> {
        find(&self.0, id).ok().map(|at| &self.0[at].1)
    }

    /// All states.
    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.iter().map(|(_, state)| state)
    }
}

fn find<T>(table: &Table<T>, id: EndpointId) -> Result<usize, usize> {
    table.binary_search_by_key(&id, |(known, _)| *known)
}

impl<T> Lives<T> {
    /// No states yet; `endpoints` says who lives.
    pub(super) fn new(endpoints: &Arc<Endpoints>) -> Self {
        let endpoints = Arc::clone(endpoints);
        Self { endpoints, table: ArcSwap::default(), changing: Mutex::default() }
    }

    /// The states of this moment.
    pub(super) fn read(&self) -> Reading<T> {
        Reading(self.table.load())
    }

    /// The state of an endpoint, made by `make` if it has none; `None` if the endpoint is gone.
    pub(super) fn get_or_make(&self, id: EndpointId, make: impl FnOnce() -> T) -> Option<Arc<T>> {
        if let Some(state) = self.read().get(id) {
            return Some(Arc::clone(state));
        }
        let _changing = lock(&self.changing);
        let mut table = Vec::clone(&self.table.load());
        let at = match find(&table, id) {
            Ok(at) => return Some(Arc::clone(&table[at].1)),
            Err(at) => at,
        };
        // An endpoint leaves the list before its removal is told, and that waits for this lock.
        if !self.endpoints.list().iter().any(|endpoint| endpoint.id() == id) {
            return None;
        }
        let state = Arc::new(make());
        table.insert(at, (id, Arc::clone(&state)));
        self.table.store(Arc::new(table));
        Some(state)
    }

    /// Drops the state of an endpoint and returns it.
    pub(super) fn remove(&self, id: EndpointId) -> Option<Arc<T>> {
        let _changing = lock(&self.changing);
        let mut table = Vec::clone(&self.table.load());
        let (_, state) = table.remove(find(&table, id).ok()?);
        self.table.store(Arc::new(table));
        Some(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::prefix::testing::{info, pods};

    #[test]
    fn state_lives_as_long_as_its_endpoint() {
        let endpoints = pods(2);
        let lives = Lives::new(&endpoints);
        let list = endpoints.list();
        let (first, second) = (list[0].id(), list[1].id());
        assert!(lives.read().get(first).is_none());
        assert_eq!(lives.get_or_make(second, || 2).as_deref(), Some(&2));
        assert_eq!(lives.get_or_make(first, || 1).as_deref(), Some(&1));
        assert_eq!(lives.get_or_make(first, || 7).as_deref(), Some(&1));
        assert_eq!(lives.read().get(second).map(|state| **state), Some(2));

        endpoints.remove(&info(0).name);
        assert_eq!(lives.remove(first).as_deref(), Some(&1));
        assert_eq!(lives.remove(first), None);
        assert_eq!(lives.get_or_make(first, || 1), None, "it is gone");
        assert_eq!(lives.read().all().count(), 1);
    }
}
