use std::{sync::Arc, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::loadgen::workload::{Part, body};

fn request(parts: &[(u64, u32)]) -> Planned {
    let part = |&(seed, tokens)| Part { seed, tokens };
    let parts: Arc<[Part]> = parts.iter().map(part).collect();
    Planned {
        at: Some(Duration::ZERO),
        burst: None,
        prompt: Prompt { parts },
        max_tokens: 1,
        group: 0,
        after: None,
    }
}

#[track_caller]
fn check(prompts: &[&[(u64, u32)]], block: usize, want: u64) {
    let requests: Vec<_> = prompts.iter().map(|parts| request(parts)).collect();
    assert_eq!(ideal_hits(requests.iter(), block).hit_tokens, want);
    assert_eq!(lru_hits(requests.iter(), block, 1_000).hit_tokens, want);
}

#[test]
fn whole_blocks_count_and_never_the_last_token() {
    check(&[&[(1, 64)]], 16, 0);
    check(&[&[(1, 64)], &[(1, 64)]], 16, 48);
    check(&[&[(1, 65)], &[(1, 65)]], 16, 64);
    check(&[&[(1, 40)], &[(1, 40), (2, 60)]], 16, 32);
    check(&[&[(1, 40), (2, 60)], &[(1, 40), (3, 60)]], 16, 32);
    // A part's beginning is that of a shorter one.
    check(&[&[(1, 100)], &[(1, 40), (2, 60)]], 16, 32);
    // The same part at another place is something else.
    check(&[&[(1, 32), (2, 32)], &[(2, 32), (1, 32)]], 16, 0);
    check(&[&[(1, 3)], &[(1, 3)]], 0, 2);
}

#[test]
fn a_small_cache_forgets_the_end_of_the_oldest_prompt_first() {
    let (a, b) = (request(&[(1, 65)]), request(&[(2, 33)]));
    let plan = [&a, &b, &a];
    let of = |capacity| lru_hits(plan.into_iter(), 16, capacity).hit_tokens;
    assert_eq!([6, 5, 4, 3, 2, 0].map(of), [64, 48, 32, 16, 0, 0]);
    assert_eq!(distinct_blocks(plan.into_iter(), 16), 6);
}

#[test]
fn an_empty_plan_hits_nothing() {
    let none = ideal_hits([].into_iter(), 16);
    assert_eq!((none, none.ratio()), (IdealHits::default(), 0.0));
}

proptest! {
    /// The same as counting with the tokens themselves.
    #[test]
    fn keys_stand_for_tokens(
        prompts in prop::collection::vec(prop::collection::vec((0..3_u64, 1..40_u32), 1..4), 1..8),
        block in 1..20_usize,
    ) {
        let requests: Vec<_> = prompts.iter().map(|parts| request(parts)).collect();
        let mut held: HashSet<Vec<u32>> = HashSet::new();
        let mut want = 0;
        for request in &requests {
            let tokens: Vec<u32> = body::tokens(&request.prompt).collect();
            let ends = |most: usize| (1..=most / block).map(move |n| n * block);
            let found = ends(tokens.len() - 1).take_while(|&end| held.contains(&tokens[..end]));
            want += found.count() * block;
            held.extend(ends(tokens.len()).map(|end| tokens[..end].to_vec()));
        }
        // Two different cuts of the same parts are equal tokens only where they begin a part.
        let got = ideal_hits(requests.iter(), block).hit_tokens;
        prop_assert_eq!(got, want as u64);
        prop_assert_eq!(lru_hits(requests.iter(), block, 10_000).hit_tokens, got);
        prop_assert!(lru_hits(requests.iter(), block, 3).hit_tokens <= got);
    }
}
