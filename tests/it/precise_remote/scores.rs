//! What a service in good health is asked and answers.

use std::time::Duration;

use kv_indexer::{
    epp::precise::{IndexError, RowState},
    model::PodState,
};

use super::rig::{BLOCK, MODEL, Picker, Server, config, query, tokens};
use crate::support::eventually;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn scores_are_those_of_the_rows_of_each_endpoint() {
    let server = Server::start();
    let (a0, a1, b) = (server.row("a", Some(0)), server.row("a", Some(1)), server.row("b", None));
    let prompt = tokens(1, 10);
    server.store(&a0, &prompt[..2 * BLOCK as usize]);
    server.store(&a1, &prompt[..5 * BLOCK as usize]);
    server.store(&b, &prompt);
    let picker = Picker::connected(config(server.address));
    picker.set(&["a", "b", "c"]);
    let live = Some(RowState { state: PodState::Live, stale: false });
    let found = picker.score(&query(&prompt)).unwrap();
    let all: Vec<_> = found.iter().map(|f| (f.depth, f.confirmed, f.score, f.state)).collect();
    assert_eq!(all, [(5, 5, 5.0, live), (10, 10, 10.0, live), (0, 0, 0.0, None)]);

    // Nobody holds it, and no block at all.
    assert_eq!(picker.depths(&query(&tokens(2, 3))), Ok(vec![0, 0, 0]));
    let short = picker.score(&query(&tokens(1, 0))).unwrap();
    assert_eq!(short.iter().map(|f| f.state).collect::<Vec<_>>(), [live, live, None]);

    // Endpoints and rows come and go, and states change.
    picker.set(&["b", "d"]);
    assert_eq!(picker.depths(&query(&prompt)), Ok(vec![10, 0]));
    let d = server.row("d", None);
    server.store(&d, &prompt[..3 * BLOCK as usize]);
    picker.until_depths(&query(&prompt), &[10, 3]);
    server.fleet.remove(b.slot);
    picker.until_depths(&query(&prompt), &[0, 3]);
    d.update(|status| status.stale = true);
    server.fleet.changed();
    eventually("d is stale", || match picker.score(&query(&prompt)) {
        Ok(found) if found[1].state.is_some_and(|state| state.stale) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // Given back just behind the answer.
    picker.until("epp_indexer_questions_in_flight", |waiting| waiting == 0.0);
}

#[test]
fn names_and_settings_are_the_services_own() {
    let server = Server::start();
    let picker = Picker::connected(config(server.address));
    assert!(picker.index.addressing(MODEL).is_none(), "no pod yet");
    assert_eq!(picker.index.impediments(MODEL), ["the indexer has no pods"]);
    picker.set(&["a"]);
    let row = server.row("a", None);
    let addressing = eventually("the model is known", || {
        picker.index.addressing(MODEL).ok_or_else(|| "not yet".to_owned())
    });
    assert_eq!((&*addressing.lora, addressing.scheme.block_size()), ("", BLOCK));
    let adapter = picker.index.addressing("adapter").unwrap();
    assert_eq!((&*adapter.model, &*adapter.lora), (MODEL, "adapter"));
    assert_eq!(
        picker.index.impediments(MODEL),
        [format!("no pod of model {MODEL:?} holds a block")]
    );
    server.fleet.remove(row.slot);
    eventually("it is unknown again", || {
        picker.index.addressing(MODEL).map_or(Ok(()), |_| Err("still known".to_owned()))
    });
}

#[test]
fn eight_threads_get_their_own_answers() {
    let server = Server::start();
    let (a, b) = (server.row("a", None), server.row("b", None));
    for prompt in 0..8 {
        server.store(&a, &tokens(prompt, prompt + 1));
        server.store(&b, &tokens(prompt, 20 - prompt));
    }
    let picker = Picker::connected(config(server.address));
    picker.set(&["a", "b"]);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let picker = &picker;
            scope.spawn(move || {
                for round in 0..200 {
                    let prompt = (thread + round) % 8;
                    let depths = picker.depths(&query(&tokens(prompt, 20)));
                    assert_eq!(depths, Ok(vec![prompt + 1, 20 - prompt]));
                }
            });
        }
    });
    assert_eq!(picker.metric("epp_indexer_call_seconds_count"), 1600.0);
    assert_eq!(picker.metric("epp_indexer_failures_total"), 0.0);
    assert_eq!(picker.metric("epp_indexer_connections_total"), 1.0);
}

#[test]
fn speculative_entries_live_as_long_as_they_are_told() {
    let server = Server::start();
    let (_, b) = (server.row("a", None), server.row("b", None));
    let picker = Picker::connected(config(server.address));
    picker.set(&["a", "b", "c"]);
    let (index, query) = (&picker.index, query(&tokens(1, 6)));
    let endpoint = |name| picker.endpoint(name);
    assert_eq!(index.speculate(&query, &endpoint("c"), LONG), None, "nobody indexes it");

    // Each is an entry of its own.
    let first = index.speculate(&query, &endpoint("a"), LONG).unwrap();
    let second = index.speculate(&query, &endpoint("a"), LONG).unwrap();
    picker.until_depths(&query, &[6, 0, 0]);
    assert!((picker.score(&query).unwrap()[0].score - 3.0).abs() < 1e-6, "at half the weight");
    picker.until("epp_indexer_speculations_total", |done| done == 2.0);
    index.take_back(first);
    index.take_back(first);
    picker.until("epp_indexer_speculations_total", |done| done == 3.0);
    assert_eq!(picker.depths(&query), Ok(vec![6, 0, 0]));
    index.take_back(second);
    picker.until_depths(&query, &[0, 0, 0]);

    // Taken back before the service can have answered.
    let early = index.speculate(&query, &endpoint("b"), LONG).unwrap();
    index.take_back(early);
    picker.until("epp_indexer_speculations_total", |done| done == 6.0);
    assert_eq!(picker.depths(&query), Ok(vec![0, 0, 0]));

    // One ends by itself, one is made longer at once and shorter later.
    let short = Duration::from_millis(100);
    index.speculate(&query, &endpoint("a"), short).unwrap();
    let long = index.speculate(&query, &endpoint("b"), short).unwrap();
    index.extend(long, LONG);
    picker.until_depths(&query, &[6, 6, 0]);
    picker.until_depths(&query, &[0, 6, 0]);
    index.extend(long, Duration::from_millis(1));
    picker.until_depths(&query, &[0, 0, 0]);

    // Events confirm.
    index.speculate(&query, &endpoint("b"), LONG).unwrap();
    picker.until_depths(&query, &[0, 6, 0]);
    server.store(&b, &tokens(1, 6));
    assert!((picker.score(&query).unwrap()[1].score - 6.0).abs() < 1e-6);
    assert_eq!(picker.metric("epp_indexer_speculations_total{result=\"failed\"}"), 0.0);
}

#[test]
fn other_hash_settings_are_noticed() {
    let server = Server::start();
    server.row("a", None);
    let picker = Picker::connected(config(server.address));
    picker.set(&["a"]);
    let mut other = query(&tokens(1, 4));
    other.addressing.scheme =
        kv_indexer::hash::Scheme::new(kv_indexer::hash::Algorithm::Xxh3, "else", BLOCK).into();
    assert_eq!(picker.depths(&other), Err(IndexError::Settings));
    assert_eq!(picker.depths(&query(&tokens(1, 4))), Ok(vec![0]), "the stream goes on");
    assert_eq!(picker.metric("epp_indexer_connections_total"), 1.0);
}
