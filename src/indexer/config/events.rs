//! `kvEventsConfig`: how streams are received, ordered, repaired and queued.

use super::{HOUR_MS, IndexerConfig, pods::quoted};
use crate::{
    ingest::{curve::CurveConfig, discovery::EndpointUse, loss::LossPolicy},
    support::{
        fields::{Fields, set},
        units,
    },
};

/// Engines whose streams are understood; empty: told by content.
pub(super) const ENGINES: [(&str, &str); 3] = [("vllm", "vllm"), ("sglang", "sglang"), ("", "")];

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

impl IndexerConfig {
    /// Reads all but `allowUnconfiguredPods`; returns the engine of pods that name none.
    pub(super) fn read_events(&mut self, events: &Fields<'_>) -> String {
        let out = &mut self.ingest;
        let bind = events.parsed("zmqEndpoint", |text| match text {
            "" => Ok(None),
            text => quoted(text, EndpointUse::Bind).map(|()| Some(text.to_owned())),
        });
        out.bind = bind.flatten();
        set(&mut out.topic_filter, events.string("topicFilter"));
        // 0 is the default, which depends on the machine.
        let lanes = events.integer("concurrency", 0..=1024).filter(|&lanes: &usize| lanes > 0);
        set(&mut out.lanes, lanes);
        let engine = events.one_of("engineType", &ENGINES).unwrap_or_default().to_owned();
        read_discovery(events);

        set(&mut out.max_pods, events.integer("maxPods", 1..=100_000));
        let mark = events.integer("receiveHighWaterMark", 1..=10_000_000);
        set(&mut out.receive_high_water_mark, mark);
        set(&mut out.heartbeat, events.millis("heartbeatMs", 10..=HOUR_MS));
        set(&mut out.reconnect, events.millis("reconnectMs", 1..=HOUR_MS));
        set(&mut out.reconnect_max, events.millis("reconnectMaxMs", 1..=HOUR_MS));
        if out.reconnect_max < out.reconnect {
            events.fault("reconnectMaxMs", "must not be less than reconnectMs");
        }
        set(&mut out.queue_batches, events.integer("queueBatches", 1..=10_000_000));
        set(&mut out.queue_bytes, units::bytes(events, "queueBytes", MIB..=TIB));
        set(&mut out.orphan_blocks, events.integer("orphanBlocks", 0..=100_000_000));
        set(&mut out.orphan_timeout, events.millis("orphanTimeoutMs", 1..=24 * HOUR_MS));

        let loss = events.mapping("loss");
        set(&mut out.loss.policy, loss.one_of("policy", &LossPolicy::NAMES));
        set(&mut out.loss.age_out, loss.millis("ageOutMs", 1..=24 * HOUR_MS));
        loss.finish();

        let limits = events.mapping("limits");
        let to = &mut out.limits;
        set(&mut to.payload_bytes, units::bytes(&limits, "payloadBytes", 1 << 10..=1 << 31));
        set(&mut to.events, limits.integer("events", 1..=1 << 24));
        set(&mut to.blocks, limits.integer("blocks", 1..=1 << 24));
        set(&mut to.tokens, limits.integer("tokens", 1..=1 << 28));
        // A batch of today's engines nests six deep.
        set(&mut to.depth, limits.integer("depth", 8..=64));
        limits.finish();

        let replay = events.mapping("replay");
        let to = &mut out.replay;
        set(&mut to.idle, replay.millis("idleMs", 1..=HOUR_MS));
        set(&mut to.attempts, replay.integer("attempts", 1..=1000));
        set(&mut to.cooldown, replay.millis("cooldownMs", 0..=24 * HOUR_MS));
        set(&mut to.held_messages, replay.integer("heldMessages", 1..=10_000_000));
        set(&mut to.held_bytes, units::bytes(&replay, "heldBytes", MIB..=TIB));
        if out.replay.held_bytes < out.limits.payload_bytes {
            replay.fault("heldBytes", "must not be less than kvEventsConfig.limits.payloadBytes");
        }
        replay.finish();
        if out.queue_bytes < out.limits.payload_bytes {
            let text = "must not be less than limits.payloadBytes: a batch has to fit in";
            events.fault("queueBytes", text);
        }
        engine
    }

    /// Whom the sockets believe.
    pub(super) fn read_peers(&mut self, events: &Fields<'_>) {
        let out = &mut self.ingest;
        set(&mut out.check_peer_address, events.boolean("checkPeerAddress"));
        if out.check_peer_address {
            match out.bind.as_deref() {
                None => events.warn("checkPeerAddress", "has no effect without `zmqEndpoint`"),
                Some(bind) if bind.starts_with("ipc:") => {
                    events.fault("checkPeerAddress", "an ipc socket knows no addresses");
                }
                Some(_) => {}
            }
        }
        let curve = events.mapping("curve");
        if curve.is_present() {
            let key = |name: &'static str| {
                curve.parsed(name, |text| CurveConfig::key(text).map(|_| text.to_owned()))
            };
            let public_key = curve.required("publicKey", |_, _| key("publicKey"));
            let secret = curve.required("secretKeyFile", Fields::nonempty);
            let server_key = key("serverKey");
            out.curve = public_key.zip(secret).map(|(public_key, secret)| CurveConfig {
                public_key,
                secret_key_file: secret.into(),
                server_key,
            });
        }
        curve.finish();
    }

    /// Pods that nobody configured are welcome on the bound socket if nobody configured any.
    pub(super) fn decide_unconfigured(&mut self, events: &Fields<'_>) {
        let by_default = self.ingest.bind.is_some() && !self.names_pods();
        let told = events.boolean("allowUnconfiguredPods");
        self.ingest.allow_unconfigured_pods = told.unwrap_or(by_default);
        if told == Some(true) && self.ingest.bind.is_none() {
            events.warn("allowUnconfiguredPods", "has no effect without `zmqEndpoint`");
        }
    }
}

/// What llm-d needs to find pods in Kubernetes.
fn read_discovery(events: &Fields<'_>) {
    const NONE: &str = "has no effect: pods are not discovered in Kubernetes here";
    if events.boolean("discoverPods") == Some(true) {
        let text =
            format!("{NONE}; declare `pods` or a `podsFile`, or register them through the API");
        events.warn("discoverPods", text);
    }
    let discovery = events.mapping("podDiscoveryConfig");
    for name in ["podLabelSelector", "podNamespace"] {
        if discovery.string(name).is_some() {
            discovery.warn(name, NONE);
        }
    }
    if discovery.integer::<u16>("socketPort", 1..=65_535).is_some() {
        discovery.warn("socketPort", NONE);
    }
    // Zero and less switch it off.
    if discovery.signed("replaySocketPort", -65_535..=65_535).is_some() {
        discovery.warn("replaySocketPort", NONE);
    }
    discovery.finish();
}
