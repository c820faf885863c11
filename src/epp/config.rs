//! `EndpointPickerConfig` → plugins and profiles.
//!
//! # Model
//!
//! Three steps over one document, YAML or JSON:
//!
//! 1. [`EndpointPickerConfig::read`] takes the envelope apart. It is strict: unknown and duplicate
//!    fields are refused. Both apiVersions load, and their omission.
//! 2. The loader builds the plugins, each with its `parameters`. A plugin that another one refers to is
//!    built first, so their order in the document is free.
//! 3. What is missing is added: a profile, its handler and picker, producers of data that somebody
//!    reads, parsers, the saturation detector, the scrape of metrics.
//!
//! # Failure
//!
//! Nothing is half loaded: [`load`] gives either everything or every fault it found, each with its path
//! and line. Messages are worded as the Go EPP's.
//!
//! # Differences to the Go EPP
//!
//! * Where Go takes the first of several plugins in the order of a map, here it is the order of the
//!   document: the profile that is made of all plugins, and the picker of a profile without one.
//! * A source of type `metrics-data-source` suppresses the default one whatever its name.
//! * The gate `dataLayer` of older releases loads, with a warning. `flowControl` is not built yet.
//! * A weight that is negative is refused.

mod document;
mod loader;
mod order;

pub use self::{
    document::{
        DataLayer, EndpointPickerConfig, PluginSpec, ProfilePlugin, ProfileSpec, Reference,
        Saturation, Source,
    },
    loader::{Loaded, MetricsSource, Parts, load},
};

/// The type of the source that scrapes metrics.
pub const METRICS_SOURCE: &str = "metrics-data-source";
/// The type of the extractor that reads scraped pages.
pub const METRICS_EXTRACTOR: &str = "core-metrics-extractor";
/// The type of the discovery that reads a file.
pub const FILE_DISCOVERY: &str = "file-discovery";

/// What holds without a configuration.
pub const DEFAULT_CONFIG: &str = "\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: metrics-data-source
- type: core-metrics-extractor
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
dataLayer:
  sources:
  - pluginRef: metrics-data-source
    extractors:
    - pluginRef: core-metrics-extractor
";
