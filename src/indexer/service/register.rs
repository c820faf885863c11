//! `RegisterPod` and `UnregisterPod`: field checks; the rest is the registry's.

use crate::{
    indexer::{
        ScoreError,
        error::echo,
        service::{Inner, request::check_pod},
    },
    ingest::fleet::PodDeclaration,
    model::CountMode,
    proto::kvindexer as pb,
};

/// Largest engine block size that is believed, in tokens. Hybrid models of vLLM align blocks with
/// their state pages and reach a few thousand.
const MAX_BLOCK_SIZE: u32 = 65_536;

/// Longest endpoint, model name or topic filter, in bytes.
const MAX_TEXT_BYTES: usize = 1024;

impl Inner {
    pub(super) fn register_pod(
        &self,
        request: pb::RegisterPodRequest,
    ) -> Result<pb::RegisterPodResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        check_endpoint("endpoint", &request.endpoint, &["tcp://", "ipc://", "http://"])?;
        if !request.replay_endpoint.is_empty() {
            check_endpoint("replay_endpoint", &request.replay_endpoint, &["tcp://", "ipc://"])?;
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
        if request.block_size > MAX_BLOCK_SIZE {
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

fn check_endpoint(field: &str, endpoint: &str, schemes: &[&str]) -> Result<(), ScoreError> {
    check_text(field, endpoint)?;
    let invalid = |why: String| Err(ScoreError::invalid(field, why));
    let shown = echo(endpoint);
    if endpoint.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return invalid(format!("{shown:?} has white space"));
    }
    let Some((scheme, rest)) =
        schemes.iter().find_map(|scheme| Some((*scheme, endpoint.strip_prefix(scheme)?)))
    else {
        return invalid(format!("{shown:?} starts with none of {}", schemes.join(", ")));
    };
    if scheme == "ipc://" {
        return if rest.is_empty() { invalid(format!("{shown:?} has no path")) } else { Ok(()) };
    }
    let authority = rest.split('/').next().unwrap_or_default();
    let port = match authority.rsplit_once(':') {
        Some(("", _)) => return invalid(format!("{shown:?} has no host")),
        Some((_, port)) => port,
        None if scheme == "http://" && !authority.is_empty() => return Ok(()),
        None => return invalid(format!("{shown:?} has no host and port")),
    };
    match port.parse::<u16>() {
        Ok(1..) => Ok(()),
        _ => invalid(format!("{shown:?} has no port between 1 and 65535")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        #[track_caller]
        fn check(endpoint: &str, legal: bool) {
            let schemes = ["tcp://", "ipc://", "http://"];
            assert_eq!(check_endpoint("endpoint", endpoint, &schemes).is_ok(), legal, "{endpoint}");
        }
        check("tcp://10.0.0.1:5557", true);
        check("tcp://[fd00::1]:5557", true);
        check("tcp://vllm-0.vllm:5557", true);
        check("ipc:///tmp/kv", true);
        check("http://vllm-0:8000", true);
        check("http://vllm-0", true);
        check("", false);
        check("10.0.0.1:5557", false);
        check("tcp://10.0.0.1", false);
        check("tcp://:5557", false);
        check("tcp://host:0", false);
        check("tcp://host:70000", false);
        check("tcp://*:5557 ", false);
        check("ipc://", false);
        check("udp://host:1", false);
        check("http://", false);
    }
}
