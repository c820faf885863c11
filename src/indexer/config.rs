//! `kv-indexer`'s configuration: one document, read once, judged whole.
//!
//! # Documents
//!
//! YAML or JSON. `config/kv-indexer.yaml` lists every field with its meaning, unit, default and
//! range; a test holds it to this module. Names are llm-d's where the meaning is. llm-d's own
//! documents load as they are: `{indexerConfig, kvEventsConfig, tokenProcessorConfig}`, with or
//! without the plugin parameters `speculativeIndexing` and `speculativeTTL`. Of their fields, the
//! ones without a meaning here give a warning each; unknown ones are refused.
//!
//! # Precedence
//!
//! Flags, then the document, then defaults. `--pod` flags replace the document's `pods`.
//!
//! # Secrets
//!
//! None are kept: `redisConfig.address` is not used and not stored, and endpoints with a password
//! are refused. `hashSeed` is no secret here: whoever computes block keys has to know it, and block
//! keys decide about routing only, never about which tokens an engine reuses.

mod events;
mod json;
mod keys;
mod pods;
mod serving;
mod snapshot;
mod storage;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

pub use self::serving::{Auth, GrpcTls, Tokenizers};
use crate::{
    indexer::{ApiConfig, snapshot::SnapshotConfig},
    ingest::{IngestConfig, fleet::PodDeclaration},
    model::TierTable,
    support::{
        fields::{Document, Fault, Fields, Reader, Report, set},
        telemetry::{self, LogFormat},
        units,
    },
};

/// Topic prefix of the bound socket unless configured, as in llm-d.
const DEFAULT_TOPIC: &str = "kv@";
const GIVEN_TWICE: &str = "is also at the top of the document; give one of them";
/// An hour, in milliseconds.
const HOUR_MS: u64 = 3_600_000;

/// Everything that can be set about `kv-indexer`.
#[derive(Clone, Debug)]
pub struct IndexerConfig {
    /// Where the gRPC API listens; port 0 takes a free one.
    pub grpc_listen: SocketAddr,
    /// TLS of the gRPC API; `None` = plaintext.
    pub grpc_tls: Option<GrpcTls>,
    /// Where metrics, health and configuration are served; port 0 takes a free one.
    pub admin_listen: SocketAddr,
    /// Who may use what is not for everybody.
    pub auth: Auth,
    /// How a log line looks.
    pub log_format: LogFormat,
    /// Log level, or directives by module. `RUST_LOG` goes before it.
    pub log_level: String,
    /// Streams and pods.
    pub ingest: IngestConfig,
    /// What turns text into tokens.
    pub tokenizers: Tokenizers,
    /// API limits, models and their hash settings.
    pub api: ApiConfig,
    /// What a block is worth by the tier that holds it.
    pub tiers: TierInputs,
    /// Memory that the index may take, bytes.
    pub index_cap_bytes: u64,
    /// A file with further pods, watched.
    pub pods_file: Option<PathBuf>,
    /// How often that file is looked at.
    pub pods_file_poll: Duration,
    /// After this long the process is ready even if some pod has not been heard of.
    pub ready_timeout: Duration,
    /// How long readiness is withdrawn before a shutdown goes on.
    pub readiness_grace: Duration,
    /// How long a shutdown may take after that.
    pub drain: Duration,
    /// Where and when the index is saved.
    pub snapshot: SnapshotConfig,
    /// A running indexer, `http://host:port`, whose index this one begins with.
    pub bootstrap_from: Option<String>,
    /// Publish metrics under llm-d's names, too.
    pub llmd_metrics: bool,
    /// What the document holds that has no effect, or not the expected one.
    pub warnings: Vec<String>,
}

impl Default for IndexerConfig {
    fn default() -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self {
            grpc_listen: local(50_051),
            grpc_tls: None,
            admin_listen: local(9_091),
            auth: Auth::default(),
            log_format: LogFormat::Text,
            log_level: "info".to_owned(),
            ingest: IngestConfig {
                topic_filter: DEFAULT_TOPIC.to_owned(),
                ..IngestConfig::default()
            },
            tokenizers: Tokenizers::default(),
            api: ApiConfig::default(),
            tiers: TierInputs::default(),
            index_cap_bytes: 4 << 30,
            pods_file: None,
            pods_file_poll: Duration::from_secs(1),
            ready_timeout: Duration::from_secs(10),
            readiness_grace: Duration::ZERO,
            drain: Duration::from_secs(5),
            snapshot: SnapshotConfig::default(),
            bootstrap_from: None,
            llmd_metrics: true,
            warnings: Vec::new(),
        }
    }
}

/// What makes a [`TierTable`].
#[derive(Clone, Debug, PartialEq)]
pub struct TierInputs {
    /// Weights that differ from the built-in ones, by lower-case name.
    pub weights: Vec<(String, f64)>,
    /// Weight of a tier that is neither built in nor configured.
    pub unlisted: f64,
    /// Weight of a block that a pod is only expected to hold. 1.0, as in llm-d: a router that
    /// announces where it sent a prompt wants the next one to follow it.
    pub speculative: f64,
}

impl Default for TierInputs {
    fn default() -> Self {
        Self { weights: Vec::new(), unlisted: 0.5, speculative: 0.5 }
    }
}

impl TierInputs {
    /// A new table with these weights.
    #[must_use]
    pub fn table(&self) -> TierTable {
        TierTable::new(&self.weights, self.unlisted)
    }
}

/// What the command line says; it goes before the document.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// Replaces `pods` if there is any.
    pub pods: Vec<PodDeclaration>,
    /// Replaces `podsFile`.
    pub pods_file: Option<PathBuf>,
    /// Replaces `grpcListen`.
    pub grpc_listen: Option<SocketAddr>,
    /// Replaces `adminListen`.
    pub admin_listen: Option<SocketAddr>,
    /// Replaces `tokenProcessorConfig.blockSizeTokens`, 1..=65536.
    pub block_size: Option<u32>,
    /// Replaces `log.format`.
    pub log_format: Option<LogFormat>,
    /// Replaces `log.level`.
    pub log_level: Option<String>,
    /// A peer whose index the process begins with.
    pub bootstrap_from: Option<String>,
}

impl IndexerConfig {
    /// Reads a document; an empty one gives the defaults.
    ///
    /// # Errors
    ///
    /// Every fault of the document and the flags, in document order.
    pub fn parse(text: &str, flags: &Flags) -> Result<Self, Vec<Fault>> {
        let document = Document::parse(text).map_err(|fault| vec![fault])?;
        let (mut config, report) = Self::read(document, flags);
        if !report.faults.is_empty() {
            return Err(report.faults);
        }
        config.warnings = report.warnings;
        Ok(config)
    }

    /// Paths of all fields that a document may have; list indices are written `[]`.
    #[must_use]
    pub fn known_fields() -> BTreeSet<String> {
        // One element per list, so that the fields of elements are asked for.
        let lists = serde_json::json!({
            "tokenizers": {"render": {}},
            "models": [{}], "pods": [{}], "kvCacheBackendConfigs": [{}],
            "kvEventsConfig": {"curve": {}},
            "indexerConfig": {},
        });
        Self::read(lists.into(), &Flags::default()).1.asked
    }

    fn read(document: Document, flags: &Flags) -> (Self, Report) {
        let reader = Reader::new(document);
        let mut config = Self::default();
        let root = reader.root();
        if root.has("kind") && root.has("plugins") {
            root.fault(
                "kind",
                "this configures an endpoint picker; give the `parameters` of its \
                 precise-prefix-cache plugin as the document",
            );
        } else {
            config.read_root(&reader, root, flags);
        }
        (config, reader.finish())
    }

    fn read_root(&mut self, reader: &Reader, root: Fields<'_>, flags: &Flags) {
        self.read_process(&root, flags);
        self.read_tls(&root);
        self.read_auth(&root);
        self.read_snapshot(&root);
        self.bootstrap_from.clone_from(&flags.bootstrap_from);
        self.read_tokenizers(&root);
        let indexer = root.mapping("indexerConfig");
        if root.is_null("indexerConfig") {
            root.fault(
                "indexerConfig",
                "indexerConfig is required: not null, but it may be absent",
            );
        }
        let llmd = llmd_only(&root, &indexer);

        let redis = self.read_storage(one_of_two(&root, &indexer, "kvBlockIndexConfig"));
        self.read_tiers(&root, &indexer, llmd);
        self.read_keys(&root, &indexer, redis, flags.block_size);
        indexer.finish();

        let events = root.mapping("kvEventsConfig");
        let engine = self.read_events(&events);
        self.read_pods(reader, &root, &flags.pods, &engine);
        self.read_pods_file(&root, flags);
        self.decide_unconfigured(&events);
        self.read_peers(&events);
        if llmd && self.ingest.bind.is_none() && !self.names_pods() && !events.has("discoverPods") {
            reader.warn(
                "kvEventsConfig",
                "llm-d would discover pods in Kubernetes; here, declare `pods` or a `podsFile`, \
                 set `zmqEndpoint`, or register pods through the API",
            );
        }
        events.finish();
        self.read_api(&root.mapping("api"));
        root.finish();
    }

    fn read_process(&mut self, root: &Fields<'_>, flags: &Flags) {
        set(&mut self.grpc_listen, root.parsed("grpcListen", parse_address));
        set(&mut self.grpc_listen, flags.grpc_listen);
        set(&mut self.admin_listen, root.parsed("adminListen", parse_address));
        set(&mut self.admin_listen, flags.admin_listen);
        if self.grpc_listen == self.admin_listen && self.grpc_listen.port() != 0 {
            root.fault("adminListen", "must differ from grpcListen");
        }
        let log = root.mapping("log");
        set(&mut self.log_format, log.one_of("format", &LogFormat::NAMES));
        set(&mut self.log_format, flags.log_format);
        let level =
            log.parsed("level", |text| telemetry::check_level(text).map(|()| text.to_owned()));
        set(&mut self.log_level, level);
        set(&mut self.log_level, flags.log_level.clone());
        log.finish();
        set(&mut self.ready_timeout, root.millis("readyTimeoutMs", 0..=HOUR_MS));
        set(&mut self.readiness_grace, root.millis("readinessGraceMs", 0..=HOUR_MS));
        set(&mut self.drain, root.millis("drainMs", 0..=HOUR_MS));
        set(&mut self.llmd_metrics, root.boolean("llmdMetrics"));
    }

    fn read_pods_file(&mut self, root: &Fields<'_>, flags: &Flags) {
        self.pods_file = root.nonempty("podsFile").map(PathBuf::from);
        if flags.pods_file.is_some() {
            self.pods_file.clone_from(&flags.pods_file);
        }
        set(&mut self.pods_file_poll, root.millis("podsFilePollMs", 10..=HOUR_MS));
    }

    /// Does the configuration itself say which pods there are?
    fn names_pods(&self) -> bool {
        !self.ingest.pods.is_empty() || self.pods_file.is_some()
    }

    fn read_api(&mut self, api: &Fields<'_>) {
        let out = &mut self.api;
        let message = units::bytes(api, "maxMessageBytes", 1 << 10..=(1 << 31) - 1);
        set(&mut out.max_message_bytes, message);
        set(&mut out.max_tokens, api.integer("maxTokens", 1..=1 << 28));
        set(&mut out.max_prompts, api.integer("maxPrompts", 1..=1 << 20));
        set(&mut out.max_multimodal, api.integer("maxMultimodal", 0..=1 << 20));
        set(&mut out.max_pods_asked, api.integer("maxPodsAsked", 1..=1 << 20));
        set(&mut out.max_pod_id_bytes, api.integer("maxPodIdBytes", 16..=1 << 16));
        set(&mut out.max_concurrent_calls, api.integer("maxConcurrentCalls", 1..=1 << 20));
        set(&mut out.max_connections, api.integer("maxConnections", 2..=1 << 20));
        set(&mut out.idle_timeout, api.millis("idleTimeoutMs", 1..=24 * HOUR_MS));
        let pending = units::bytes(api, "maxPendingBytes", 1 << 20..=1 << 40);
        set(&mut out.max_pending_bytes, pending);
        set(&mut out.message_timeout, api.millis("messageTimeoutMs", 1..=HOUR_MS));
        set(&mut out.max_speculations, api.integer("maxSpeculations", 0..=1 << 28));
        set(&mut out.max_speculation_ttl, api.millis("maxSpeculationTtlMs", 1..=24 * HOUR_MS));
        if let Some(pod) = self.ingest.pods.iter().find(|pod| pod.pod.len() > out.max_pod_id_bytes)
        {
            api.fault("maxPodIdBytes", format!("is less than the name of pod {:?} has", pod.pod));
        }
    }
}

/// Asks for what only llm-d's documents have; is there any of it?
fn llmd_only(root: &Fields<'_>, indexer: &Fields<'_>) -> bool {
    const SPECULATION: &str = "has no effect: a router that wants speculative entries asks for \
                               them, with their life, through `Speculate`";
    const TOKENIZER: &str = "has no effect: `tokenizers` names the directories of models";
    let only =
        ["speculativeIndexing", "speculativeTTL", "tokenizersPoolConfig", "prefixStoreConfig"];
    let llmd = indexer.is_present() || only.iter().any(|name| root.has(name));
    if root.boolean(only[0]).is_some() {
        root.warn(only[0], SPECULATION);
    }
    if root.parsed(only[1], units::signed_nanos).is_some() {
        root.warn(only[1], SPECULATION);
    }
    // Deployments are found that set it here; llm-d itself overlooks it.
    indexer.ignored(only[0], SPECULATION);
    for fields in [root, indexer] {
        fields.ignored(only[2], TOKENIZER);
        fields.ignored(only[3], TOKENIZER);
    }
    llmd
}

/// A mapping that llm-d's documents have below `indexerConfig` and ours at the top.
fn one_of_two<'r>(root: &Fields<'r>, indexer: &Fields<'r>, name: &'static str) -> Fields<'r> {
    if root.has(name) && indexer.has(name) {
        indexer.fault(name, GIVEN_TWICE);
    }
    let (top, nested) = (root.mapping(name), indexer.mapping(name));
    if nested.is_present() { nested } else { top }
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is no address with port; write it like 127.0.0.1:50051 or [::]:50051")
    })
}

#[cfg(test)]
mod tests;
