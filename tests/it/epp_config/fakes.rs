//! Plugins that can do what the real ones can, and do nothing.

use std::sync::Arc;

use kv_indexer::{
    epp::{
        datalayer::Endpoint,
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{Building, PluginTypes, Registration, Stability, types},
        request::InferenceRequest,
        scheduling::{
            Admitter, BoxFuture, Cycle, DataKey, DataProducer, Decider, Filter, Flight, Picker,
            Plugin, PreRequest, Produced, ProfileHandler, ProfileResults, SchedulingProfile,
            SchedulingResult, Scored, Scorer,
        },
    },
    support::fields::Fields,
};

/// What a fake can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Can {
    Filter,
    Score,
    Pick,
    Handle,
    Decide,
    ProducePrefix,
    ProduceInFlight,
    ProduceTokens,
    Admit,
    Hear,
}

#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) type_name: &'static str,
    can: Vec<Can>,
    reads: Vec<DataKey>,
    may_read: Vec<DataKey>,
    /// `value` of its parameters.
    pub(crate) value: Option<u64>,
    /// The plugins that it refers to.
    refers: Vec<Arc<dyn Plugin>>,
}

impl Fake {
    pub(crate) fn new(type_name: &'static str, can: &[Can]) -> Self {
        let can = can.to_vec();
        let (reads, may_read) = (Vec::new(), Vec::new());
        Self { type_name, can, reads, may_read, value: None, refers: Vec::new() }
    }

    fn arc(self) -> Option<Arc<dyn Plugin>> {
        Some(Arc::new(self))
    }

    fn if_can(&self, what: Can) -> Option<&Self> {
        self.can.contains(&what).then_some(self)
    }
}

impl Plugin for Fake {
    fn type_name(&self) -> &'static str {
        self.type_name
    }
    fn filter(&self) -> Option<&dyn Filter> {
        self.if_can(Can::Filter).map(|it| it as _)
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        self.if_can(Can::Score).map(|it| it as _)
    }
    fn picker(&self) -> Option<&dyn Picker> {
        self.if_can(Can::Pick).map(|it| it as _)
    }
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        self.if_can(Can::Handle).map(|it| it as _)
    }
    fn decider(&self) -> Option<&dyn Decider> {
        self.if_can(Can::Decide).map(|it| it as _)
    }
    fn producer(&self) -> Option<&dyn DataProducer> {
        let produces = [Can::ProducePrefix, Can::ProduceInFlight, Can::ProduceTokens];
        self.can.iter().any(|can| produces.contains(can)).then_some(self as _)
    }
    fn admitter(&self) -> Option<&dyn Admitter> {
        self.if_can(Can::Admit).map(|it| it as _)
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        self.if_can(Can::Hear).map(|it| it as _)
    }
    fn consumes(&self) -> Vec<DataKey> {
        self.reads.clone()
    }
    fn may_consume(&self) -> Vec<DataKey> {
        self.may_read.clone()
    }
}

impl Filter for Fake {
    fn filter(&self, _: &Cycle<'_>, _: &mut Vec<usize>) {}
}

impl Scorer for Fake {
    fn score(&self, _: &Cycle<'_>, _: &[usize], _: &mut [f64]) {}
}

impl Picker for Fake {
    fn pick(&self, _: &Cycle<'_>, _: &mut [Scored]) -> Vec<usize> {
        vec![0]
    }
}

impl ProfileHandler for Fake {
    fn pick(&self, _: &Cycle<'_>, _: &[SchedulingProfile], _: &ProfileResults) -> Vec<usize> {
        Vec::new()
    }
    fn process_results(
        &self,
        _: &Cycle<'_>,
        _: &[SchedulingProfile],
        _: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal> {
        Ok("default".into())
    }
}

impl Decider for Fake {
    fn decide(&self, _: &Cycle<'_>, _: usize) -> bool {
        true
    }
}

impl DataProducer for Fake {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        let key = |can: &Can| match can {
            Can::ProducePrefix => Some(DataKey::Prefix(Arc::clone(name))),
            Can::ProduceInFlight => Some(DataKey::InFlight(Arc::clone(name))),
            Can::ProduceTokens => Some(DataKey::Tokens),
            _ => None,
        };
        self.can.iter().filter_map(key).collect()
    }
    fn produce<'a>(
        &'a self,
        _: &'a InferenceRequest,
        _: &'a [Arc<Endpoint>],
        _: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        None
    }
}

impl Admitter for Fake {
    fn admit(&self, _: &InferenceRequest, _: &[Arc<Endpoint>]) -> Result<(), Refusal> {
        Ok(())
    }
}

impl PreRequest for Fake {
    fn pre_request(
        &self,
        _: &Cycle<'_>,
        _: &SchedulingResult,
        _: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        Ok(None)
    }
}

/// Asks for fields of which anything goes.
fn ask(params: &Fields<'_>, names: &[&'static str]) {
    for name in names {
        params.take(name, |_| Ok(()));
    }
}

/// A registration with a factory of its own.
macro_rules! fake {
    ($name:literal, $aliases:expr, $stability:expr, |$params:ident, $building:ident| $make:expr) => {{
        fn make($params: &Fields<'_>, $building: &dyn Building) -> Option<Arc<dyn Plugin>> {
            $make
        }
        Registration {
            type_name: $name,
            aliases: $aliases,
            stability: $stability,
            factory: Some(make),
        }
    }};
    ($name:literal, [$($can:ident),*], [$($field:literal),*]) => {
        fake!($name, &[], Stability::Beta, |params, _building| {
            ask(params, &[$($field),*]);
            Fake::new($name, &[$(Can::$can),*]).arc()
        })
    };
}

/// The real types; where one of this release has no factory, a fake has its place.
pub(crate) fn release() -> PluginTypes {
    with_fakes(|known| known.factory.is_none())
}

/// The real types with fakes in the place of some.
fn with_fakes(replaced: impl Fn(&Registration) -> bool) -> PluginTypes {
    let mut types = types();
    for fake in release_fakes() {
        let known = types.find(fake.type_name).copied();
        let known = known.unwrap_or_else(|| panic!("{} is not registered", fake.type_name));
        if replaced(&known) {
            types.set(Registration { factory: fake.factory, ..known });
        }
    }
    types
}

/// The plugins of this release by name, with the fields of their parameters.
fn release_fakes() -> Vec<Registration> {
    let picker_and_more = vec![
        fake!("max-score-picker", [Pick], ["maxNumOfEndpoints"]),
        fake!("random-picker", [Pick], ["maxNumOfEndpoints"]),
        fake!("weighted-random-picker", [Pick], ["maxNumOfEndpoints"]),
        fake!("decode-filter", [Filter], []),
        fake!("prefill-filter", [Filter], []),
        fake!("encode-filter", [Filter], []),
        fake!(
            "label-selector-filter",
            [Filter],
            ["label", "validValues", "allowsNoLabel", "matchLabels", "matchExpressions"]
        ),
        fake!("kv-cache-utilization-scorer", [Score], []),
        fake!("queue-scorer", [Score], []),
        fake!("running-requests-size-scorer", [Score], []),
        fake!("lora-affinity-scorer", [Score], []),
        fake!("load-aware-scorer", [Score], ["threshold"]),
        fake!("single-profile-handler", [Handle], []),
        fake!("always-disagg-pd-decider", [Decide], []),
        fake!("prefix-based-pd-decider", [Decide], ["nonCachedTokens", "promptTokens"]),
        fake!("prefill-header-handler", [Hear], ["prefillProfile", "encodeProfile"]),
        fake!(
            "approx-prefix-cache-producer",
            [ProducePrefix, Hear],
            [
                "autoTune",
                "blockSizeTokens",
                "blockSize",
                "maxPrefixTokensToMatch",
                "maxPrefixBlocksToMatch",
                "lruCapacityPerServer"
            ]
        ),
        fake!(
            "inflight-load-producer",
            [ProduceInFlight, Hear],
            ["addEstimatedOutputTokens", "outputRatio", "maxEstimatedOutputTokens"]
        ),
        fake!("file-discovery", [], ["path", "watchFile"]),
        fake!(
            "metrics-data-source",
            [],
            ["scheme", "path", "port", "insecureSkipVerify", "interval"]
        ),
        fake!("core-metrics-extractor", [], ["engineLabelKey", "defaultEngine", "engineConfigs"]),
        fake!(
            "utilization-detector",
            [Filter],
            [
                "queueDepthThreshold",
                "kvCacheUtilThreshold",
                "metricsStalenessThreshold",
                "headroom"
            ]
        ),
        fake!(
            "precise-prefix-cache-scorer",
            [Score, ProducePrefix],
            [
                "tokenProcessorConfig",
                "indexerConfig",
                "kvEventsConfig",
                "speculativeIndexing",
                "speculativeTTL",
                "scoreNormalization"
            ]
        ),
    ];
    picker_and_more.into_iter().chain(readers()).collect()
}

/// Those that refer to others.
fn readers() -> Vec<Registration> {
    vec![
        fake!("active-request-scorer", &[], Stability::Beta, |params, building| {
            ask(params, &["requestTimeout", "idleThreshold", "maxBusyScore"]);
            let producer = params.string("inFlightLoadProducerName").map(Into::into);
            let producer =
                producer.unwrap_or_else(|| building.default_of("inflight-load-producer"));
            let mut fake = Fake::new("active-request-scorer", &[Can::Score]);
            fake.reads.push(DataKey::InFlight(producer));
            fake.arc()
        }),
        fake!("token-load-scorer", &[], Stability::Beta, |params, _building| {
            ask(params, &["queueThresholdTokens"]);
            let mut fake = Fake::new("token-load-scorer", &[Can::Score]);
            // It does not ask for its producer: the loader finds that it is missing.
            fake.reads.push(DataKey::InFlight("inflight-load-producer".into()));
            fake.arc()
        }),
        fake!("prefix-cache-scorer", &[], Stability::Beta, |params, _building| {
            let old = [
                "hashBlockSize",
                "blockSize",
                "blockSizeTokens",
                "autoTune",
                "maxPrefixBlocksToMatch",
                "maxPrefixTokensToMatch",
                "lruCapacityPerServer",
            ];
            let is_old = old.iter().any(|name| params.has(name));
            ask(params, &old);
            ask(params, &["matchLengthWeight", "matchLengthScaleTokens"]);
            let name = params.string("prefixMatchInfoProducerName");
            let mut fake = Fake::new("prefix-cache-scorer", &[Can::Score]);
            if is_old {
                fake.can.extend([Can::ProducePrefix, Can::Hear]);
            } else {
                let name = name.unwrap_or_else(|| "approx-prefix-cache-producer".to_owned());
                fake.reads.push(DataKey::Prefix(name.into()));
            }
            fake.arc()
        }),
        fake!("pd-profile-handler", &[], Stability::Beta, |params, building| {
            ask(params, &["threshold", "hashBlockSize", "decodeProfile", "prefillProfile"]);
            ask(params, &["primaryPort", "prefixPluginType", "prefixPluginName"]);
            let decider = params.string("deciderPluginName").unwrap_or_else(|| {
                if params.has("threshold") {
                    return String::new();
                }
                building.default_of("prefix-based-pd-decider").to_string()
            });
            let mut fake = Fake::new("pd-profile-handler", &[Can::Handle]);
            if !decider.is_empty() {
                fake.refers.push(building.plugin(params, "deciderPluginName", &decider)?);
            }
            fake.arc()
        }),
        fake!("disagg-profile-handler", &[], Stability::Beta, |params, building| {
            ask(params, &["stageOrder", "profiles", "primaryPort"]);
            let deciders = params.mapping("deciders");
            let mut fake = Fake::new("disagg-profile-handler", &[Can::Handle, Can::Hear]);
            for stage in ["prefill", "encode"] {
                if let Some(name) = deciders.string(stage) {
                    fake.refers.push(building.plugin(&deciders, stage, &name)?);
                }
            }
            deciders.finish();
            fake.arc()
        }),
    ]
}

/// Types for tests of the loader itself: fakes alone.
pub(crate) fn with_test_types() -> PluginTypes {
    let mut types = with_fakes(|_| true);
    for fake in [
        fake!("test-filter", [Filter], []),
        fake!("test-admitter", [Admit], []),
        fake!("test-all", [Filter, Score, Pick, Admit, Hear], []),
        fake!("test-nothing", [], []),
        fake!("test-handler", [Handle], []),
        fake!("test-silent", &[], Stability::Beta, |_params, _building| None),
        fake!("test-alpha", &["test-alpha-alias"], Stability::Alpha, |_params, _building| {
            Fake::new("test-alpha", &[Can::Filter]).arc()
        }),
        fake!("test-old", &[], Stability::Deprecated("use test-filter"), |_params, _building| {
            Fake::new("test-old", &[Can::Filter]).arc()
        }),
        fake!("test-value", &[], Stability::Beta, |params, _building| {
            let mut fake = Fake::new("test-value", &[Can::Score]);
            fake.value = params.integer("value", 1..=100);
            let inner = params.mapping("inner");
            inner.boolean("deep");
            inner.finish();
            fake.arc()
        }),
        fake!("test-refers", &[], Stability::Beta, |params, building| {
            let mut fake = Fake::new("test-refers", &[Can::Filter]);
            for field in ["one", "two"] {
                if let Some(name) = params.string(field) {
                    fake.refers.push(building.plugin(params, field, &name)?);
                }
            }
            fake.arc()
        }),
        fake!("test-producer", &[], Stability::Beta, |params, building| {
            // Prefix matches under its own name, from those of another one.
            let mut fake = Fake::new("test-producer", &[Can::ProducePrefix]);
            fake.reads.extend(params.string("reads").map(|name| DataKey::Prefix(name.into())));
            fake.may_read.extend(params.string("mayRead").map(|name| DataKey::Prefix(name.into())));
            if params.boolean("tokens") == Some(true) {
                fake.reads.push(DataKey::Tokens);
            }
            assert!(!building.name().is_empty());
            fake.arc()
        }),
        fake!("test-tokens", [ProduceTokens], []),
    ] {
        types.set(fake);
    }
    types
}
