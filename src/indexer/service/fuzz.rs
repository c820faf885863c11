//! Properties of the gRPC requests over arbitrary bytes, shared by the fuzz target in `tests/fuzz` and by
//! the replay of its corpus on a stable compiler. For tests only: a broken property panics.

use std::{
    cell::RefCell,
    pin::pin,
    sync::Arc,
    task::{self, Poll, Waker},
};

use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Parts, Service};
use crate::{
    index::{BlockIndex, IndexConfig, Store, runs::RunIndex},
    indexer::{
        ApiConfig, ScoreError,
        metrics::ScoreMetrics,
        registry::{PodRegistry, RegistryError},
        speculation::Speculations,
    },
    ingest::fleet::{Fleet, PodDeclaration},
    model::{CountMode, EngineKey, RowId, TierTable},
    proto::{kvindexer as pb, llmd},
};

/// The model and the pod that hold something: tokens 0, 1, 2, …
const MODEL: &str = "m";
const POD: &str = "p";
const HELD_BLOCKS: u32 = 8;

/// Takes every declaration, and asserts that its fields were checked.
#[derive(Debug)]
struct Checked;

impl PodRegistry for Checked {
    fn register(&self, declaration: PodDeclaration) -> Result<(), RegistryError> {
        assert!(!declaration.pod.is_empty() && !declaration.endpoint.is_empty());
        assert!(declaration.replay_endpoint.is_none_or(|endpoint| endpoint.contains("://")));
        Ok(())
    }

    fn unregister(&self, pod: &str, _: Option<u32>) -> Result<bool, RegistryError> {
        assert!(!pod.is_empty());
        Ok(false)
    }
}

/// Small enough for a fuzzer to reach each limit.
fn limits() -> ApiConfig {
    ApiConfig {
        max_message_bytes: 1 << 12,
        max_tokens: 512,
        max_prompts: 8,
        max_multimodal: 4,
        max_pods_asked: 8,
        max_pod_id_bytes: 64,
        max_speculations: 4,
        ..ApiConfig::default()
    }
}

fn service() -> Option<Service> {
    let config = limits();
    let index: Arc<dyn BlockIndex> = Arc::new(RunIndex::new(IndexConfig::default()));
    let fleet = Arc::new(Fleet::new(Arc::clone(&index)));
    let scheme = Arc::clone(config.models.scheme(MODEL));
    let id = RowId { pod: POD.into(), rank: Some(0) };
    let row = fleet.add(id, "tcp://p:1", &scheme, &MODEL.into(), CountMode::Counted)?;
    let keys: Vec<EngineKey> = (0..HELD_BLOCKS).map(|block| EngineKey(u64::from(block))).collect();
    let tokens: Vec<u32> = (0..HELD_BLOCKS * scheme.block_size()).collect();
    index.store(row.slot, &Store::simple(&keys, None, &tokens, scheme.block_size()));
    let metrics = ScoreMetrics::register(&prometheus::Registry::new(), true).ok()?;
    let speculations = Arc::new(Speculations::new(index, config.max_speculations));
    Some(Service::new(Parts {
        fleet,
        tiers: Arc::new(TierTable::default()),
        config: Arc::new(config),
        registry: Arc::new(Checked),
        speculations,
        metrics,
        tokenizer: None,
        stop: CancellationToken::new(),
    }))
}

thread_local! {
    static SERVICE: RefCell<Option<Service>> = RefCell::new(service());
}

/// Runs a call that waits for nobody but gives others a turn.
fn ended<T>(call: impl Future<Output = T>) -> T {
    let mut call = pin!(call);
    let mut context = task::Context::from_waker(Waker::noop());
    let mut turns = 0;
    loop {
        if let Poll::Ready(answer) = call.as_mut().poll(&mut context) {
            return answer;
        }
        turns += 1;
        assert!(turns < 10_000, "a call waits, and there is nothing to wait for");
    }
}

/// A refusal has a message of bounded length, since it travels in a header.
fn judged<T>(answer: Result<T, ScoreError>) -> Option<T> {
    answer
        .map_err(|error| {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() < 2_048, "{} bytes: {text}", text.len());
        })
        .ok()
}

/// Interprets the first byte as the kind of a request and the rest as its protobuf message: it is refused
/// with a reason, or answered consistently.
///
/// # Panics
///
/// If it is not.
pub fn request_is_total(data: &[u8]) {
    let [kind, message @ ..] = data else { return };
    SERVICE.with_borrow(|service| {
        let service = service.as_ref();
        assert!(service.is_some(), "there is a service to ask");
        if let Some(service) = service {
            ask(service, *kind, message);
        }
    });
}

fn ask(service: &Service, kind: u8, message: &[u8]) {
    let (inner, now) = (&service.inner, Instant::now());
    match kind % 8 {
        0..=2 => {
            let Ok(request) = pb::ScoreRequest::decode(message) else { return };
            let asked = request.clone();
            if let Some(answer) = judged(ended(service.score_now(request, now, None))) {
                is_consistent(&asked, &answer, &inner.config);
            }
        }
        3 => {
            let Ok(request) = pb::ExplainRequest::decode(message) else { return };
            if let Some(answer) = judged(ended(inner.explain(request, now, None))) {
                let blocks = answer.scores.map_or(0, |scores| scores.total_blocks);
                assert!(answer.first_missing_block <= blocks);
            }
        }
        4 => {
            let Ok(request) = pb::RegisterPodRequest::decode(message) else { return };
            judged(inner.register_pod(request));
        }
        5 => {
            let Ok(request) = pb::SpeculateRequest::decode(message) else { return };
            if let Some(answer) = judged(ended(inner.speculate(request, now, None))) {
                let handle = answer.handle;
                let back = pb::UnspeculateRequest { handle, extend_ms: 0 };
                assert!(judged(inner.unspeculate(&back)).is_some());
            }
            assert!(inner.speculations.is_empty(), "what was taken back is gone");
        }
        6 => {
            let Ok(request) = llmd::GetPodScoresRequest::decode(message) else { return };
            judged(ended(inner.get_pod_scores(request, now, None)));
        }
        _ => {
            if let Ok(request) = pb::UnregisterPodRequest::decode(message) {
                judged(inner.unregister_pod(&request));
            }
            if let Ok(request) = pb::UnspeculateRequest::decode(message) {
                judged(inner.unspeculate(&request));
            }
        }
    }
}

fn is_consistent(asked: &pb::ScoreRequest, answer: &pb::ScoreResponse, config: &ApiConfig) {
    assert_eq!(answer.request_id, asked.request_id);
    assert_eq!(answer.prompts.len(), asked.prompts.len());
    assert!(answer.encoded_len() <= config.max_message_bytes);
    for prompt in &answer.prompts {
        for row in &prompt.pods {
            assert!(row.confirmed_depth <= row.depth && row.depth <= prompt.total_blocks);
            assert!(row.depth <= HELD_BLOCKS, "more than anybody holds");
            assert!(row.score >= 0.0 && row.score <= f64::from(row.depth));
        }
        if let Some(compact) = &prompt.compact {
            let rows = compact.slots.len();
            assert_eq!(compact.depths.len(), rows);
            // Left out where equal to the depths.
            assert!([0, rows].contains(&compact.scores.len()));
            assert!([0, rows].contains(&compact.confirmed.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeds of the corpus; `KVX_WRITE_CORPUS=1` writes them.
    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let tokens = |count: u32| -> Vec<u8> { (0..count).flat_map(u32::to_le_bytes).collect() };
        let prompt = |input| pb::Prompt { input: Some(input), ..pb::Prompt::default() };
        let score = pb::ScoreRequest {
            request_id: 7,
            model: MODEL.to_owned(),
            prompts: vec![
                prompt(pb::prompt::Input::TokenIdsLe(tokens(128))),
                prompt(pb::prompt::Input::TokenIds(pb::TokenIds { ids: (0..40).collect() })),
                prompt(pb::prompt::Input::BlockKeys(pb::BlockKeys { keys: vec![1, 2, 3] })),
            ],
            timeout_ms: 1_000,
            ..pb::ScoreRequest::default()
        };
        let mut full = score.clone();
        full.lora = "a".to_owned();
        full.pods = vec![POD.to_owned(), "q".to_owned()];
        full.detail = pb::ScoreDetail::Pods.into();
        full.max_pods = 3;
        full.prompts[0].cache_salt = "s".to_owned();
        full.prompts[0].multimodal =
            vec![pb::MultimodalItem { hash: "h".to_owned(), offset: 3, length: 20 }];
        let compact = pb::ScoreRequest { detail: pb::ScoreDetail::Compact.into(), ..score.clone() };
        let text = pb::ScoreRequest {
            prompts: vec![
                prompt(pb::prompt::Input::Text("hello".to_owned())),
                prompt(pb::prompt::Input::ChatJson("{\"messages\":[]}".to_owned())),
            ],
            ..score.clone()
        };
        let one = pb::ScoreRequest { prompts: vec![score.prompts[0].clone()], ..score.clone() };
        let explain = pb::ExplainRequest { request: Some(one.clone()), pod: POD.to_owned() };
        let register = pb::RegisterPodRequest {
            pod: POD.to_owned(),
            endpoint: "tcp://[::1]:5557".to_owned(),
            replay_endpoint: "ipc:///tmp/x".to_owned(),
            model: MODEL.to_owned(),
            dp_rank: Some(1),
            engine: "vllm".to_owned(),
            topic_filter: "kv@".to_owned(),
            count_mode: pb::CountMode::Set.into(),
            block_size: 16,
            loss_policy: pb::LossPolicy::AgeOut.into(),
        };
        let speculate = pb::SpeculateRequest {
            request: Some(one),
            pod: POD.to_owned(),
            dp_rank: Some(0),
            ttl_ms: 500,
        };
        let llmd = llmd::GetPodScoresRequest {
            prompt: "hello".to_owned(),
            model_name: MODEL.to_owned(),
            pod_identifiers: vec![POD.to_owned()],
        };
        let unregister = pb::UnregisterPodRequest { pod: POD.to_owned(), dp_rank: Some(0) };
        let of = |kind: u8, message: Vec<u8>| [vec![kind], message].concat();
        vec![
            ("score", of(0, score.encode_to_vec())),
            ("full", of(1, full.encode_to_vec())),
            ("compact", of(2, compact.encode_to_vec())),
            ("text", of(0, text.encode_to_vec())),
            ("explain", of(3, explain.encode_to_vec())),
            ("register", of(4, register.encode_to_vec())),
            ("speculate", of(5, speculate.encode_to_vec())),
            ("llmd", of(6, llmd.encode_to_vec())),
            ("unregister", of(7, unregister.encode_to_vec())),
        ]
    }

    #[test]
    fn seeds_hold() {
        for (name, seed) in seeds() {
            request_is_total(&seed);
            if std::env::var_os("KVX_WRITE_CORPUS").is_some() {
                let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/request");
                std::fs::create_dir_all(corpus).unwrap();
                std::fs::write(format!("{corpus}/{name}"), seed).unwrap();
            }
        }
    }

    /// The prompt that the pod holds is found: the target asks a service that has something to say.
    #[test]
    fn something_is_held() {
        let service = service().unwrap();
        let message = pb::ScoreRequest::decode(&seeds()[0].1[1..]).unwrap();
        let answer = ended(service.score_now(message, Instant::now(), None)).unwrap();
        assert_eq!(answer.prompts[0].pods[0].confirmed_depth, HELD_BLOCKS);
    }
}
