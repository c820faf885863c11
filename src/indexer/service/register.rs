//! `RegisterPod` and `UnregisterPod`: field checks; the rest is the registry's.

use crate::{
    indexer::{
        ScoreError,
        error::echo,
        service::{Inner, request::check_pod},
    },
    ingest::{
        discovery::{EndpointUse, MAX_BLOCK_SIZE, check_endpoint},
        fleet::PodDeclaration,
        loss::LossPolicy,
    },
    model::CountMode,
    proto::kvindexer as pb,
};

/// Longest endpoint, model name or topic filter, in bytes.
const MAX_TEXT_BYTES: usize = 1024;

impl Inner {
    pub(super) fn register_pod(
        &self,
        request: pb::RegisterPodRequest,
    ) -> Result<pb::RegisterPodResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        check("endpoint", &request.endpoint, EndpointUse::ConnectOrAsk)?;
        if !request.replay_endpoint.is_empty() {
            check("replay_endpoint", &request.replay_endpoint, EndpointUse::Connect)?;
        }
        check_text("model", &request.model)?;
        check_text("topic_filter", &request.topic_filter)?;
        if !matches!(request.engine.as_str(), "" | "vllm" | "sglang") {
            let why = format!("{:?} is none of vllm, sglang and empty", echo(&request.engine));
            return Err(ScoreError::invalid("engine", why));
        }
        let count_mode = match pb::CountMode::try_from(request.count_mode) {
            Ok(pb::CountMode::Unspecified) => CountMode::Counted,
            Ok(pb::CountMode::Set) => CountMode::Set,
            Err(_) => {
                let why = format!("{} is no CountMode", request.count_mode);
                return Err(ScoreError::invalid("count_mode", why));
            }
        };
        let loss_policy = match pb::LossPolicy::try_from(request.loss_policy) {
            Ok(pb::LossPolicy::Unspecified) => None,
            Ok(pb::LossPolicy::Keep) => Some(LossPolicy::Keep),
            Ok(pb::LossPolicy::AgeOut) => Some(LossPolicy::AgeOut),
            Ok(pb::LossPolicy::Clear) => Some(LossPolicy::Clear),
            Err(_) => {
                let why = format!("{} is no LossPolicy", request.loss_policy);
                return Err(ScoreError::invalid("loss_policy", why));
            }
        };
        if u64::from(request.block_size) > MAX_BLOCK_SIZE {
            let why = format!("{} is over {MAX_BLOCK_SIZE}", request.block_size);
            return Err(ScoreError::invalid("block_size", why));
        }
        let given = |text: String| (!text.is_empty()).then_some(text);
        self.registry.register(PodDeclaration {
            pod: request.pod,
            endpoint: request.endpoint,
            replay_endpoint: given(request.replay_endpoint),
            model: given(request.model)
                .map(|model| self.config.models.canonical(&model).to_owned()),
            rank: request.dp_rank,
            topic_filter: request.topic_filter,
            engine: request.engine,
            count_mode,
            loss_policy,
            block_size: (request.block_size > 0).then_some(request.block_size),
            ..PodDeclaration::default()
        })?;
        Ok(pb::RegisterPodResponse {})
    }

    pub(super) fn unregister_pod(
        &self,
        request: &pb::UnregisterPodRequest,
    ) -> Result<pb::UnregisterPodResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        if self.registry.unregister(&request.pod, request.dp_rank)? {
            return Ok(pb::UnregisterPodResponse {});
        }
        let rank = request.dp_rank.map_or_else(String::new, |rank| format!("#{rank}"));
        Err(ScoreError::UnknownPod { pod: echo(&request.pod) + &rank })
    }
}

fn check_text(field: &str, text: &str) -> Result<(), ScoreError> {
    if text.len() > MAX_TEXT_BYTES {
        let why = format!("{} bytes, at most {MAX_TEXT_BYTES}", text.len());
        return Err(ScoreError::invalid(field, why));
    }
    Ok(())
}

fn check(field: &str, endpoint: &str, usage: EndpointUse) -> Result<(), ScoreError> {
    check_text(field, endpoint)?;
    check_endpoint(endpoint, usage)
        .map_err(|why| ScoreError::invalid(field, format!("{:?}: {why}", echo(endpoint))))
}
