//! Each policy, from the client to the engines' caches.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use kv_indexer::{
    loadgen::{
        drive::Target,
        resources::Watched,
        stack::{CacheTotals, Launch, Policy, Stack, envoy},
    },
    proto::kvindexer::ListPodsRequest,
};

use super::rig::{BLOCK, Client, body, launch, options, prompt, runs, start};
use crate::{
    epp::rig::envoy_binary,
    support::{connect, patience, runtime},
};

fn pods(stack: &Stack) -> BTreeSet<SocketAddr> {
    stack.engines().iter().map(|engine| engine.http).collect()
}

/// The names of the components, whose processes are all there.
fn components(stack: &Stack) -> Vec<String> {
    let mut names = Vec::new();
    for component in stack.components() {
        assert_eq!(component.sources.len(), 1, "{component:?}");
        assert!(
            component.sources.iter().all(|it| matches!(it, Watched::Pid(pid) if runs(*pid))),
            "{component:?}"
        );
        names.push(component.name);
    }
    names
}

/// Asks for the same prefix until the engines' events say that it is held, at most as long as we have
/// patience; returns the answer that was predicted exactly, and who gave all of them.
async fn until_predicted(
    client: &mut Client,
    group: u32,
) -> (super::rig::Served, BTreeSet<SocketAddr>) {
    let (deadline, mut tail, mut asked) = (Instant::now() + patience(), 0, BTreeSet::new());
    loop {
        tail += 1;
        let served = client.ask(&prompt(group, tail)).await;
        asked.extend(served.pod);
        if served.prediction.predicted_tokens == Some(served.cached_tokens)
            && served.cached_tokens > 0
        {
            return (served, asked);
        }
        assert!(Instant::now() < deadline, "{served:?}");
    }
}

#[test]
fn precise_goes_to_the_holder_and_predicts_what_it_finds() {
    runtime().block_on(async {
        let mut stack = start(options(Policy::Precise)).await;
        assert_eq!(components(&stack), ["engines", "indexer", "epp"]);
        assert_eq!(stack.engine_totals().await.unwrap(), [CacheTotals::default(); 3]);
        let mut client = Client::new(&stack);
        let first = client.ask(&prompt(7, 0)).await;
        assert_eq!(first.cached_tokens, 0, "a fresh stack has nothing: {first:?}");
        let (served, asked) = until_predicted(&mut client, 7).await;
        assert_eq!((asked.len(), served.pod), (1, first.pod), "all of one prefix go to its holder");
        assert_eq!(served.cached_tokens as usize, 20 * BLOCK);
        assert_eq!(served.prediction.actual_tokens, Some(served.cached_tokens));
        let said = stack.scrape_predictions().await.unwrap().unwrap();
        assert!(said.exact > 0 && said.predicted_tokens >= 20.0 * BLOCK as f64, "{said:?}");
        let totals = stack.engine_totals().await.unwrap();
        let hits: u64 = totals.iter().map(|it| it.hits).sum();
        assert!(hits >= 20 * BLOCK as u64, "{totals:?}");
        assert_eq!(stack.fault(), None);
        stack.stop().await;
    });
}

#[test]
fn text_is_predicted_if_an_engine_makes_its_tokens() {
    runtime().block_on(async {
        let launch = Launch { render: true, ..launch() };
        let stack = Stack::start_with(options(Policy::Precise), &launch).await.unwrap();
        let mut client = Client::new(&stack);
        let text = "Which pod holds the blocks of this prompt, and how many? ".repeat(40);
        let deadline = Instant::now() + patience();
        loop {
            let served = client.send(body(&text)).await;
            let predicted = served.prediction.predicted_tokens.unwrap_or(0);
            if predicted > 0 && predicted == served.cached_tokens {
                break;
            }
            assert!(Instant::now() < deadline, "{served:?}");
        }
        stack.stop().await;
    });
}

#[test]
fn approximate_follows_what_it_sent_also_by_token_ids() {
    runtime().block_on(async {
        let stack = start(options(Policy::Approximate)).await;
        assert_eq!(components(&stack), ["engines", "epp"]);
        let mut client = Client::new(&stack);
        for group in 0..4 {
            let mut served = BTreeSet::new();
            for tail in 0..4 {
                let answer = client.ask(&prompt(group, tail)).await;
                assert_eq!(answer.cached_tokens > 0, tail > 0, "{answer:?}");
                served.extend(answer.pod);
            }
            assert_eq!(served.len(), 1, "group {group} went to {served:?}");
        }
        let said = stack.scrape_predictions().await.unwrap().unwrap();
        assert_eq!(said.compared(), 0, "it promises nothing");
        stack.stop().await;
    });
}

#[test]
fn least_load_and_random_use_all_pods() {
    runtime().block_on(async {
        for policy in [Policy::LeastLoad, Policy::Random] {
            let stack = start(options(policy.clone())).await;
            let shares = Client::new(&stack).shares(60).await;
            let used: BTreeSet<_> = shares.keys().copied().collect();
            assert_eq!(used, pods(&stack), "{policy}: {shares:?}");
            stack.stop().await;
        }
    });
}

#[test]
fn round_robin_is_even_and_constant_is_one_pod() {
    runtime().block_on(async {
        let stack = start(options(Policy::RoundRobin)).await;
        let shares = Client::new(&stack).shares(30).await;
        assert_eq!(shares.values().copied().collect::<Vec<_>>(), [10, 10, 10], "{shares:?}");
        assert_eq!(shares.into_keys().collect::<BTreeSet<_>>(), pods(&stack));
        assert_eq!(stack.scrape_predictions().await.unwrap(), None);

        // Somebody else's endpoint picker, in front of engines that it does not know.
        let external = Policy::External {
            name: "other".to_owned(),
            address: stack.ext_proc().unwrap(),
            pid: None,
        };
        let other = start(options(external)).await;
        assert_eq!(components(&other), ["engines"]);
        let shares = Client::new(&other).shares(6).await;
        assert_eq!(shares.into_keys().collect::<BTreeSet<_>>(), pods(&stack));
        other.stop().await;
        stack.stop().await;

        let stack = start(options(Policy::Constant)).await;
        let shares = Client::new(&stack).shares(6).await;
        assert_eq!(shares.into_iter().collect::<Vec<_>>(), [(stack.engines()[0].http, 6)]);
        stack.stop().await;
    });
}

#[test]
fn an_indexer_follows_any_policy_if_asked_to() {
    runtime().block_on(async {
        let mut options = options(Policy::Random);
        options.indexer = true;
        let stack = start(options).await;
        assert_eq!(components(&stack), ["engines", "indexer", "epp"]);
        let mut indexer = connect(stack.indexer().unwrap()).await;
        let listed = indexer.list_pods(ListPodsRequest {}).await.unwrap().into_inner();
        let names: BTreeSet<_> = listed.pods.into_iter().map(|pod| pod.pod).collect();
        assert_eq!(names, stack.engines().iter().map(|engine| engine.name.clone()).collect());
        stack.stop().await;
    });
}

#[test]
fn envoy_is_in_front_if_asked_for() {
    runtime().block_on(async {
        let binary = envoy_binary();
        assert_eq!(envoy::find(Some(&binary)).unwrap(), binary);
        for policy in [Policy::Precise, Policy::RoundRobin] {
            let mut options = options(policy.clone());
            options.envoy = Some(binary.clone());
            let stack = start(options).await;
            assert!(matches!(stack.target(), Target::Gateway(_)));
            assert!(components(&stack).contains(&"gateway".to_owned()));
            let gateway = stack.components().into_iter().find(|it| it.name == "gateway").unwrap();
            let [Watched::Pid(pid)] = gateway.sources[..] else { panic!("{gateway:?}") };
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
            let line = String::from_utf8_lossy(&line).into_owned();
            assert!(line.starts_with(binary.to_str().unwrap()), "{line}");

            let mut client = Client::new(&stack);
            for number in 0..9 {
                client.ask(&prompt(3, number)).await;
            }
            let totals = stack.engine_totals().await.unwrap();
            let used = totals.iter().filter(|it| it.queries > 0).count();
            if policy == Policy::Precise {
                assert_eq!(used, 1, "{totals:?}");
                let predicted = predicted(&stack).await;
                assert!(predicted > 0.0);
            } else {
                assert!(totals.iter().all(|it| it.queries == totals[0].queries), "{totals:?}");
            }
            stack.stop().await;
            assert!(!runs(pid), "Envoy is left");
        }
    });
}

/// Tokens that were promised; the endpoint picker counts a request when its stream ends, soon after
/// the client has its answer.
async fn predicted(stack: &Stack) -> f64 {
    let deadline = Instant::now() + patience();
    loop {
        let said = stack.scrape_predictions().await.unwrap().unwrap();
        if said.compared() > 0 && said.predicted_tokens > 0.0 || Instant::now() > deadline {
            return said.predicted_tokens;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
