//! Configurations of the endpoint picker: what loads, as what, and what is refused in which words.
//!
//! Plugins are fakes with the names and capabilities of the real ones, so that the loader is tested
//! and not what it loads; [`examples`] uses the real ones where they are built.

mod examples;
mod fakes;
mod faults;
mod loads;
mod precise;
mod sample;

use std::sync::Arc;

use kv_indexer::{
    epp::{
        config::{Loaded, Parts, load},
        datalayer::Endpoints,
        plugins::PluginTypes,
    },
    support::fields::Fault,
};
use prometheus::Registry;

/// Loads with these types and no flags.
fn load_with(types: &PluginTypes, text: &str) -> Result<Loaded, Vec<Fault>> {
    load_flagged(types, text, false, &[])
}

fn load_flagged(
    types: &PluginTypes,
    text: &str,
    allow_experimental: bool,
    defaults: &[(&'static str, serde_json::Value)],
) -> Result<Loaded, Vec<Fault>> {
    let (endpoints, metrics) = (Arc::new(Endpoints::new()), Registry::new());
    let parts =
        Parts { types, endpoints: &endpoints, metrics: &metrics, allow_experimental, defaults };
    load(text, &parts)
}
