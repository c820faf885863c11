//! The order in which data producers run: who writes comes before who reads.

use std::sync::Arc;

use crate::epp::scheduling::{Configured, DataKey};

/// Orders producers so that each comes after those whose data it reads, and otherwise as configured.
///
/// # Errors
///
/// The names along a loop, its first one repeated at the end.
pub(super) fn producers(producers: &[Configured]) -> Result<Vec<Configured>, Vec<Arc<str>>> {
    let writes: Vec<Vec<DataKey>> = producers.iter().map(produced).collect();
    // Whom each one waits for.
    let waits: Vec<Vec<usize>> = producers
        .iter()
        .enumerate()
        .map(|(reader, producer)| {
            let mut reads = producer.plugin.consumes();
            reads.extend(producer.plugin.may_consume());
            let writers = (0..producers.len()).filter(|&writer| writer != reader);
            writers.filter(|&writer| writes[writer].iter().any(|key| reads.contains(key))).collect()
        })
        .collect();
    let mut done = vec![false; producers.len()];
    let mut order = Vec::with_capacity(producers.len());
    while order.len() < producers.len() {
        let ready =
            (0..producers.len()).find(|&at| !done[at] && waits[at].iter().all(|&on| done[on]));
        let Some(ready) = ready else { return Err(a_loop(producers, &waits, &done)) };
        done[ready] = true;
        order.push(producers[ready].clone());
    }
    Ok(order)
}

/// What a plugin writes.
pub(super) fn produced(plugin: &Configured) -> Vec<DataKey> {
    plugin.plugin.producer().map_or_else(Vec::new, |producer| producer.produces(&plugin.name))
}

/// Follows whom somebody waits for until somebody comes again. Everybody left waits for somebody left.
fn a_loop(producers: &[Configured], waits: &[Vec<usize>], done: &[bool]) -> Vec<Arc<str>> {
    let mut path: Vec<usize> = Vec::new();
    let mut at = done.iter().position(|done| !done).unwrap_or_default();
    while !path.contains(&at) {
        path.push(at);
        at = waits[at].iter().copied().find(|&on| !done[on]).unwrap_or_default();
    }
    let start = path.iter().position(|&seen| seen == at).unwrap_or_default();
    let names = path[start..].iter().chain([&at]);
    names.map(|&at| Arc::clone(&producers[at].name)).collect()
}
