use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::loadgen::workload::{ideal_hits, lengths::Spread};

fn workload(text: &str) -> Workload {
    text.parse().unwrap()
}

fn tokens(request: &Planned) -> Vec<u32> {
    request.prompt.parts.iter().map(|part| part.tokens).collect()
}

/// How often each prompt comes.
fn counts(requests: &[Planned]) -> HashMap<&Prompt, usize> {
    let mut counts = HashMap::new();
    for request in requests {
        *counts.entry(&request.prompt).or_default() += 1;
    }
    counts
}

#[test]
fn pairs_are_asked_again_and_again() {
    let workload = workload("capacity-73:scale=0.1");
    let residents = workload.residents(7);
    assert_eq!(residents.len(), 750);
    let resident: u64 = 150 * (600 + 5 * 120);
    let parts: HashSet<Part> =
        residents.iter().flat_map(|it| it.prompt.parts.iter().copied()).collect();
    assert_eq!(parts.iter().map(|part| u64::from(part.tokens)).sum::<u64>(), resident);
    assert_eq!(parts.len(), 150 + 750);

    let requests = workload.requests(7, 1_600);
    let (first, second, third) = (&requests[..750], &requests[750..1_500], &requests[1_500..]);
    assert_eq!(counts(first), counts(&residents), "a pass has every pair once");
    assert_eq!(counts(second), counts(first));
    assert_ne!(first, second, "in another order");
    assert_eq!(third.len(), 100);
    assert!(requests.iter().all(|it| tokens(it) == [600, 120] && it.max_tokens == 100));
    let by_prompt: HashMap<_, _> = residents.iter().map(|it| (&it.prompt, it.group)).collect();
    assert!(requests.iter().all(|it| by_prompt[&it.prompt] == it.group));

    assert_eq!(workload.requests(7, 1_600), requests);
    assert_ne!(workload.requests(8, 1_600), requests);
    let other: HashSet<Part> =
        workload.residents(8).iter().flat_map(|it| it.prompt.parts.iter().copied()).collect();
    assert!(parts.is_disjoint(&other), "a seed has its own groups");
}

#[test]
fn popular_groups_come_more_often() {
    let workload = workload("zipf-1.2:scale=0.01");
    let requests = workload.requests(1, 20_000);
    let share = |group: u32| {
        requests.iter().filter(|it| it.group == group).count() as f64 / requests.len() as f64
    };
    let sum: f64 = (1..=150).map(|rank| f64::from(rank).powf(-1.2)).sum();
    for group in [0, 1, 9] {
        let want = f64::from(group + 1).powf(-1.2) / sum;
        assert!((share(group) - want).abs() < 0.1 * want + 0.002, "{group}: {}", share(group));
    }
    let residents: HashSet<Prompt> =
        workload.residents(1).into_iter().map(|request| request.prompt).collect();
    assert!(requests.iter().all(|request| residents.contains(&request.prompt)));
}

#[test]
fn what_is_asked_once_never_comes_again() {
    for text in ["unique", "short", "one-prefix", "chat:turns=1"] {
        let workload = workload(text);
        // Two stages of a run.
        let mut requests = workload.requests(3, 2_000);
        requests.extend(workload.requests_from(3, 2_000, 2_000));
        let asked: HashSet<Part> =
            requests.iter().map(|it| it.prompt.parts.last().copied().unwrap()).collect();
        assert_eq!(asked.len(), 4_000, "{text}");
    }
    let shared = workload("one-prefix:scale=0.1");
    let requests = shared.requests(3, 100);
    assert_eq!(ideal_hits(requests.iter(), 16).hit_tokens, 99 * 592);
    let [resident] = &shared.residents(3)[..] else { panic!("one") };
    assert_eq!(resident.prompt.parts[0], requests[5].prompt.parts[0]);
    assert!(workload("unique").residents(3).is_empty());
    assert_eq!(ideal_hits(workload("unique").requests(3, 100).iter(), 16).hit_tokens, 0);
}

#[test]
fn a_turn_is_all_that_was_said_and_a_question() {
    let chat = workload("chat:sessions=2,turns=3,system=100,question=10,answer=20,think=250ms");
    assert_eq!(chat.turns(), 3);
    let requests = chat.requests(1, 8);
    let turns: Vec<_> = requests.iter().map(tokens).collect();
    let first = vec![100, 10];
    let second = vec![100, 10, 20, 10];
    let third = vec![100, 10, 20, 10, 20, 10];
    assert_eq!(
        turns,
        [&first, &first, &second, &second, &third, &third, &first, &first].map(|it| it.clone())
    );
    let after: Vec<_> = requests.iter().map(|it| it.after.map(|it| it.request)).collect();
    assert_eq!(after, [None, None, Some(0), Some(1), Some(2), Some(3), None, None]);
    for request in &requests {
        let Some(After { request: before, think }) = request.after else { continue };
        assert_eq!(think, Duration::from_millis(250));
        let said = &requests[before as usize].prompt.parts;
        assert_eq!(request.prompt.parts[..said.len()], said[..]);
    }
    let questions: HashSet<Part> = requests.iter().map(|it| it.prompt.parts[1]).collect();
    assert_eq!(questions.len(), 4, "new conversations are new");
    // A later stage has other conversations.
    let later = chat.requests_from(1, 8, 8);
    assert!(later.iter().all(|it| !questions.contains(&it.prompt.parts[1])));
}

#[test]
fn lengths_may_vary_and_stay_with_their_part() {
    let varied =
        workload("shared-prefix:groups=9,prompts=2,system=uniform(10,500),question=normal(100,30)");
    let requests = varied.requests(1, 90);
    let mut systems: HashMap<u32, HashSet<Part>> = HashMap::new();
    for request in &requests {
        systems.entry(request.group).or_default().insert(request.prompt.parts[0]);
    }
    assert!(systems.values().all(|parts| parts.len() == 1));
    let lengths: HashSet<u32> = requests.iter().map(|it| it.prompt.parts[0].tokens).collect();
    assert!(lengths.len() > 5);
}

#[test]
fn names_stand_for_workloads() {
    for (name, base) in NAMED {
        assert_eq!(workload(name).to_string(), base);
        assert_eq!(workload(name), workload(base));
    }
    assert_eq!(
        workload("capacity-37:scale=0.1,groups=5").to_string(),
        "shared-prefix:groups=5,prompts=3,system=8000,question=1000,output=1000,scale=0.1"
    );
    assert_eq!(workload("zipf-1.2:zipf=2"), workload("capacity-73:zipf=2"));
}

#[test]
fn what_is_no_workload_is_refused() {
    for (text, part) in [
        ("shared-prefx", "no workload \"shared-prefx\"; did you mean \"shared-prefix\"?"),
        ("", "no workload \"\""),
        ("unique:quesiton=5", "unique: no field \"quesiton\""),
        ("one-prefix:quesiton=5", "one-prefix: no field \"quesiton\"; did you mean \"question\"?"),
        ("one-prefix:question=0", "one-prefix: question: \"0\" is no whole number"),
        ("one-prefix:question=normal(1)", "one-prefix: question: \"normal(1)\": two numbers"),
        ("shared-prefix:groups=0", "shared-prefix: groups: \"0\""),
        ("shared-prefix:groups=1000000,prompts=100", "groups × prompts is more than"),
        ("capacity-73:scale=0", "capacity-73: scale: \"0\""),
        ("capacity-73:zipf=-1", "capacity-73: zipf: \"-1\""),
        ("chat:think=1", "chat: think: \"1\" is no duration"),
        ("unique:5", "unique: \"5\" is no field=value"),
        ("unique:prompt=1,prompt=2", "unique: prompt is there twice"),
    ] {
        let error = text.parse::<Workload>().unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}

fn lengths() -> impl Strategy<Value = Lengths> {
    let spread = || {
        (1.0..1e6_f64, 0.0..1e6_f64, 1..1_000_u32, 1_000..2_000_000_u32)
            .prop_map(|(mean, sd, min, max)| Spread { mean, sd, min, max })
    };
    prop_oneof![
        (1..1_000_000_u32).prop_map(Lengths::Fixed),
        (1..1_000_u32, 1_000..9_000_u32).prop_map(|(from, to)| Lengths::Uniform(from, to)),
        spread().prop_map(Lengths::Normal),
        spread().prop_map(Lengths::LogNormal),
    ]
}

proptest! {
    #[test]
    fn texts_round_trip(
        kind in 0..5,
        counts in (1..1_000_u32, 1..1_000_u32),
        [a, b, c] in [lengths(), lengths(), lengths()],
        zipf in prop::option::of(0.0..10.0_f64),
        think in 0..10_000_000_000_000_u64,
        scale in prop_oneof![Just(1.0), 1e-6..1e3_f64],
    ) {
        let think = Duration::from_nanos(think);
        let (n, m) = counts;
        let kind = match kind {
            0 => Kind::SharedPrefix {
                groups: n, prompts: m, system: a, question: b, output: c, zipf,
            },
            1 => Kind::Unique { prompt: a, output: b },
            2 => Kind::Short { prompt: a, output: b },
            3 => Kind::OnePrefix { system: a, question: b, output: c },
            _ => Kind::Chat { sessions: n, turns: m, system: a, question: b, answer: c, think },
        };
        let workload = Workload { kind, scale };
        prop_assert_eq!(workload.to_string().parse(), Ok(workload));
    }
}
