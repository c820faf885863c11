use super::*;
use crate::epp::datalayer::{EndpointInfo, EndpointName};

/// Endpoints by name and address.
fn endpoints(of: &[(&str, &str)]) -> Arc<Vec<Arc<Endpoint>>> {
    let endpoint = |(at, (name, address)): (usize, &(&str, &str))| {
        let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
        let address = address.parse().unwrap();
        let info = EndpointInfo {
            name: EndpointName { namespace: namespace.to_owned(), name: name.to_owned() },
            address,
            metrics_address: address,
            labels: Default::default(),
        };
        Arc::new(Endpoint::new(EndpointId(at as u64), info))
    };
    Arc::new(of.iter().enumerate().map(endpoint).collect())
}

fn status(pod: &str, rank: Option<u32>, slot: u32) -> pb::PodStatus {
    pb::PodStatus {
        pod: pod.to_owned(),
        dp_rank: rank,
        model: "llama".to_owned(),
        state: pb::PodState::Live.into(),
        blocks: 10,
        slot,
        slot_table_version: 9,
        ..pb::PodStatus::default()
    }
}

fn hash(algorithm: Algorithm, block_size: u32) -> pb::HashInfo {
    pb::HashInfo {
        algorithm: algorithm.as_str().to_owned(),
        block_size,
        seed: "s".to_owned(),
        fingerprint: Scheme::new(algorithm, "s", block_size).fingerprint(),
    }
}

fn list(pods: Vec<pb::PodStatus>) -> pb::ListPodsResponse {
    pb::ListPodsResponse {
        pods,
        hash: Some(hash(Algorithm::Xxh3, 16)),
        models: vec![pb::ModelHash {
            model: "coarse".to_owned(),
            hash: Some(hash(Algorithm::Xxh64, 64)),
        }],
        slot_table_version: 9,
        aliases: [("alias".to_owned(), "llama".to_owned())].into(),
    }
}

fn rows(pods: Vec<pb::PodStatus>) -> Rows {
    Rows::new(list(pods)).unwrap()
}

/// The slots of each endpoint's rows, and whom an entry names.
#[track_caller]
fn check(pods: &[(&str, Option<u32>)], of: &[(&str, &str)], want: &[(&[u32], Option<&str>)]) {
    let pods = (0..).zip(pods).map(|(slot, &(pod, rank))| status(pod, rank, slot)).collect();
    let endpoints = endpoints(of);
    let joined = Joined::new(Arc::new(rows(pods)), Arc::clone(&endpoints));
    for (endpoint, (slots, mark)) in endpoints.iter().zip(want) {
        let owned = joined.of(endpoint);
        let found = owned.map(|owned| owned.rows.as_slice()).unwrap_or_default();
        assert_eq!(found, *slots, "{}", endpoint.info().name);
        let marks = owned.and_then(|owned| owned.mark.clone());
        let marks = marks.map(|(pod, rank)| match rank {
            Some(rank) => format!("{pod}#{rank}"),
            None => pod.to_string(),
        });
        assert_eq!(marks.as_deref(), *mark, "{}", endpoint.info().name);
    }
}

#[test]
fn rows_find_their_endpoints() {
    let two = [("a", "10.0.0.1:8000"), ("b", "10.0.0.2:8000")];
    // By ip:port, by name, with namespace or without, and by IP.
    check(
        &[("10.0.0.1:8000", None), ("b", None)],
        &two,
        &[(&[0], Some("10.0.0.1:8000")), (&[1], Some("b"))],
    );
    check(
        &[("default/b", None), ("other/a", None)],
        &two,
        &[(&[], None), (&[0], Some("default/b"))],
    );
    check(&[("10.0.0.2", Some(0))], &two, &[(&[], None), (&[0], Some("10.0.0.2"))]);
    check(&[("[::1]:80", None)], &[("a", "[0:0::1]:80")], &[(&[0], Some("[::1]:80"))]);
    // The address goes before the name: somebody may have the name of another's address.
    check(
        &[("10.0.0.1:8000", None)],
        &[("10.0.0.1:8000", "10.0.0.2:8000"), ("b", "10.0.0.1:8000")],
        &[(&[], None), (&[0], Some("10.0.0.1:8000"))],
    );
    // All ranks of a pod.
    check(&[("a", Some(0)), ("a", Some(1))], &two, &[(&[0, 1], Some("a")), (&[], None)]);
    // An endpoint for each rank.
    let ranks = [("a-rank-0", "10.0.0.1:8000"), ("a-rank-1", "10.0.0.1:8001")];
    check(&[("a", Some(0)), ("a", Some(1))], &ranks, &[(&[0], Some("a#0")), (&[1], Some("a#1"))]);
    // What is shared says nothing.
    check(&[("10.0.0.1", None)], &ranks, &[(&[], None), (&[], None)]);
    let same = [("x/a", "10.0.0.1:8000"), ("y/a", "10.0.0.2:8000")];
    check(&[("a", None), ("y/a", None)], &same, &[(&[], None), (&[1], Some("y/a"))]);
    check(&[], &two, &[(&[], None), (&[], None)]);
}

#[test]
fn names_become_models_and_adapters() {
    #[track_caller]
    fn check(rows: &Rows, served: &str, want: Option<(&str, &str, u32)>) {
        let found = rows.addressing(served);
        let found = found.as_ref().map(|it| (&*it.model, &*it.lora, it.scheme.block_size()));
        assert_eq!(found, want, "{served}");
    }
    let one = rows(vec![status("a", None, 0), status("b", None, 1)]);
    check(&one, "llama", Some(("llama", "", 16)));
    check(&one, "alias", Some(("llama", "", 16)));
    check(&one, "adapter", Some(("llama", "adapter", 16)));
    check(&one, "coarse", None); // A model of its own, of which there is no pod.
    check(&one, "", None);
    let other = pb::PodStatus { model: "coarse".to_owned(), ..status("c", None, 2) };
    let two = rows(vec![status("a", None, 0), other]);
    check(&two, "coarse", Some(("coarse", "", 64)));
    check(&two, "adapter", None);
    let unnamed = pb::PodStatus { model: String::new(), ..status("a", None, 0) };
    check(&rows(vec![unnamed]), "llama", None);
    check(&rows(vec![]), "llama", None);
}

#[test]
fn settings_that_would_hash_otherwise_are_not_used() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut pb::HashInfo), finding: &str) {
        let mut list = list(vec![status("a", None, 0)]);
        change(list.hash.as_mut().unwrap());
        let rows = Rows::new(list).unwrap();
        assert!(rows.addressing("llama").is_none());
        let findings =
            Joined::new(Arc::new(rows), endpoints(&[("a", "1.1.1.1:1")])).impediments("llama");
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].contains(finding), "{findings:?}");
    }
    check(|hash| hash.fingerprint += 1, "fingerprint");
    check(|hash| hash.algorithm = "sha1".to_owned(), "unknown hash algorithm");
    check(|hash| hash.block_size = 0, "no tokens");
}

#[test]
fn a_list_that_cannot_be_is_refused() {
    #[track_caller]
    fn check(pods: Vec<pb::PodStatus>, want: &str) {
        assert_eq!(Rows::new(list(pods)).unwrap_err(), want);
    }
    check(vec![status("a", None, 3), status("b", None, 3)], "two pods have slot 3");
    check(vec![status("a", None, u32::MAX)], "slot 4294967295 of pod a");
}

#[test]
fn changes_of_state_are_taken_in_and_others_ask_for_the_whole() {
    let rows = rows(vec![status("a", Some(0), 5)]);
    let state = || rows.rows[0].state();
    assert_eq!(state(), RowState { state: PodState::Live, stale: false });
    let with = |state: i32| pb::PodStatus { state, ..status("a", Some(0), 5) };
    assert!(rows.told(&with(pb::PodState::Stale.into())));
    assert!(state().stale);
    assert!(rows.told(&with(pb::PodState::Partial.into())));
    assert_eq!(state(), RowState { state: PodState::Partial, stale: false });
    assert!(rows.told(&with(99)));
    assert_eq!(state().state, PodState::Degraded, "who knows what that is");
    let live = with(pb::PodState::Live.into());
    assert!(!rows.told(&pb::PodStatus { removed: true, ..live.clone() }));
    assert!(!rows.told(&pb::PodStatus { slot: 6, ..live.clone() }));
    assert!(!rows.told(&pb::PodStatus { pod: "b".to_owned(), ..live.clone() }));
    assert!(!rows.told(&pb::PodStatus { model: "other".to_owned(), ..live }));
    assert_eq!(state().state, PodState::Degraded);
}

#[test]
fn impediments_are_named() {
    #[track_caller]
    fn check(pods: Vec<pb::PodStatus>, served: &str, want: &[&str]) {
        let of = endpoints(&[("a", "10.0.0.1:8000"), ("b", "10.0.0.2:8000")]);
        let findings = Joined::new(Arc::new(rows(pods)), of).impediments(served);
        assert_eq!(findings, want);
    }
    let state = |state: pb::PodState| {
        let of = |pod, slot| pb::PodStatus { state: state.into(), ..status(pod, None, slot) };
        vec![of("a", 0), of("b", 1)]
    };
    check(vec![], "llama", &["the indexer has no pods"]);
    check(state(pb::PodState::Live), "llama", &[]);
    check(state(pb::PodState::Live), "adapter", &[]);
    check(
        state(pb::PodState::Live),
        "coarse",
        &["no pod of the indexer has model \"coarse\"; its models are: llama"],
    );
    check(
        state(pb::PodState::Stale),
        "llama",
        &["every pod of model \"llama\" is stale: disconnected, or serving without sending events"],
    );
    check(
        state(pb::PodState::Connecting),
        "llama",
        &["no pod of model \"llama\" has sent an event yet: are KV events on?"],
    );
    let empty = |pod, slot| pb::PodStatus { blocks: 0, ..status(pod, None, slot) };
    check(
        vec![empty("a", 0), empty("b", 1)],
        "llama",
        &["no pod of model \"llama\" holds a block"],
    );
    check(
        vec![status("a", None, 0), status("x", None, 1)],
        "llama",
        &[
            "some endpoints have no pod in the indexer: 1 of 2, default/b (10.0.0.2:8000); its pods are: \
           a, x",
        ],
    );
    assert_eq!(some(0..6), "0, 1, 2, 3, 4, …");
    assert_eq!(some(0..5), "0, 1, 2, 3, 4");
}
