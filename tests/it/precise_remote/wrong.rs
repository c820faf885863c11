//! A service that answers nonsense: never believed, taken for down, and asked again later.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kv_indexer::{
    epp::precise::{IndexError, remote::RemoteConfig},
    hash::{Algorithm, Scheme},
    proto::kvindexer as pb,
};
use tonic::Status;

use super::{
    liar::Liar,
    rig::{BLOCK, MODEL, Picker, config, query, tokens},
};

/// One pod `a` with slot 0.
pub(super) fn rows() -> pb::ListPodsResponse {
    pb::ListPodsResponse {
        pods: vec![pb::PodStatus {
            pod: "a".to_owned(),
            model: MODEL.to_owned(),
            state: pb::PodState::Live.into(),
            slot_table_version: 7,
            ..pb::PodStatus::default()
        }],
        hash: Some(pb::HashInfo {
            algorithm: "xxh3".to_owned(),
            block_size: BLOCK,
            seed: String::new(),
            fingerprint: Scheme::new(Algorithm::Xxh3, "", BLOCK).fingerprint(),
        }),
        slot_table_version: 7,
        ..pb::ListPodsResponse::default()
    }
}

/// A service that begins to lie, and stops. While it does nothing is credited, and it counts as down.
#[track_caller]
fn check(lie: impl Fn(&mut pb::ScoreResponse) -> Result<(), Status> + Send + Sync + 'static) {
    let lying = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&lying);
    let (address, _liar) = Liar::start(
        rows(),
        Arc::new(move |mut answer| {
            let lied = if told.load(Ordering::Relaxed) { lie(&mut answer) } else { Ok(()) };
            Some(lied.map(|()| answer))
        }),
    );
    let picker = Picker::connected(config(address));
    picker.set(&["a"]);
    let query = query(&tokens(1, 4));
    assert_eq!(picker.depths(&query), Ok(vec![1]));
    lying.store(true, Ordering::Relaxed);
    let mut opened = false;
    for _ in 0..200 {
        match picker.depths(&query) {
            Err(IndexError::Garbage(_) | IndexError::Disconnected | IndexError::Deadline) => {}
            Err(IndexError::Open) => {
                opened = true;
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(opened, "it counts as down");
    picker.until("epp_indexer_connections_total", |made| made >= 2.0);
    lying.store(false, Ordering::Relaxed);
    picker.until_depths(&query, &[1]);
}

fn compact(answer: &mut pb::ScoreResponse) -> &mut pb::CompactScores {
    answer.prompts[0].compact.as_mut().unwrap()
}

#[test]
fn answers_that_nobody_asked_for() {
    check(|answer| {
        answer.request_id += 1_000_000;
        Ok(())
    });
}

#[test]
fn arrays_of_unequal_length() {
    check(|answer| {
        compact(answer).depths.push(1);
        Ok(())
    });
}

#[test]
fn slots_that_no_pod_has() {
    check(|answer| {
        compact(answer).slots[0] = 5;
        Ok(())
    });
}

#[test]
fn more_blocks_than_the_prompt_has() {
    check(|answer| {
        compact(answer).depths[0] = 5;
        Ok(())
    });
}

#[test]
fn scores_that_are_no_numbers() {
    check(|answer| {
        compact(answer).scores = vec![f32::NAN];
        Ok(())
    });
}

#[test]
fn answers_about_other_hash_settings() {
    check(|answer| {
        answer.hash_fingerprint ^= 1;
        Ok(())
    });
}

#[test]
fn streams_that_end() {
    check(|_| Err(Status::internal("out of order")));
}

#[test]
fn another_slot_table_is_looked_for_and_credits_nobody() {
    let (address, _liar) = Liar::start(
        rows(),
        Arc::new(|mut answer| {
            answer.slot_table_version = 8;
            Some(Ok(answer))
        }),
    );
    let picker = Picker::connected(config(address));
    picker.set(&["a"]);
    for _ in 0..20 {
        assert_eq!(picker.depths(&query(&tokens(1, 4))), Err(IndexError::Settings));
    }
    assert_eq!(picker.metric("epp_indexer_connections_total"), 1.0);
}

#[test]
fn refusals_are_answers() {
    let (address, _liar) = Liar::start(
        rows(),
        Arc::new(|answer| {
            let error = pb::Error { code: 3, message: "no".to_owned(), field: String::new() };
            Some(Ok(pb::ScoreResponse { error: Some(error), prompts: vec![], ..answer }))
        }),
    );
    let picker = Picker::connected(config(address));
    picker.set(&["a"]);
    for _ in 0..20 {
        let want = IndexError::Refused("InvalidArgument: no".to_owned());
        let error = picker.depths(&query(&tokens(1, 4))).unwrap_err();
        assert!(matches!(error, IndexError::Refused(_)), "{error}, want {want}");
    }
    assert_eq!(picker.metric("epp_indexer_breaker_state"), 0.0);
}

#[test]
fn a_table_that_cannot_be_is_no_table() {
    let mut twice = rows();
    twice.pods.push(pb::PodStatus { pod: "b".to_owned(), ..twice.pods[0].clone() });
    let (address, _liar) = Liar::start(twice, Arc::new(|answer| Some(Ok(answer))));
    let picker = Picker::new(config(address));
    picker.set(&["a"]);
    picker.until("epp_indexer_failures_total{reason=\"garbage\"}", |failed| failed >= 2.0);
    assert_eq!(picker.metric("epp_indexer_connected"), 0.0);
    assert!(picker.index.impediments(MODEL)[0].contains("two pods have slot 0"));
}

#[test]
fn late_answers_are_dropped_and_counted() {
    let (address, _liar) = Liar::start(
        rows(),
        Arc::new(|answer| {
            std::thread::sleep(Duration::from_millis(60));
            Some(Ok(answer))
        }),
    );
    let deadline = Duration::from_millis(10);
    let picker =
        Picker::connected(RemoteConfig { deadline, failures: u32::MAX, ..config(address) });
    picker.set(&["a"]);
    for _ in 0..3 {
        assert_eq!(picker.depths(&query(&tokens(1, 4))), Err(IndexError::Deadline));
    }
    picker.until("epp_indexer_late_answers_total", |late| late == 3.0);
    picker.until("epp_indexer_questions_in_flight", |waiting| waiting == 0.0);
    assert_eq!(picker.metric("epp_indexer_connections_total"), 1.0);
}
