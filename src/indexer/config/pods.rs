//! `pods` and `--pod`: the publishers that are known at start.

use std::collections::HashMap;

use super::{IndexerConfig, events::ENGINES};
use crate::{
    ingest::{
        discovery::{EndpointUse, MAX_BLOCK_SIZE, MAX_POD_ID_BYTES, MAX_RANK, check_endpoint},
        fleet::PodDeclaration,
        loss::LossPolicy,
    },
    model::CountMode,
    support::fields::{Fields, Reader},
};

impl IndexerConfig {
    /// Reads `pods`, or takes those of the command line. `engine` is that of pods that name none.
    pub(super) fn read_pods(
        &mut self,
        reader: &Reader,
        root: &Fields<'_>,
        flags: &[PodDeclaration],
        engine: &str,
    ) {
        let mut pods = Vec::new();
        let mut paths = Vec::new();
        for fields in root.each("pods") {
            paths.push(fields.path_of("id"));
            pods.push(read_pod(fields, self.ingest.bind.is_some()));
        }
        if !flags.is_empty() {
            pods = flags.to_vec();
            paths = vec!["--pod".to_owned(); pods.len()];
            for pod in flags {
                for message in check_declaration(pod) {
                    reader.fault("--pod", format!("{:?}: {message}", pod.pod));
                }
            }
        }
        let mut seen = HashMap::new();
        for (pod, path) in pods.iter_mut().zip(&paths) {
            if pod.engine.is_empty() {
                engine.clone_into(&mut pod.engine);
            }
            // A missing name has been reported already.
            if !pod.pod.is_empty() && seen.insert((pod.pod.clone(), pod.rank), ()).is_some() {
                let rank = pod.rank.map_or_else(String::new, |rank| format!(" with rank {rank}"));
                reader.fault(path, format!("pod {:?}{rank} is declared twice", pod.pod));
            }
        }
        if pods.len() > self.ingest.max_pods {
            let text = format!("{} pods, but maxPods is {}", pods.len(), self.ingest.max_pods);
            reader.fault(if flags.is_empty() { "pods" } else { "--pod" }, text);
        }
        self.ingest.pods = pods;
    }
}

/// With `bound`, a pod without endpoint is one that connects to us.
fn read_pod(fields: Fields<'_>, bound: bool) -> PodDeclaration {
    let endpoint = |usage| move |text: &str| quoted(text, usage).map(|()| text.to_owned());
    let own = match bound && fields.string("endpoint").unwrap_or_default().is_empty() {
        true => None,
        false => fields.required("endpoint", |fields, name| {
            fields.parsed(name, endpoint(EndpointUse::ConnectOrAsk))
        }),
    };
    let pod = PodDeclaration {
        pod: fields
            .required("id", |fields, name| {
                fields.parsed(name, |text| check_id(text).map(|()| text.to_owned()))
            })
            .unwrap_or_default(),
        endpoint: own.unwrap_or_default(),
        replay_endpoint: fields.parsed("replayEndpoint", endpoint(EndpointUse::Connect)),
        model: fields.nonempty("model"),
        rank: fields.integer("rank", 0..=MAX_RANK.into()),
        topic_filter: fields.string("topicFilter").unwrap_or_default(),
        engine: fields.one_of("engine", &ENGINES).unwrap_or_default().to_owned(),
        engine_version: fields.nonempty("engineVersion"),
        trust_unchained: fields.boolean("trustUnchained").unwrap_or_default(),
        count_mode: fields
            .one_of("countMode", &[("counted", CountMode::Counted), ("set", CountMode::Set)])
            .unwrap_or_default(),
        block_size: fields.integer("blockSize", 1..=MAX_BLOCK_SIZE),
        first_sequence: fields.integer("firstSequence", 0..=u64::MAX).unwrap_or_default(),
        loss_policy: fields.one_of("lossPolicy", &LossPolicy::NAMES),
    };
    fields.finish();
    pod
}

/// Checks an endpoint; the message repeats it.
pub(super) fn quoted(text: &str, usage: EndpointUse) -> Result<(), String> {
    check_endpoint(text, usage).map_err(|why| format!("{text:?}: {why}"))
}

fn check_id(id: &str) -> Result<(), String> {
    match id.len() {
        0 => Err("must not be empty".to_owned()),
        1..=MAX_POD_ID_BYTES => Ok(()),
        len => Err(format!("has {len} bytes; at most {MAX_POD_ID_BYTES} are legal")),
    }
}

/// The rules of [`read_pod`] for a declaration that did not come out of a document.
fn check_declaration(pod: &PodDeclaration) -> Vec<String> {
    let replay = pod.replay_endpoint.as_deref();
    [
        check_id(&pod.pod),
        quoted(&pod.endpoint, EndpointUse::ConnectOrAsk),
        replay.map_or(Ok(()), |replay| quoted(replay, EndpointUse::Connect)),
        match pod.block_size {
            Some(size) if !(1..=MAX_BLOCK_SIZE).contains(&u64::from(size)) => {
                Err(format!("block size {size} is not in 1..={MAX_BLOCK_SIZE}"))
            }
            _ => Ok(()),
        },
        match ENGINES.iter().any(|(name, _)| *name == pod.engine) {
            true => Ok(()),
            false => Err(format!("engine {:?} is neither vllm nor sglang", pod.engine)),
        },
    ]
    .into_iter()
    .filter_map(Result::err)
    .collect()
}
