//! `core-metrics-extractor`: which metrics of an engine's page say how loaded it is.
//!
//! The plugin only holds the settings; the process's [`Scraper`](crate::epp::datalayer::scrape::Scraper)
//! is made of them and of a `metrics-data-source`. The built-in engines and how series are chosen are
//! documented at [`engines`](crate::epp::datalayer::engines).

use std::{any::Any, sync::Arc};

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        datalayer::{
            UnknownMetrics,
            engines::{EngineConfig, EngineError, Engines, EnginesConfig, MetricSpec},
        },
        scheduling::Plugin,
    },
    support::fields::Fields,
};

/// The canonical type name.
pub const TYPE: &str = "core-metrics-extractor";

/// How `core-metrics-extractor` is configured.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// A configured `core-metrics-extractor`.
///
/// | parameter | default | meaning |
/// | --- | --- | --- |
/// | `engineLabelKey` | `llm-d.ai/engine-type` | pod label that names the engine |
/// | `defaultEngine` | `vllm` | engine of pods without it |
/// | `engineConfigs` | built-in ones | engines; one replaces the built-in one of its name |
/// | `unknownMetrics` | `--unknown-metrics` | ours: what to think of an endpoint without metrics, `worst` or `idle` |
///
/// An engine has `name` and any of `queuedRequestsSpec`, `runningRequestsSpec`, `kvUsageSpec`,
/// `loraSpec`, `cacheInfoSpec`, `cacheBlockSizeLabelName`, `cacheNumBlocksLabelName`,
/// `cacheBlockSizeSpec`, `cacheNumBlocksSpec`, `customMetrics: [{attributeKey, metricSpec}]`. A
/// specification is `metric` or `metric{label=value,…}`.
#[derive(Clone, Debug)]
pub struct CoreMetricsExtractor {
    config: EnginesConfig,
    unknown: Option<UnknownMetrics>,
}

impl CoreMetricsExtractor {
    /// `plugin` as one of this type.
    #[must_use]
    pub fn of(plugin: &dyn Plugin) -> Option<&Self> {
        (plugin as &dyn Any).downcast_ref()
    }

    /// The engines.
    ///
    /// # Errors
    ///
    /// None for a plugin that was built: its parameters were checked.
    pub fn engines(&self) -> Result<Engines, EngineError> {
        Engines::new(&self.config)
    }

    /// What to think of endpoints without metrics; `None` = what `--unknown-metrics` says.
    #[must_use]
    pub fn unknown_metrics(&self) -> Option<UnknownMetrics> {
        self.unknown
    }
}

impl Plugin for CoreMetricsExtractor {
    fn type_name(&self) -> &'static str {
        TYPE
    }
}

fn build(params: &Fields<'_>, _building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(read(params)))
}

/// Faults are noted in `params`; what is returned then is of no use.
fn read(params: &Fields<'_>) -> CoreMetricsExtractor {
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let default = EnginesConfig::default();
    let unknown = params.one_of("unknownMetrics", &UnknownMetrics::WORDS);
    let label = filled(params.string("engineLabelKey")).unwrap_or(default.label);
    let default = filled(params.string("defaultEngine")).unwrap_or(default.default);
    let engines = params.each("engineConfigs").into_iter().map(engine).collect();
    let config = EnginesConfig { label, default, engines };
    if let Err(error) = Engines::new(&config) {
        match error {
            EngineError::NoDefault(..) => params.fault("defaultEngine", error.to_string()),
            // The entry has it already.
            EngineError::NoName => {}
            _ => params.fault("engineConfigs", error.to_string()),
        }
    }
    CoreMetricsExtractor { config, unknown }
}

fn engine(fields: Fields<'_>) -> EngineConfig {
    let spec = |name| fields.parsed(name, MetricSpec::parse).flatten();
    let config = EngineConfig {
        name: fields.required("name", Fields::nonempty).unwrap_or_default(),
        queued: spec("queuedRequestsSpec"),
        running: spec("runningRequestsSpec"),
        kv_usage: spec("kvUsageSpec"),
        old_kv_usage: None,
        lora: spec("loraSpec"),
        cache_info: spec("cacheInfoSpec"),
        block_size_label: fields.string("cacheBlockSizeLabelName"),
        blocks_label: fields.string("cacheNumBlocksLabelName"),
        block_size: spec("cacheBlockSizeSpec"),
        blocks: spec("cacheNumBlocksSpec"),
        prefix_queries: Vec::new(),
        prefix_hits: Vec::new(),
        custom: fields.each("customMetrics").into_iter().filter_map(custom).collect(),
    };
    fields.finish();
    config
}

fn custom(fields: Fields<'_>) -> Option<(String, MetricSpec)> {
    let key = fields.required("attributeKey", Fields::nonempty);
    let spec = fields.required("metricSpec", |fields, name| {
        fields.parsed(name, |text| match MetricSpec::parse(text)? {
            Some(spec) => Ok(spec),
            None => Err("must not be empty".to_owned()),
        })
    });
    fields.finish();
    key.zip(spec)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        epp::datalayer::{
            Endpoint, EndpointId,
            discovery::StaticList,
            engines::{ENGINE_LABEL, LEGACY_ENGINE_LABEL},
        },
        support::fields::{Document, Reader},
    };

    fn parse(text: &str) -> (CoreMetricsExtractor, Vec<String>) {
        let reader = Reader::new(Document::parse(text).unwrap());
        let root = reader.root();
        let extractor = read(&root);
        root.finish();
        let faults = reader.finish().faults;
        (
            extractor,
            faults.iter().map(|fault| format!("{}: {}", fault.path, fault.message)).collect(),
        )
    }

    fn engine_of(text: &str, labels: &[(&str, &str)]) -> String {
        let (extractor, faults) = parse(text);
        assert_eq!(faults, [""; 0]);
        let mut info = StaticList::parse("a=127.0.0.1:1").unwrap();
        info.labels =
            labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect::<BTreeMap<_, _>>();
        let engines = extractor.engines().unwrap();
        engines.of(&Endpoint::new(EndpointId(0), info)).name().to_owned()
    }

    #[test]
    fn the_engine_is_the_pods_label() {
        #[track_caller]
        fn check(text: &str, labels: &[(&str, &str)], want: &str) {
            assert_eq!(engine_of(text, labels), want);
        }
        check("{}", &[], "vllm");
        check("defaultEngine: sglang", &[], "sglang");
        check("defaultEngine: triton-tensorrt-llm", &[], "triton-tensorrt-llm");
        check("{engineLabelKey: '', defaultEngine: ''}", &[(ENGINE_LABEL, "sglang")], "sglang");
        check("{}", &[(LEGACY_ENGINE_LABEL, "trtllm-serve")], "trtllm-serve");
        check("{}", &[(LEGACY_ENGINE_LABEL, "triton"), (ENGINE_LABEL, "sglang")], "sglang");
        check("{}", &[(LEGACY_ENGINE_LABEL, "triton"), (ENGINE_LABEL, "")], "triton");
        check("defaultEngine: sglang", &[(ENGINE_LABEL, "unheard-of")], "sglang");
        check("engineLabelKey: e", &[(ENGINE_LABEL, "sglang"), ("e", "triton")], "triton");
        let own = "{defaultEngine: own, engineConfigs: [{name: own, queuedRequestsSpec: q}]}";
        check(own, &[], "own");
        check(own, &[(ENGINE_LABEL, "vllm")], "vllm");
    }

    #[test]
    fn parameters_are_read() {
        let (extractor, faults) = parse(
            "
unknownMetrics: idle
engineConfigs:
- name: vllm
  queuedRequestsSpec: 'q{a=b}'
  runningRequestsSpec: r
  kvUsageSpec: ''
  cacheInfoSpec: c
  cacheBlockSizeLabelName: s
  cacheNumBlocksLabelName: n
  cacheBlockSizeSpec: bs
  cacheNumBlocksSpec: bn
  loraSpec: l
  customMetrics: [{attributeKey: k, metricSpec: 'm{x=\"y\"}'}]
",
        );
        assert_eq!(faults, [""; 0]);
        assert_eq!(extractor.unknown_metrics(), Some(UnknownMetrics::AsIdle));
        let spec = |text| MetricSpec::parse(text).unwrap();
        let vllm = EngineConfig {
            name: "vllm".to_owned(),
            queued: spec("q{a=b}"),
            running: spec("r"),
            kv_usage: None,
            old_kv_usage: None,
            lora: spec("l"),
            cache_info: spec("c"),
            block_size_label: Some("s".to_owned()),
            blocks_label: Some("n".to_owned()),
            block_size: spec("bs"),
            blocks: spec("bn"),
            prefix_queries: Vec::new(),
            prefix_hits: Vec::new(),
            custom: vec![("k".to_owned(), spec("m{x=y}").unwrap())],
        };
        assert_eq!(extractor.config.engines, [vllm]);
        assert_eq!(parse("{}").0.unknown_metrics(), None);
    }

    #[test]
    fn mistakes_are_named() {
        #[track_caller]
        fn check(text: &str, want: &[&str]) {
            let faults = parse(text).1;
            assert_eq!(faults.len(), want.len(), "{faults:?}");
            for (fault, want) in faults.iter().zip(want) {
                assert!(fault.contains(want), "{fault}");
            }
        }
        check("defaultEngine: none", &["defaultEngine: default engine \"none\" is not configured"]);
        check("engineConfigs: [{}]", &["engineConfigs[0].name: missing"]);
        check("engineConfigs: [{name: default}]", &["engineConfigs: no engine may be named"]);
        check("engineConfigs: [{name: a}, {name: a}]", &["engineConfigs: engine \"a\" is conf"]);
        check("engineConfigs: [{name: a, kvUsageSpec: '{'}]", &["engineConfigs[0].kvUsageSpec: "]);
        check("engineConfigs: [{name: a, kvSpec: b}]", &["engineConfigs[0].kvSpec: unknown field"]);
        check(
            "engineConfigs: [{name: a, customMetrics: [{metricSpec: ''}]}]",
            &[
                "customMetrics[0].attributeKey: missing",
                "customMetrics[0].metricSpec: must not be empty",
            ],
        );
        check(
            "engineConfigs: [{name: a, customMetrics: [{attributeKey: k, metricSpec: a}, \
             {attributeKey: k, metricSpec: b}]}]",
            &["two custom metrics for \"k\""],
        );
        check("unknownMetrics: bad", &["unknownMetrics: \"bad\" is not one of"]);
    }
}
