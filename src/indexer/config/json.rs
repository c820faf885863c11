//! The effective configuration as a document, for `/config` and the log.

use std::time::Duration;

use serde_json::{Value, json};

use super::{GrpcTls, IndexerConfig};
use crate::{
    hash::Scheme,
    ingest::{fleet::PodDeclaration, loss::LossPolicy},
    model::CountMode,
    support::tls::TlsVersion,
};

impl IndexerConfig {
    /// The document that gives this configuration, every default spelt out. Warnings are not in it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let models = &self.api.models;
        let mut listed: Vec<_> = models.listed.iter().collect();
        listed.sort_unstable_by_key(|(name, _)| *name);
        let listed: Vec<Value> = listed
            .into_iter()
            .map(|(name, scheme)| {
                let mut value = scheme_json(scheme);
                value["name"] = json!(name);
                value
            })
            .collect();
        let weights = self.tiers.weights.iter();
        let weights: Vec<Value> =
            weights.map(|(name, weight)| json!({"name": name, "weight": weight})).collect();
        json!({
            "grpcListen": self.grpc_listen.to_string(),
            "grpcTls": self.grpc_tls.as_ref().map(tls_json),
            "tokenizers": self.tokenizers_json(),
            "adminListen": self.admin_listen.to_string(),
            "auth": {
                "tokenFile": self.auth.token_file,
                "allowWithoutToken": self.auth.allow_without_token,
            },
            "log": {"format": self.log_format.as_str(), "level": self.log_level},
            "tokenProcessorConfig": scheme_json(&models.default),
            "models": listed,
            "modelAliases": models.aliases,
            "kvBlockIndexConfig": {"capBytes": self.index_cap_bytes},
            "kvCacheBackendConfigs": weights,
            "unlistedTierWeight": self.tiers.unlisted,
            "speculativeWeight": self.tiers.speculative,
            "kvEventsConfig": self.events_json(),
            "pods": self.ingest.pods.iter().map(pod_json).collect::<Vec<_>>(),
            "podsFile": self.pods_file,
            "podsFilePollMs": millis(self.pods_file_poll),
            "api": self.api_json(),
            "readyTimeoutMs": millis(self.ready_timeout),
            "readinessGraceMs": millis(self.readiness_grace),
            "drainMs": millis(self.drain),
            "snapshot": self.snapshot_json(),
            "llmdMetrics": self.llmd_metrics,
        })
    }

    fn events_json(&self) -> Value {
        let (events, limits, replay) = (&self.ingest, &self.ingest.limits, &self.ingest.replay);
        json!({
            "zmqEndpoint": events.bind,
            "topicFilter": events.topic_filter,
            "concurrency": events.lanes,
            "allowUnconfiguredPods": events.allow_unconfigured_pods,
            "checkPeerAddress": events.check_peer_address,
            "curve": events.curve.as_ref().map(|curve| json!({
                "publicKey": curve.public_key,
                "secretKeyFile": curve.secret_key_file,
                "serverKey": curve.server_key,
            })),
            "maxPods": events.max_pods,
            "receiveHighWaterMark": events.receive_high_water_mark,
            "heartbeatMs": millis(events.heartbeat),
            "reconnectMs": millis(events.reconnect),
            "reconnectMaxMs": millis(events.reconnect_max),
            "queueBatches": events.queue_batches,
            "queueBytes": events.queue_bytes,
            "orphanBlocks": events.orphan_blocks,
            "orphanTimeoutMs": millis(events.orphan_timeout),
            "loss": {
                "policy": events.loss.policy.as_str(),
                "ageOutMs": millis(events.loss.age_out),
            },
            "limits": {
                "payloadBytes": limits.payload_bytes,
                "events": limits.events,
                "blocks": limits.blocks,
                "tokens": limits.tokens,
                "depth": limits.depth,
            },
            "replay": {
                "idleMs": millis(replay.idle),
                "attempts": replay.attempts,
                "cooldownMs": millis(replay.cooldown),
                "heldMessages": replay.held_messages,
                "heldBytes": replay.held_bytes,
            },
        })
    }

    fn tokenizers_json(&self) -> Value {
        let local = &self.tokenizers.local;
        json!({
            "models": local.models,
            "modelsDir": local.models_dir,
            "aliases": local.aliases,
            "default": local.default,
            "threads": local.pool.threads,
            "queue": local.pool.queue,
            "budgetMs": millis(local.pool.budget),
            "cacheBytes": local.cache.bytes,
            "render": self.tokenizers.render.as_ref().map(|render| json!({
                "url": render.url,
                "model": render.model,
                "timeoutMs": millis(render.timeout),
                "multimodalTimeoutMs": millis(render.multimodal_timeout),
            })),
        })
    }

    fn api_json(&self) -> Value {
        let api = &self.api;
        json!({
            "maxMessageBytes": api.max_message_bytes,
            "maxTokens": api.max_tokens,
            "maxPrompts": api.max_prompts,
            "maxMultimodal": api.max_multimodal,
            "maxPodsAsked": api.max_pods_asked,
            "maxPodIdBytes": api.max_pod_id_bytes,
            "maxConcurrentCalls": api.max_concurrent_calls,
            "maxConnections": api.max_connections,
            "idleTimeoutMs": millis(api.idle_timeout),
            "maxPendingBytes": api.max_pending_bytes,
            "messageTimeoutMs": millis(api.message_timeout),
            "maxSpeculations": api.max_speculations,
            "maxSpeculationTtlMs": millis(api.max_speculation_ttl),
        })
    }
}

fn tls_json(tls: &GrpcTls) -> Value {
    json!({
        "certPath": tls.options.cert_path,
        "selfSigned": tls.options.cert_path.is_none(),
        "reload": tls.reload,
        "minVersion": match tls.options.min_version {
            TlsVersion::Older | TlsVersion::Tls12 => "VersionTLS12",
            TlsVersion::Tls13 => "VersionTLS13",
        },
        "clientCa": tls.options.client_ca,
        "clientAuth": if tls.options.client_optional { "optional" } else { "required" },
    })
}

fn scheme_json(scheme: &Scheme) -> Value {
    json!({
        "blockSizeTokens": scheme.block_size(),
        "hashAlgorithm": scheme.algorithm().as_str(),
        "hashSeed": scheme.seed(),
    })
}

fn pod_json(pod: &PodDeclaration) -> Value {
    json!({
        "id": pod.pod,
        "endpoint": pod.endpoint,
        "replayEndpoint": pod.replay_endpoint,
        "model": pod.model,
        "rank": pod.rank,
        "topicFilter": pod.topic_filter,
        "engine": pod.engine,
        "engineVersion": pod.engine_version,
        "trustUnchained": pod.trust_unchained,
        "countMode": match pod.count_mode {
            CountMode::Counted => "counted",
            CountMode::Set => "set",
        },
        "blockSize": pod.block_size,
        "firstSequence": pod.first_sequence,
        "lossPolicy": pod.loss_policy.map(LossPolicy::as_str),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
