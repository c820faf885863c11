use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::{
    epp::{
        datalayer::{EndpointId, EndpointInfo, EndpointName},
        precise::remote::table::Rows,
    },
    hash::{Algorithm, Scheme},
};

/// Pods `a` (slots 0 and 1), `b` (slot 2), `x` (slot 4, of another model); endpoints `a`, `b`, `c`.
fn joined() -> Joined {
    let pod = |pod: &str, dp_rank, slot, model: &str| pb::PodStatus {
        pod: pod.to_owned(),
        dp_rank,
        slot,
        model: model.to_owned(),
        state: pb::PodState::Live.into(),
        ..pb::PodStatus::default()
    };
    let scheme = scheme();
    let list = pb::ListPodsResponse {
        pods: vec![
            pod("a", Some(0), 0, "llama"),
            pod("a", Some(1), 1, "llama"),
            pod("b", None, 2, "llama"),
            pod("x", None, 4, "other"),
        ],
        hash: Some(pb::HashInfo {
            algorithm: scheme.algorithm().as_str().to_owned(),
            block_size: scheme.block_size(),
            seed: String::new(),
            fingerprint: scheme.fingerprint(),
        }),
        slot_table_version: 7,
        ..pb::ListPodsResponse::default()
    };
    let endpoint = |(at, name): (u8, &str)| {
        let address = ([10, 0, 0, at], 8000).into();
        let info = EndpointInfo {
            name: EndpointName { namespace: "default".to_owned(), name: name.to_owned() },
            address,
            metrics_address: address,
            labels: Default::default(),
        };
        Arc::new(Endpoint::new(EndpointId(at.into()), info))
    };
    let endpoints = (1..).zip(["a", "b", "c"]).map(endpoint).collect();
    Joined::new(Arc::new(Rows::new(list).unwrap()), Arc::new(endpoints))
}

fn scheme() -> Arc<Scheme> {
    Arc::new(Scheme::new(Algorithm::Xxh3, "", 16))
}

fn addressing() -> Addressing {
    Addressing { model: "llama".into(), lora: "".into(), scheme: scheme() }
}

fn scores(total_blocks: u32, of: &[(u32, u32, f32, u32)]) -> pb::PromptScores {
    pb::PromptScores {
        total_blocks,
        block_size: 16,
        pods: vec![],
        compact: Some(pb::CompactScores {
            slots: of.iter().map(|it| it.0).collect(),
            depths: of.iter().map(|it| it.1).collect(),
            scores: of.iter().map(|it| it.2).collect(),
            confirmed: of.iter().map(|it| it.3).collect(),
        }),
    }
}

fn answer(prompts: Vec<pb::PromptScores>) -> pb::ScoreResponse {
    pb::ScoreResponse {
        request_id: 1,
        prompts,
        error: None,
        hash_fingerprint: scheme().fingerprint(),
        slot_table_version: 7,
    }
}

fn of(
    joined: &Joined,
    answer: &pb::ScoreResponse,
    blocks: &[usize],
) -> Result<Vec<EndpointMatch>, IndexError> {
    let addressing = addressing();
    let verdict = judge(answer, &Asked { addressing: &addressing, blocks }, joined)?;
    Ok(verdict.of(joined, &joined.endpoints))
}

#[test]
fn the_best_rank_counts_and_prompts_add_up() {
    let joined = joined();
    let good = answer(vec![
        scores(10, &[(0, 4, 4.0, 4), (1, 6, 3.5, 1), (2, 10, 9.5, 10)]),
        scores(3, &[(1, 3, 1.5, 0), (2, 1, 1.0, 1)]),
    ]);
    let found = of(&joined, &good, &[10, 3]).unwrap();
    let all: Vec<_> = found.iter().map(|it| (it.depth, it.confirmed, it.score)).collect();
    assert_eq!(all, [(9, 1, 5.0), (11, 11, 10.5), (0, 0, 0.0)]);
    assert_eq!(found.iter().filter(|it| it.state.is_some()).count(), 2, "nobody indexes c");
    // A subset, in another order, and one that is gone.
    let picked = [Arc::clone(&joined.endpoints[1]), Arc::clone(&joined.endpoints[0])];
    let addressing = addressing();
    let verdict =
        judge(&good, &Asked { addressing: &addressing, blocks: &[10, 3] }, &joined).unwrap();
    let depths: Vec<_> = verdict.of(&joined, &picked).iter().map(|it| it.depth).collect();
    assert_eq!(depths, [11, 9]);
    // Empty arrays: equal to depths.
    let mut plain = answer(vec![scores(10, &[(2, 7, 0.0, 0)])]);
    let compact = plain.prompts[0].compact.as_mut().unwrap();
    compact.scores.clear();
    compact.confirmed.clear();
    let found = of(&joined, &plain, &[10]).unwrap()[1];
    assert_eq!((found.depth, found.confirmed, found.score), (7, 7, 7.0));
}

#[test]
fn nonsense_is_named() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut pb::ScoreResponse, &mut pb::CompactScores), want: &str) {
        let mut answer = answer(vec![scores(10, &[(0, 4, 4.0, 4), (2, 5, 5.0, 5)])]);
        let mut compact = answer.prompts[0].compact.take().unwrap();
        change(&mut answer, &mut compact);
        if let Some(first) = answer.prompts.first_mut() {
            first.compact = Some(compact);
        }
        match of(&joined(), &answer, &[10]) {
            Err(IndexError::Garbage(what)) => assert!(what.starts_with(want), "{what}"),
            other => panic!("{other:?}, want {want}"),
        }
    }
    check(|answer, _| answer.hash_fingerprint = 1, "hash_fingerprint: 0x");
    check(|answer, _| answer.prompts.clear(), "prompts: 0, asked for 1");
    check(|answer, _| answer.prompts[0].total_blocks = 11, "prompts[0].total_blocks: 11");
    check(|answer, _| answer.prompts[0].block_size = 32, "prompts[0].block_size: 32");
    check(|_, compact| compact.slots.truncate(1), "prompts[0].compact: 1 slots, 2 depths");
    check(|_, compact| compact.depths.truncate(1), "prompts[0].compact: 2 slots, 1 depths");
    check(|_, compact| compact.scores.push(1.0), "prompts[0].compact: 2 slots, 2 depths, 3");
    check(|_, compact| compact.confirmed.truncate(1), "prompts[0].compact: 2 slots");
    check(|_, compact| compact.slots[1] = 3, "prompts[0].compact.slots[1]: 3 is no pod's");
    check(|_, compact| compact.slots[1] = u32::MAX, "prompts[0].compact.slots[1]: 4294967295");
    check(|_, compact| compact.slots[1] = 4, "prompts[0].compact.slots[1]: a pod of another");
    check(|_, compact| compact.slots[1] = 0, "prompts[0].compact.slots[1]: 0 is there twice");
    check(|_, compact| compact.depths[0] = 11, "prompts[0].compact.depths[0]: 11 of 10");
    check(|_, compact| compact.confirmed[0] = 5, "prompts[0].compact.confirmed[0]: 5 of 4");
    for score in [f32::NAN, f32::INFINITY, -0.5, 401.0] {
        check(|_, compact| compact.scores[0] = score, "prompts[0].compact.scores[0]: ");
    }
    let mut absent = answer(vec![scores(10, &[])]);
    absent.prompts[0].compact = None;
    assert!(matches!(of(&joined(), &absent, &[10]), Err(IndexError::Garbage(_))));
}

#[test]
fn another_slot_table_credits_nobody() {
    let mut other = answer(vec![scores(10, &[(0, 4, 4.0, 4)])]);
    other.slot_table_version = 8;
    assert_eq!(of(&joined(), &other, &[10]), Err(IndexError::Settings));
}

#[test]
fn refusals_keep_their_meaning() {
    #[track_caller]
    fn check(code: i32, want: IndexError) {
        let error = pb::Error { code, message: "no".to_owned(), field: String::new() };
        let refused = pb::ScoreResponse { error: Some(error), ..answer(vec![]) };
        assert_eq!(of(&joined(), &refused, &[10]), Err(want));
    }
    check(Code::FailedPrecondition.into(), IndexError::Settings);
    check(Code::DeadlineExceeded.into(), IndexError::Deadline);
    check(Code::Unavailable.into(), IndexError::Disconnected);
    check(Code::InvalidArgument.into(), IndexError::Refused("InvalidArgument: no".to_owned()));
    check(999, IndexError::Refused("Unknown: no".to_owned()));
    check(0, IndexError::Garbage("error: with code 0".to_owned()));
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0..8_u32, Just(u32::MAX)]
}

fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![0.0..8.0_f32, Just(f32::NAN), Just(-1.0), Just(f32::INFINITY), Just(1e30)]
}

prop_compose! {
    fn any_compact()(
        slots in prop::collection::vec(number(), 0..5),
        depths in prop::collection::vec(number(), 0..5),
        scores in prop::collection::vec(weight(), 0..5),
        confirmed in prop::collection::vec(number(), 0..5),
    ) -> pb::CompactScores {
        pb::CompactScores { slots, depths, scores, confirmed }
    }
}

prop_compose! {
    fn any_prompt()(
        total_blocks in prop_oneof![3 => Just(6_u32), 1 => number()],
        block_size in prop_oneof![3 => Just(16_u32), 1 => number()],
        compact in prop::option::weighted(0.9, any_compact()),
    ) -> pb::PromptScores {
        pb::PromptScores { total_blocks, block_size, pods: vec![], compact }
    }
}

proptest! {
    /// Whatever comes: no panic, and what is credited is within what was asked.
    #[test]
    fn no_answer_credits_more_than_was_asked(
        prompts in prop::collection::vec(any_prompt(), 0..3),
        blocks in prop::collection::vec(Just(6_usize), 0..3),
        version in 7..9_u64,
    ) {
        let joined = joined();
        let answer =
            pb::ScoreResponse { slot_table_version: version, ..answer(prompts) };
        if let Ok(found) = of(&joined, &answer, &blocks) {
            let most = 6 * blocks.len() as u32;
            prop_assert_eq!(version, 7);
            for found in found {
                prop_assert!(found.depth <= most && found.confirmed <= found.depth);
                prop_assert!(found.score >= 0.0 && found.score <= f64::from(most) * MAX_WEIGHT);
            }
        }
    }

    /// Bytes that happen to decode are judged like any other answer.
    #[test]
    fn bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(answer) = <pb::ScoreResponse as prost::Message>::decode(bytes.as_slice()) {
            of(&joined(), &answer, &[6]).unwrap_err();
        }
    }
}
