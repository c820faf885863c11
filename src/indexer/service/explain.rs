//! `Explain`: why a pod scores what it scores, in plain words.
//!
//! The call looks at one prompt and one pod. What the pod *would* hold under another model name,
//! adapter or salt is tried, not guessed: the prompt's tokens are hashed again and looked up, at
//! most [`RETRY_BLOCKS`] blocks of them.

use std::{collections::BTreeSet, sync::Arc};

use tokio::time::Instant;

use crate::{
    hash::Prompt,
    index::{DROPPED, Match, PodUsage},
    indexer::{
        ScoreError,
        error::echo,
        service::{
            Inner,
            request::{Head, Input, Text, check_pod, tokenized},
            score::pod_score,
        },
    },
    ingest::fleet::{Row, Table},
    model::{PodState, RequestKey},
    proto::kvindexer as pb,
};

/// Blocks that a retry hashes at most: enough to tell a hit from a miss.
const RETRY_BLOCKS: usize = 256;

/// Pods named in one finding at most.
const NAMED_PODS: usize = 8;

/// A similarity of pod names worth a hint; 1 = equal.
const SIMILAR: f64 = 0.85;

/// What was found: kinds, as in `ExplainResponse.causes`, and sentences.
type Findings = Vec<(&'static str, String)>;

/// What one explanation is about.
#[derive(Debug)]
struct Case<'a> {
    inner: &'a Inner,
    table: &'a Table,
    head: &'a Head,
    request: &'a pb::ScoreRequest,
    prompt: &'a pb::Prompt,
    input: &'a Input<'a>,
    keys: &'a [RequestKey],
}

impl Inner {
    pub(super) async fn explain(
        &self,
        request: pb::ExplainRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<pb::ExplainResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        let score = request.request.ok_or_else(|| ScoreError::invalid("request", "is missing"))?;
        let [prompt] = score.prompts.as_slice() else {
            let why =
                format!("exactly one prompt is explained, the request has {}", score.prompts.len());
            return Err(ScoreError::invalid("request.prompts", why));
        };
        let within = |error: ScoreError| error.within("request");
        let head = Head::resolve(&self.config, &score, arrival, call).map_err(within)?;
        let text = Text::Allowed(self.tokenizer.as_ref());
        let input = tokenized(&self.config, &head, 0, prompt, text).await.map_err(within)?;
        let keys = head.keys(&score.lora, 0, prompt, &input).map_err(within)?;
        head.in_time(0, 1)?;
        let table = self.fleet.table();
        let case = Case {
            inner: self,
            table: &table,
            head: &head,
            request: &score,
            prompt,
            input: &input,
            keys: &keys,
        };
        Ok(case.explain(&request.pod))
    }
}

impl Case<'_> {
    fn explain(&self, pod: &str) -> pb::ExplainResponse {
        let mut found = Vec::new();
        self.inner.look_up(self.table, &self.head.model, self.keys, true, &mut found);
        let rows = self.table.pod(pod);
        let of = |row: &Row| found.iter().find(|found| found.slot == row.slot);
        let confirmed = rows.iter().filter_map(|row| Some(of(row)?.confirmed)).max();
        let missing = confirmed.unwrap_or_default() as usize;
        let mut findings = self.about_the_request();
        if rows.is_empty() {
            findings.push(("not_registered", self.not_registered(pod)));
        }
        for row in rows {
            let prefix = row.id.rank.map_or_else(String::new, |rank| format!("rank {rank}: "));
            let about = self.about_the_row(row, of(row));
            findings.extend(about.into_iter().map(|(cause, text)| (cause, prefix.clone() + &text)));
        }
        if !rows.is_empty() && missing < self.keys.len() {
            findings.extend(self.retries(rows, missing));
        }
        let (causes, findings) =
            findings.into_iter().map(|(cause, text)| (cause.to_owned(), text)).unzip();
        pb::ExplainResponse {
            scores: Some(pb::PromptScores {
                total_blocks: self.keys.len() as u32,
                block_size: self.head.scheme.block_size(),
                pods: rows
                    .iter()
                    .map(|row| pod_score(&self.inner.tiers, row, of(row), true))
                    .collect(),
                compact: None,
            }),
            first_missing_block: missing as u32,
            holders: self.holders(missing),
            findings,
            causes,
        }
    }

    fn about_the_request(&self) -> Findings {
        let mut findings = Vec::new();
        let (head, block_size) = (self.head, self.head.scheme.block_size());
        if head.model != self.request.model {
            let asked = echo(&self.request.model);
            findings.push(("alias", format!("model {asked} is an alias of {}", head.model)));
        }
        let sent = self.request.hash_fingerprint;
        if sent != 0 && sent != head.fingerprint {
            findings.push(("fingerprint", format!(
                "hash_fingerprint {sent:#018x} is not that of this server ({:#018x}): Score refuses \
                 the request, and block keys hashed so cannot match",
                head.fingerprint
            )));
        }
        if self.keys.is_empty() {
            let tokens = self.input.ids().map_or(0, <[u32]>::len);
            findings.push(("short_prompt", format!(
                "the prompt is shorter than one block: {tokens} tokens, blocks have {block_size}; \
                 partial blocks are never counted"
            )));
        }
        if !self.table.rows.iter().any(|row| *row.model == *head.model) {
            let served: BTreeSet<&str> =
                self.table.rows.iter().map(|row| &*row.model).filter(|m| !m.is_empty()).collect();
            let served: Vec<&str> = served.into_iter().take(NAMED_PODS).collect();
            findings.push((
                "model_name",
                match served.as_slice() {
                    [] => format!("no pod serves model {}", echo(&head.model)),
                    served => format!(
                        "no pod serves model {}; pods serve {}",
                        echo(&head.model),
                        served.join(", ")
                    ),
                },
            ));
        }
        findings
    }

    fn not_registered(&self, pod: &str) -> String {
        let known: BTreeSet<&str> = self.table.rows.iter().map(|row| &*row.id.pod).collect();
        let shown = echo(pod);
        let start = format!("pod {shown} is not registered");
        let like = known
            .iter()
            .map(|known| (strsim::jaro_winkler(known, &shown), *known))
            .filter(|(similarity, _)| *similarity >= SIMILAR)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, like)) = like {
            return format!("{start}; did you mean {like}?");
        }
        let count = known.len();
        let first: Vec<&str> = known.into_iter().take(NAMED_PODS).collect();
        match first.as_slice() {
            [] => format!("{start}: no pod is"),
            first if count > first.len() => {
                format!("{start}; {count} pods are, among them {}", first.join(", "))
            }
            first => format!("{start}; registered: {}", first.join(", ")),
        }
    }

    fn about_the_row(&self, row: &Arc<Row>, found: Option<&Match>) -> Findings {
        let mut findings = Vec::new();
        let index = self.inner.fleet.index();
        let (status, usage) = (row.status(), index.pod_usage(row.slot));
        let applied = row.now().applied;
        let silent = status.last_applied_unix_ns == 0 && applied.is_none();
        if silent {
            let text = format!(
                "no events yet from {}: is the engine reachable, are KV-cache events enabled \
                 (vLLM and SGLang: --kv-events-config), does the topic filter let them through?",
                row.endpoint
            );
            findings.push(("no_events", text));
        } else if usage.blocks == 0 {
            let text = "the pod holds no block at all: its cache is empty or was cleared; engines \
                        tell what they stored after a reset with the next request only";
            findings.push(("cleared", text.into()));
        }
        if !status.connected {
            findings.push(("not_connected", format!("not connected to {}", row.endpoint)));
        } else if status.stale {
            let text = "stale: the subscription is disconnected, so events are missing";
            findings.push(("stale", text.into()));
        }
        let speaks = |other: &Arc<Row>| *other.model == *row.model && other.now().applied.is_some();
        if silent
            && status.connected
            && status.messages == 0
            && (status.stale || self.table.rows.iter().any(speaks))
        {
            let text = format!(
                "connected to {}, which has never said anything, while the model is in use: its \
                 events look switched off (vLLM: enable_kv_cache_events and publisher zmq; SGLang: \
                 publisher zmq; prefix caching must be on)",
                row.endpoint
            );
            findings.push(("events_off", text));
        }
        let why =
            if status.reason.is_empty() { String::new() } else { format!(" ({})", status.reason) };
        match status.state {
            PodState::Connecting | PodState::Live => {}
            PodState::Replaying => {
                findings.push(("replaying", "replaying: its state is being rebuilt".into()));
            }
            PodState::Partial => {
                let text = "history before we joined is missing, the score may be too low";
                findings.push(("partial", format!("partial{why}: {text}")));
            }
            PodState::Degraded => {
                let text = "removals may have been lost, the score may be too high";
                findings.push(("degraded", format!("degraded{why}: {text}")));
            }
        }
        if usage.unconfirmed > 0 {
            let held: u64 = usage.blocks_by_tier.iter().sum();
            findings.push(("unconfirmed", format!(
                "{} of {held} blocks have not been named by the engine since events were lost: they \
                 may be gone there",
                usage.unconfirmed
            )));
        }
        let lost = status.gaps > 0 || status.state == PodState::Partial;
        if lost && status.replays == 0 {
            let text = "events were lost and no replay was ever asked for: the engine needs a \
                        replay_endpoint in --kv-events-config, and the pod's declaration here must \
                        name it (replayEndpoint), or losses cannot be repaired";
            findings.push(("no_replay", text.into()));
        }
        if usage.reannounces() {
            let held: u64 = usage.blocks_by_tier.iter().sum();
            findings.push(("reannounce", format!(
                "{} of {held} blocks were announced again while they were held: the engine looks like \
                 one that reports every block of a request, and then one removal does not end them \
                 and the score is too high; declare the pod with countMode: set",
                usage.repeated
            )));
        }
        self.about_names_and_sizes(row, &usage, &mut findings);
        if usage.orphans > 0 || status.orphans > 0 {
            findings.push(("orphans", format!(
                "{} blocks wait for a parent that was never announced, {} ever did: events were \
                 lost, or came before we joined",
                usage.orphans, status.orphans
            )));
        }
        if status.rejected_events > 0 {
            findings.push((
                "rejected",
                format!(
                    "{} events were rejected as unusable; kv_events_rejected_total says why",
                    status.rejected_events
                ),
            ));
        }
        if status.refused_blocks > 0 {
            findings.push(("capped", format!(
                "{} blocks were refused because the index is at its cap (kv_index_cap_bytes): the \
                 score may be too low",
                status.refused_blocks
            )));
        }
        findings.extend(self.about_the_missing_block(row, found));
        findings
    }

    fn about_names_and_sizes(&self, row: &Row, usage: &PodUsage, findings: &mut Findings) {
        if row.model.is_empty() {
            findings.push((
                "no_model",
                "the pod's model is unknown, so its events are not indexed: name it in the topic, \
                 the configuration or RegisterPod"
                    .into(),
            ));
        } else if *row.model != *self.head.model {
            findings.push(("model_name", format!(
                "the pod serves model {}, the request says {}: if they are the same, list one as an \
                 alias of the other (modelAliases)",
                row.model,
                echo(&self.head.model)
            )));
        }
        let (ours, theirs) = (&self.head.scheme, &row.scheme);
        if ours.fingerprint() != theirs.fingerprint() {
            findings.push(("hash_settings", format!(
                "the pod's blocks are hashed with {} and {} tokens, the request's with {} and {}",
                theirs.algorithm(),
                theirs.block_size(),
                ours.algorithm(),
                ours.block_size()
            )));
        }
        let block_size = ours.block_size();
        for &engine in usage.block_sizes.iter().filter(|&&engine| engine != block_size) {
            findings.push(("block_size", if engine == 0 || block_size.is_multiple_of(engine) || engine.is_multiple_of(block_size) {
                format!("engine blocks of {engine} tokens, request blocks of {block_size}: fine, but coarser")
            } else {
                format!(
                    "engine blocks of {engine} tokens, request blocks of {block_size}: neither is a \
                     multiple of the other, so a request block needs two engine blocks at its ends"
                )
            }));
        }
        if usage.hybrid_unsupported {
            findings.push(("unscored_groups", "some attention group (mamba, chunked, cross, encoder) is not scored: the depth is \
                 that of full attention"
                    .into()));
        }
    }

    fn about_the_missing_block(
        &self,
        row: &Arc<Row>,
        found: Option<&Match>,
    ) -> Option<(&'static str, String)> {
        let (depth, confirmed) =
            found.map_or((0, 0), |found| (found.depth as usize, found.confirmed as usize));
        let total = self.keys.len();
        let expected = if depth > confirmed {
            format!("; {} blocks from there on are speculative", depth - confirmed)
        } else {
            String::new()
        };
        let Some(&key) = self.keys.get(confirmed) else {
            return (total > 0).then(|| ("held", format!("the pod holds all {total} blocks")));
        };
        let index = self.inner.fleet.index();
        let tokens = u64::from(self.head.scheme.block_size());
        let start = confirmed as u64 * tokens;
        let block = format!("block {confirmed} (tokens {start}..{})", start + tokens);
        Some(if index.holders(self.keys, confirmed).contains(&row.slot) {
            let text = format!(
                "{block} is held, but does not lengthen the prefix: a sliding-window group lacks \
                 blocks before it, or the pod is muted because its hashes are not chained{expected}"
            );
            ("unused", text)
        } else if index.removed_at(row.slot, key) == Some(DROPPED) {
            let text = format!(
                "{block} was dropped here: events were lost, and the engine did not name it in time \
                 afterwards{expected}"
            );
            ("dropped", text)
        } else if let Some(sequence) = index.removed_at(row.slot, key) {
            let text =
                format!("{block} was removed by the engine at sequence {sequence}{expected}");
            ("removed", text)
        } else {
            ("missing", format!("{block} was never stored, or was removed long ago{expected}"))
        })
    }

    /// Would the prompt match under other names?
    fn retries(&self, rows: &[Arc<Row>], missing: usize) -> Findings {
        let lora = self.request.lora.as_str();
        let Some(tokens) = self.input.ids() else {
            return vec![(
                "keys_only",
                "the request carries block keys: whether another model name, adapter or salt would \
                 match can only be tried with token ids"
                    .into(),
            )];
        };
        let most = RETRY_BLOCKS.saturating_mul(self.head.scheme.block_size() as usize);
        let tokens = tokens.get(..most).unwrap_or(tokens);
        let mut multimodal = self.input.items(self.prompt);
        // Clipped items touch the same of the remaining blocks.
        multimodal.retain(|item| (item.offset as usize) < tokens.len());
        for item in &mut multimodal {
            item.length = item.length.min(tokens.len() as u32 - item.offset);
        }
        let salt = self.prompt.cache_salt.as_str();
        let plain = Prompt {
            model: &self.head.model,
            lora,
            tokens,
            cache_salt: salt,
            multimodal: &multimodal,
        };
        let mut findings = Vec::new();
        let mut attempt = |cause, what: String, prompt: &Prompt<'_>| {
            let depth = self.depth_of(prompt, rows);
            if depth > missing {
                findings.push((cause, format!("{what}, {depth} blocks would match")));
            }
        };
        if !salt.is_empty() {
            attempt(
                "salt",
                "the request is salted: without cache_salt".into(),
                &Prompt { cache_salt: "", ..plain },
            );
        }
        if !multimodal.is_empty() {
            attempt(
                "multimodal",
                "without the multimodal items".into(),
                &Prompt { multimodal: &[], ..plain },
            );
        }
        if !lora.is_empty() {
            let what = format!("for the base model instead of adapter {}", echo(lora));
            attempt("lora", what, &Prompt { lora: "", ..plain });
        }
        let index = self.inner.fleet.index();
        let loras: BTreeSet<Arc<str>> =
            rows.iter().flat_map(|row| index.pod_usage(row.slot).loras).collect();
        for other in loras.iter().filter(|other| ***other != *lora && !other.is_empty()) {
            attempt(
                "lora",
                format!("for adapter {}", echo(other)),
                &Prompt { lora: other, ..plain },
            );
        }
        let models: BTreeSet<&str> = rows.iter().map(|row| &*row.model).collect();
        for model in
            models.into_iter().filter(|model| !model.is_empty() && *model != self.head.model)
        {
            attempt("model_name", format!("under model name {model}"), &Prompt { model, ..plain });
        }
        if salt.is_empty() && findings.is_empty() && missing == 0 {
            findings.push(("salt", "no other name that the pod has shown would match; if its requests are salted, send \
                 their cache_salt"
                    .into()));
        }
        findings
    }

    /// Blocks of `prompt` that the best of `rows` holds, whatever its model.
    fn depth_of(&self, prompt: &Prompt<'_>, rows: &[Arc<Row>]) -> usize {
        let Ok(keys) = prompt.keys(&self.head.scheme) else { return 0 };
        let mut found = Vec::new();
        self.inner.fleet.index().lookup(&keys, false, &mut found);
        let ours = found.iter().filter(|found| rows.iter().any(|row| row.slot == found.slot));
        ours.map(|found| found.confirmed as usize).max().unwrap_or_default()
    }

    /// Names of the rows that hold a block of the prompt.
    fn holders(&self, block: usize) -> Vec<String> {
        let slots = self.inner.fleet.index().holders(self.keys, block);
        slots.iter().filter_map(|slot| Some(self.table.slot(*slot)?.id.to_string())).collect()
    }
}
