//! `loadgen` without arguments: recorded engines, a running indexer, measured numbers.
//!
//! Two recordings are built in: a real `vllm serve` that is killed and started again in the middle,
//! and a two-rank vLLM. They are published over real sockets; the pods are registered and asked about
//! through gRPC, as a router would. Every number in the output is measured or comes from the indexer.

use std::{
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, de::IgnoredAny};
use tonic::transport::{Channel, Endpoint};

use crate::{
    loadgen::{
        recording::{RankStream, Recording},
        replay::{Publisher, PublisherOptions, Sent},
        stats,
    },
    proto::kvindexer::{
        ListPodsRequest, PodState, PodStatus, Prompt, RegisterPodRequest, ScoreRequest,
        WaitVisibleRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
    },
};

const SERVE: &[u8] = include_bytes!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/fixtures/vllm-0.32.0-serve/serve_int_lora_restart.jsonl"
));
const TWO_RANKS: &[u8] = include_bytes!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/fixtures/vllm-0.33.0/basic_int_sha256.jsonl"
));

/// How the demo is run.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// gRPC address of the indexer: `http://host:port`.
    pub indexer: String,
    /// Pause between batches of one pod.
    pub pause: Duration,
    /// How long to wait for the indexer, for its subscription, and for each batch to become visible.
    pub patience: Duration,
}

impl Default for DemoOptions {
    fn default() -> Self {
        Self {
            indexer: "http://127.0.0.1:50051".to_owned(),
            pause: Duration::from_millis(5),
            patience: Duration::from_secs(10),
        }
    }
}

/// One recorded engine and what was measured on it.
struct Pod {
    name: String,
    rank: u32,
    model: String,
    publisher: Publisher,
    /// Sent and not yet seen to be visible.
    sent: Vec<Sent>,
    /// Nanoseconds from send to visibility.
    freshness: Vec<u64>,
}

/// Runs the demo against a running indexer and writes its report to `out`.
///
/// # Errors
///
/// An indexer that is not there, does not subscribe, or does not apply a batch in time.
pub async fn run(options: &DemoOptions, out: &mut (dyn Write + Send)) -> Result<()> {
    let mut client = connect(options).await?;
    let mut pods = pods()?;
    for pod in &mut pods {
        let request = RegisterPodRequest {
            pod: pod.name.clone(),
            dp_rank: Some(pod.rank),
            model: pod.model.clone(),
            endpoint: pod.publisher.endpoint().to_owned(),
            replay_endpoint: pod.publisher.replay_endpoint().unwrap_or_default().to_owned(),
            ..RegisterPodRequest::default()
        };
        client.register_pod(request).await.context("RegisterPod")?;
        writeln!(
            out,
            "registered {} rank {}: {} (model {}, {} recorded batches)",
            pod.name,
            pod.rank,
            pod.publisher.endpoint(),
            pod.model,
            pod.publisher.stream().batches.len(),
        )?;
    }
    for pod in &mut pods {
        let restarts = play(pod, &mut client, options).await?;
        if restarts > 0 {
            writeln!(out, "{} was restarted in between, as in the recording", pod.name)?;
        }
    }
    writeln!(out, "\nPods, as the indexer sees them")?;
    print_pods(&mut client, &pods, out).await?;
    writeln!(out, "\nFreshness: from send to visible for scores")?;
    print_freshness(&mut pods, out)?;
    writeln!(out, "\nScores of prompts from the streams (blocks held of the prompt's blocks)")?;
    print_scores(&mut client, &pods, out).await?;
    Ok(())
}

async fn connect(options: &DemoOptions) -> Result<KvIndexerClient<Channel>> {
    let endpoint = Endpoint::from_shared(options.indexer.clone())
        .with_context(|| format!("indexer address {:?}", options.indexer))?
        .connect_timeout(options.patience);
    let channel =
        endpoint.connect().await.with_context(|| format!("no indexer at {}", options.indexer))?;
    Ok(KvIndexerClient::new(channel))
}

fn pods() -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    let recordings = [
        ("vllm-serve", "tiny", "serve_int_lora_restart", SERVE),
        ("vllm-ranks", "two-ranks", "basic_int", TWO_RANKS),
    ];
    for (name, model, file, bytes) in recordings {
        for stream in Recording::read(Path::new(file), bytes)?.ranks {
            let options = PublisherOptions {
                replay: Some("tcp://127.0.0.1:*".to_owned()),
                ..PublisherOptions::default()
            };
            pods.push(Pod {
                name: name.to_owned(),
                rank: stream.rank,
                model: model.to_owned(),
                publisher: Publisher::bind(stream, "tcp://127.0.0.1:*", options)?,
                sent: Vec::new(),
                freshness: Vec::new(),
            });
        }
    }
    Ok(pods)
}

/// Publishes a pod's whole stream; returns how often its engine was restarted in it.
async fn play(
    pod: &mut Pod,
    client: &mut KvIndexerClient<Channel>,
    options: &DemoOptions,
) -> Result<usize> {
    let mut restarts = 0;
    let mut epoch = 0;
    subscribed(pod, options).await?;
    while let Some(sequence) = pod.publisher.peek().map(|batch| batch.sequence) {
        if pod.sent.last().is_some_and(|last| sequence < last.sequence) {
            epoch = measure(pod, client, options, epoch).await?;
            pod.publisher.restart()?;
            restarts += 1;
            subscribed(pod, options).await?;
        }
        pod.sent.extend(pod.publisher.publish_next()?);
        tokio::time::sleep(options.pause).await;
    }
    measure(pod, client, options, epoch).await?;
    Ok(restarts)
}

async fn subscribed(pod: &mut Pod, options: &DemoOptions) -> Result<()> {
    let deadline = Instant::now() + options.patience;
    while !pod.publisher.has_subscriber()? {
        if Instant::now() >= deadline {
            bail!("the indexer does not subscribe to {}", pod.publisher.endpoint());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Waits until everything sent is visible in an epoch after `epoch`, and notes how long each batch
/// took. Returns the epoch.
async fn measure(
    pod: &mut Pod,
    client: &mut KvIndexerClient<Channel>,
    options: &DemoOptions,
    after: u64,
) -> Result<u64> {
    let Some(last) = pod.sent.last() else { return Ok(after) };
    let deadline = Instant::now() + options.patience;
    let request = |sequence| WaitVisibleRequest {
        pod: pod.name.clone(),
        dp_rank: Some(pod.rank),
        sequence,
        epoch: None,
        timeout_ms: 1_000,
    };
    let epoch = loop {
        let answer = client.wait_visible(request(last.sequence)).await?.into_inner();
        if answer.reached && answer.epoch > after {
            break answer.epoch;
        }
        if Instant::now() >= deadline {
            bail!("{} sequence {} did not become visible", pod.name, last.sequence);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    for sent in &pod.sent {
        let answer = client.wait_visible(request(sent.sequence)).await?.into_inner();
        if answer.visible_unix_ns != 0 {
            pod.freshness.push(answer.visible_unix_ns.saturating_sub(sent.unix_ns));
        }
    }
    pod.sent.clear();
    Ok(epoch)
}

async fn print_pods(
    client: &mut KvIndexerClient<Channel>,
    pods: &[Pod],
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let listed = client.list_pods(ListPodsRequest {}).await.context("ListPods")?.into_inner();
    writeln!(
        out,
        "  {:<12} {:>4}  {:<11} {:>5} {:>9} {:>7} {:>5}",
        "pod", "rank", "state", "epoch", "sequence", "blocks", "gaps"
    )?;
    for pod in pods {
        let is_ours = |row: &&PodStatus| row.pod == pod.name && row.dp_rank == Some(pod.rank);
        let Some(row) = listed.pods.iter().find(is_ours) else {
            bail!("ListPods does not know {} rank {}", pod.name, pod.rank);
        };
        let sequence = row.applied_sequence.map_or_else(|| "-".to_owned(), |s| s.to_string());
        writeln!(
            out,
            "  {:<12} {:>4}  {:<11} {:>5} {:>9} {:>7} {:>5}",
            row.pod,
            pod.rank,
            state_name(row.state),
            row.epoch,
            sequence,
            row.blocks,
            row.gaps,
        )?;
    }
    Ok(())
}

fn state_name(state: i32) -> String {
    let name = PodState::try_from(state).map_or("?", |state| state.as_str_name());
    name.trim_start_matches("POD_STATE_").to_lowercase()
}

fn print_freshness(pods: &mut [Pod], out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(
        out,
        "  {:<12} {:>4} {:>8} {:>10} {:>10} {:>10}",
        "pod", "rank", "batches", "p50 us", "p99 us", "max us"
    )?;
    for pod in pods {
        pod.freshness.sort_unstable();
        let at = |quantile: f64| {
            percentile(&pod.freshness, quantile)
                .map_or_else(|| "-".to_owned(), |ns| format!("{:.0}", ns as f64 / 1e3))
        };
        writeln!(
            out,
            "  {:<12} {:>4} {:>8} {:>10} {:>10} {:>10}",
            pod.name,
            pod.rank,
            pod.freshness.len(),
            at(0.5),
            at(0.99),
            at(1.0),
        )?;
    }
    Ok(())
}

/// The smallest value that at least `quantile` of the sorted values do not exceed.
fn percentile(sorted: &[u64], quantile: f64) -> Option<u64> {
    sorted.get(stats::rank(quantile, sorted.len()) - 1).copied()
}

async fn print_scores(
    client: &mut KvIndexerClient<Channel>,
    pods: &[Pod],
    out: &mut (dyn Write + Send),
) -> Result<()> {
    writeln!(
        out,
        "  {:<28} {:>6}  {:<12} {:>4} {:>5} {:>7}",
        "prompt", "tokens", "pod", "rank", "held", "score"
    )?;
    for pod in pods {
        let prompts = prompts(pod.publisher.stream())?;
        let request = ScoreRequest {
            model: pod.model.clone(),
            prompts: prompts
                .iter()
                .map(|(_, tokens)| Prompt {
                    input: Some(Input::TokenIdsLe(
                        tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
                    )),
                    ..Prompt::default()
                })
                .collect(),
            pods: vec![pod.name.clone()],
            ..ScoreRequest::default()
        };
        let answer = client.score(request).await.context("Score")?.into_inner();
        for (scores, (age, tokens)) in answer.prompts.iter().zip(&prompts) {
            for row in &scores.pods {
                writeln!(
                    out,
                    "  {:<28} {:>6}  {:<12} {:>4} {:>5} {:>7.1}",
                    format!("{age} of {} rank {}", pod.name, pod.rank),
                    tokens.len(),
                    row.pod,
                    row.dp_rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string()),
                    format!("{}/{}", row.confirmed_depth, scores.total_blocks),
                    row.score,
                )?;
            }
        }
    }
    Ok(())
}

/// The parts of a stored event that make a prompt. Both recordings encode events as maps.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    token_ids: Vec<u32>,
    #[serde(default)]
    parent_block_hash: Option<IgnoredAny>,
    #[serde(default)]
    lora_name: Option<String>,
    #[serde(default)]
    extra_keys: Vec<Option<IgnoredAny>>,
}

/// Prompts that began a prefix in the stream, without adapter and salt: the first one, one from the
/// middle and the last one, which eviction should have treated differently.
fn prompts(stream: &RankStream) -> Result<Vec<(&'static str, Vec<u32>)>> {
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for batch in &stream.batches {
        let (_, events, _): (f64, Vec<Event>, IgnoredAny) =
            rmp_serde::from_slice(&batch.payload)
                .with_context(|| format!("recorded batch {}", batch.sequence))?;
        for event in events {
            let plain = event.lora_name.is_none() && event.extra_keys.iter().all(Option::is_none);
            let root = event.parent_block_hash.is_none() && !event.token_ids.is_empty();
            if plain && root && !prompts.contains(&event.token_ids) {
                prompts.push(event.token_ids);
            }
        }
    }
    let middle = prompts.len() / 2;
    let last = prompts.len().saturating_sub(1);
    let wanted = [("first", 0), ("middle", middle), ("last", last)];
    let found = wanted.iter().filter_map(|&(age, at)| Some((age, prompts.get(at)?.clone())));
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&values, 0.5), Some(100));
        assert_eq!(percentile(&values, 0.99), Some(198));
        assert_eq!(percentile(&values, 1.0), Some(200));
        assert_eq!(percentile(&[7], 0.5), Some(7));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn built_in_recordings_have_prompts() {
        let pods = pods().unwrap();
        assert_eq!(pods.len(), 3);
        for pod in &pods {
            let prompts = prompts(pod.publisher.stream()).unwrap();
            assert_eq!(prompts.len(), 3, "{} rank {}", pod.name, pod.rank);
            assert!(prompts.iter().all(|(_, tokens)| tokens.len() >= 16));
        }
    }
}
