//! Settings of the ingest path. The defaults are documented in `config/kv-indexer.yaml`.

use std::time::Duration;

use crate::ingest::{curve::CurveConfig, fleet::PodDeclaration};

/// How streams are received, ordered, repaired and queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngestConfig {
    /// Publishers known at start.
    pub pods: Vec<PodDeclaration>,
    /// Bind address of the central SUB socket, if engines connect to us.
    pub bind: Option<String>,
    /// Topic prefix of the bound socket. A pod that we connect to has its own; one that declares none
    /// is subscribed to everything.
    pub topic_filter: String,
    /// Accept pods on the bound socket that nobody configured.
    pub allow_unconfigured_pods: bool,
    /// A message on the bound socket has to come from the address of the pod that it names.
    pub check_peer_address: bool,
    /// Encryption of streams; `None` = plain.
    pub curve: Option<CurveConfig>,
    /// Rows at most, configured or not.
    pub max_pods: usize,
    /// Writer threads; each pod is pinned to one.
    pub lanes: usize,
    /// libzmq's receive queue per replay, messages; live streams have no limit there.
    pub receive_high_water_mark: i32,
    /// ZMTP heartbeat interval; a peer silent for three of them is disconnected.
    pub heartbeat: Duration,
    /// First reconnect delay; doubles, with jitter, up to `reconnect_max`.
    pub reconnect: Duration,
    /// Longest reconnect delay.
    pub reconnect_max: Duration,
    /// Batches queued per pod at most.
    pub queue_batches: usize,
    /// Payload bytes queued per pod at most.
    pub queue_bytes: usize,
    /// Blocks that wait for an unknown parent, per pod at most.
    pub orphan_blocks: usize,
    /// How long they wait.
    pub orphan_timeout: Duration,
    /// What becomes of blocks when events were lost.
    pub loss: crate::ingest::loss::LossConfig,
    /// Limits of one batch.
    pub limits: crate::wire::Limits,
    /// Repair over the engine's replay socket.
    pub replay: crate::ingest::sequencer::ReplayConfig,
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self {
            pods: Vec::new(),
            bind: None,
            topic_filter: String::new(),
            allow_unconfigured_pods: false,
            check_peer_address: false,
            curve: None,
            max_pods: 1024,
            lanes: std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)),
            receive_high_water_mark: 100_000,
            heartbeat: Duration::from_secs(5),
            reconnect: Duration::from_millis(100),
            reconnect_max: Duration::from_secs(5),
            queue_batches: 16_384,
            queue_bytes: 256 << 20,
            orphan_blocks: 65_536,
            orphan_timeout: Duration::from_secs(60),
            loss: crate::ingest::loss::LossConfig::default(),
            limits: crate::wire::Limits::default(),
            replay: crate::ingest::sequencer::ReplayConfig::default(),
        }
    }
}
