//! A stack, and a client that does what the load driver does.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use kv_indexer::loadgen::{
    drive::{
        Target,
        picker::{Picker, Prediction},
    },
    engine::Pace,
    stack::{FleetOptions, Launch, Policy, Stack, StackOptions},
};
use serde_json::{Value, json};

use crate::support::{http, patience};

pub(crate) const COMPLETIONS: &str = "/v1/completions";
pub(crate) const BLOCK: usize = 16;

/// The `loadgen` under test.
pub(crate) fn launch() -> Launch {
    Launch {
        program: Some(PathBuf::from(env!("CARGO_BIN_EXE_loadgen"))),
        patience: patience(),
        ..Launch::default()
    }
}

/// Three quick engines behind a policy.
pub(crate) fn options(policy: Policy) -> StackOptions {
    let fleet = FleetOptions {
        engines: 3,
        block_size: BLOCK,
        pace: Pace { scale: 0.0, ..Pace::default() },
        ..FleetOptions::default()
    };
    StackOptions { fleet, policy, envoy: None, want_hits: true, indexer: false }
}

pub(crate) async fn start(options: StackOptions) -> Stack {
    Stack::start_with(options, &launch()).await.unwrap()
}

/// Is there such a process, other than as a zombie?
pub(crate) fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// A completion of these token ids.
pub(crate) fn body(prompt: impl serde::Serialize) -> Bytes {
    let body = json!({"model": "mock", "prompt": prompt, "max_tokens": 4, "temperature": 0,
        "stream": true, "stream_options": {"include_usage": true}});
    Bytes::from(body.to_string())
}

/// Ids of a prompt that begins as all others of its group.
pub(crate) fn prompt(group: u32, tail: u32) -> Vec<u32> {
    let shared = (0..20 * BLOCK as u32).map(|at| 1_000 * (group + 1) + at);
    shared.chain((0..BLOCK as u32).map(|at| 500_000 + 1_000 * tail + at)).collect()
}

/// What became of a request.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) pod: Option<SocketAddr>,
    pub(crate) cached_tokens: u32,
    pub(crate) prediction: Prediction,
}

/// A client of a stack.
pub(crate) struct Client {
    target: Target,
    picker: Option<Picker>,
    asked: u32,
}

impl Client {
    pub(crate) fn new(stack: &Stack) -> Self {
        let target = stack.target();
        let picker = match target {
            Target::Picker(address) => Some(Picker::new(address).unwrap()),
            _ => None,
        };
        Self { target, picker, asked: 0 }
    }

    /// Sends a request through the endpoint picker or the gateway, and reads the answer.
    pub(crate) async fn ask(&mut self, prompt: &[u32]) -> Served {
        self.send(body(prompt)).await
    }

    /// As [`ask`](Self::ask), with any body of a completion.
    pub(crate) async fn send(&mut self, body: Bytes) -> Served {
        self.asked += 1;
        let id = format!("request-{}", self.asked);
        let Some(picker) = &self.picker else {
            let Target::Gateway(url) = &self.target else { panic!("{:?}", self.target) };
            let gateway = url.strip_prefix("http://").unwrap().parse().unwrap();
            let reply = post(gateway, body).await;
            let cached_tokens = cached_tokens(&reply);
            return Served { pod: None, cached_tokens, prediction: Prediction::default() };
        };
        let mut routed = picker.pick(COMPLETIONS, &id, std::slice::from_ref(&body)).await.unwrap();
        let pod = routed.pod;
        let reply = post(pod, body).await;
        routed.headers(reply.status, "text/event-stream");
        for event in reply.events() {
            routed.piece(&Bytes::from(format!("data: {event}\n\n")));
        }
        let prediction = routed.end().await;
        Served { pod: Some(pod), cached_tokens: cached_tokens(&reply), prediction }
    }

    /// Sends requests and counts the pods that they went to.
    pub(crate) async fn shares(&mut self, requests: u32) -> BTreeMap<SocketAddr, u32> {
        let mut shares = BTreeMap::new();
        for number in 0..requests {
            let served = self.ask(&prompt(number, 0)).await;
            *shares.entry(served.pod.unwrap()).or_default() += 1;
        }
        shares
    }
}

async fn post(to: SocketAddr, body: Bytes) -> http::Reply {
    let text = String::from_utf8(body.to_vec()).unwrap();
    let reply = tokio::task::spawn_blocking(move || http::post(to, COMPLETIONS, &text)).await;
    let reply = reply.unwrap();
    assert_eq!(reply.status, 200, "{reply:?}");
    reply
}

/// Cached tokens by the usage at the end; 0 if it does not tell.
fn cached_tokens(reply: &http::Reply) -> u32 {
    let events = reply.events();
    let mut events = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let usage = events.find_map(|event| event.get("usage").filter(|it| it.is_object()).cloned());
    let usage = usage.unwrap_or_else(|| panic!("no usage in {reply:?}"));
    let tokens = usage.pointer("/prompt_tokens_details/cached_tokens").and_then(Value::as_u64);
    u32::try_from(tokens.unwrap_or_default()).unwrap()
}
