//! `precise-prefix-cache-producer`: what endpoints really hold, for others to read.
//!
//! It is [`precise-prefix-cache-scorer`](super::precise_prefix_cache_scorer) without the scorer: a
//! `prefix-cache-scorer` that names it ranks by its matches. With `hotPrefix` it is a filter as well.

use std::sync::Arc;

use crate::{
    epp::{
        plugins::{Building, Registration, Stability, precise_prefix_cache_scorer},
        scheduling::Plugin,
    },
    support::fields::Fields,
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// The type's name.
pub(super) const TYPE: &str = "precise-prefix-cache-producer";

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    precise_prefix_cache_scorer::build_as(TYPE, params, building)
}
