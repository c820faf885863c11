//! The envelope: what a configuration says, before any plugin is built.

use crate::support::{
    fields::{Fields, Reader},
    units::{boolean, duration_value, quantity_value},
};

/// More plugins, profiles, or plugins in a profile than this are a mistake, not a configuration.
const MAX_ENTRIES: usize = 256;

/// A configuration as written. Parameters of plugins are not looked at yet.
#[derive(Debug)]
pub struct EndpointPickerConfig<'r> {
    /// `plugins`, in order.
    pub plugins: Vec<PluginSpec<'r>>,
    /// `schedulingProfiles`, in order.
    pub profiles: Vec<ProfileSpec>,
    /// `dataLayer`, or `data`.
    pub data_layer: DataLayer,
    /// `requestHandler.parsers`, or else `parser`; empty = the default ones.
    pub parsers: Vec<Reference>,
    /// What judges saturation.
    pub saturation: Saturation<'r>,
    /// Policies that `flowControl` names.
    pub policies: Vec<Reference>,
    /// Is the feature gate `flowControl` on?
    pub flow_control: bool,
}

/// One entry of `plugins`.
#[derive(Debug)]
pub struct PluginSpec<'r> {
    /// Path of the entry.
    pub at: String,
    /// `name`, or else the type as written.
    pub name: String,
    /// `type` as written; empty if missing, which is a fault already.
    pub type_name: String,
    /// `parameters`.
    pub parameters: Fields<'r>,
}

/// One entry of `schedulingProfiles`.
#[derive(Debug)]
pub struct ProfileSpec {
    /// Path of the entry.
    pub at: String,
    /// `name`; empty if missing, which is a fault already.
    pub name: String,
    /// `plugins`, in order.
    pub plugins: Vec<ProfilePlugin>,
}

/// A plugin in a profile.
#[derive(Debug)]
pub struct ProfilePlugin {
    /// Which one.
    pub reference: Reference,
    /// `weight`, at least 0.
    pub weight: Option<f64>,
}

/// A name of a plugin, and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Path of the field.
    pub at: String,
    /// The name.
    pub name: String,
}

/// `dataLayer`.
#[derive(Debug, Default)]
pub struct DataLayer {
    /// `injectDefaults: false`: no source is added.
    pub no_defaults: bool,
    /// `sources`, in order.
    pub sources: Vec<Source>,
    /// `discovery`.
    pub discovery: Option<Reference>,
}

/// One entry of `dataLayer.sources`.
#[derive(Debug)]
pub struct Source {
    /// The source.
    pub source: Reference,
    /// Its extractors.
    pub extractors: Vec<Reference>,
}

/// Where thresholds of saturation come from.
#[derive(Debug)]
pub enum Saturation<'r> {
    /// Nobody said: the utilization detector.
    Default,
    /// `pluginRef`.
    Plugin(Reference),
    /// The parameters of the utilization detector, written below `saturationDetector`.
    Inline(Fields<'r>),
}

impl<'r> EndpointPickerConfig<'r> {
    /// Reads the envelope; faults and warnings are left in `reader`.
    #[must_use]
    pub fn read(reader: &'r Reader) -> Self {
        let root = reader.root();
        header(&root);
        let flow_control = feature_gates(reader, &root);
        let plugins = plugins(reader, &root);
        let profiles = profiles(reader, &root);
        let data_layer = data_layer(&root);
        let parsers = parsers(&root);
        let (saturation, policies) = saturation(&root, flow_control);
        root.finish();
        Self { plugins, profiles, data_layer, parsers, saturation, policies, flow_control }
    }
}

/// `apiVersion` and `kind`, which may be absent.
fn header(root: &Fields<'_>) {
    let legal = [("llm-d.ai/v1alpha1", false), ("inference.networking.x-k8s.io/v1alpha1", true)];
    if root.one_of("apiVersion", &legal) == Some(true) {
        root.warn(
            "apiVersion",
            "DEPRECATION: inference.networking.x-k8s.io/v1alpha1 is deprecated; use \
             llm-d.ai/v1alpha1",
        );
    }
    root.one_of("kind", &[("EndpointPickerConfig", ())]);
}

/// Judges `featureGates` and says whether flow control is on.
fn feature_gates(reader: &Reader, root: &Fields<'_>) -> bool {
    let mut flow_control = None;
    for (at, gate) in root.texts("featureGates") {
        let (name, value) = match gate.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (gate.as_str(), None),
        };
        let on = match value.map(|value| boolean(&value.trim().to_lowercase())) {
            None => true,
            Some(Ok(on)) => on,
            Some(Err(_)) => {
                let value = value.unwrap_or_default();
                let text = format!("{value} is not a valid value for the feature gate {name}");
                reader.fault(&at, text);
                continue;
            }
        };
        match name {
            "flowControl" => flow_control = Some((at, on)),
            "haPopulateNonLeaderDatastore" => {
                reader.warn(&at, "has no effect: there is no leader election");
            }
            "dataLayer" => reader.warn(&at, "the data layer is always on; leave this gate out"),
            _ => {
                reader.fault(&at, format!("feature gate '{name}' is unknown or unregistered"));
            }
        }
    }
    match flow_control {
        Some((at, true)) => {
            reader.fault(at, "feature gate 'flowControl' is not built yet; leave it out");
            true
        }
        _ => false,
    }
}

fn plugins<'r>(reader: &Reader, root: &Fields<'r>) -> Vec<PluginSpec<'r>> {
    let mut specs = Vec::new();
    for entry in bounded(root, "plugins") {
        let type_name = entry.string("type").unwrap_or_default();
        let name = entry.string("name").filter(|name| !name.is_empty());
        let name = name.unwrap_or_else(|| type_name.clone());
        if type_name.is_empty() && !entry.has("type") {
            reader.fault(entry.path(), format!("plugin '{name}' is missing a type"));
        } else if type_name.is_empty() {
            entry.fault("type", format!("plugin '{name}' is missing a type"));
        }
        let parameters = entry.mapping("parameters");
        specs.push(PluginSpec { at: entry.path().to_owned(), name, type_name, parameters });
        entry.finish();
    }
    specs
}

fn profiles(reader: &Reader, root: &Fields<'_>) -> Vec<ProfileSpec> {
    let mut specs: Vec<ProfileSpec> = Vec::new();
    for (index, entry) in bounded(root, "schedulingProfiles").into_iter().enumerate() {
        let at = entry.path().to_owned();
        let name = entry.string("name").unwrap_or_default();
        if name.is_empty() {
            reader.fault(&at, format!("schedulingProfiles[{index}] is missing a name"));
        } else if specs.iter().any(|known| known.name == name) {
            let text = format!("schedulingProfiles[{index}] has duplicate name '{name}'");
            entry.fault("name", text);
        }
        let mut plugins = Vec::new();
        for (index, plugin) in bounded(&entry, "plugins").into_iter().enumerate() {
            let missing =
                format!("schedulingProfiles[{name}].plugins[{index}] is missing a 'pluginRef'");
            let weight = plugin.take("weight", |value| match value.as_f64() {
                Some(weight) if weight >= 0.0 => Ok(weight),
                Some(weight) => Err(format!("{weight} is negative; a weight is at least 0")),
                None => Err(format!("expected a number, got {value}")),
            });
            if let Some(reference) = reference(&plugin, "pluginRef", Some(&missing)) {
                plugins.push(ProfilePlugin { reference, weight });
            }
            plugin.finish();
        }
        entry.finish();
        specs.push(ProfileSpec { at, name, plugins });
    }
    specs
}

fn data_layer(root: &Fields<'_>) -> DataLayer {
    let old = root.mapping("data");
    let new = root.mapping("dataLayer");
    if old.is_present() {
        root.warn("data", "DEPRECATION: this section is called dataLayer now");
        if new.is_present() {
            root.fault("data", "is the old name of dataLayer; give one of them");
        }
    }
    let fields = if old.is_present() && !new.is_present() { old } else { new };
    let mut layer = DataLayer {
        no_defaults: fields.boolean("injectDefaults") == Some(false),
        ..DataLayer::default()
    };
    for source in bounded(&fields, "sources") {
        let mut extractors = Vec::new();
        for extractor in bounded(&source, "extractors") {
            extractors.extend(reference(&extractor, "pluginRef", Some("missing 'pluginRef'")));
            extractor.finish();
        }
        if let Some(name) = reference(&source, "pluginRef", Some("missing 'pluginRef'")) {
            layer.sources.push(Source { source: name, extractors });
        }
        source.finish();
    }
    let discovery = fields.mapping("discovery");
    if discovery.is_present() {
        layer.discovery = reference(&discovery, "pluginRef", Some("missing 'pluginRef'"));
    }
    discovery.finish();
    let replicas = "has no effect: state is not shared between replicas";
    fields.ignored("peerDiscovery", replicas);
    fields.ignored("crossReplicaSyncerPluginRef", replicas);
    fields.ignored("crossReplicaSyncInterval", replicas);
    fields.finish();
    layer
}

fn parsers(root: &Fields<'_>) -> Vec<Reference> {
    let handler = root.mapping("requestHandler");
    let mut parsers = Vec::new();
    for parser in bounded(&handler, "parsers") {
        parsers.extend(reference(&parser, "pluginRef", Some("missing 'pluginRef'")));
        parser.finish();
    }
    handler.finish();
    let old = root.mapping("parser");
    if old.is_present() {
        let text =
            "DEPRECATION: top-level parser is deprecated, use requestHandler.parsers instead";
        root.warn("parser", text);
        let old_parser = reference(&old, "pluginRef", Some("missing 'pluginRef'"));
        if parsers.is_empty() {
            parsers.extend(old_parser);
        }
    }
    old.finish();
    parsers
}

/// `saturationDetector` in its three forms, and the policies that `flowControl` names.
fn saturation<'r>(root: &Fields<'r>, flow_control: bool) -> (Saturation<'r>, Vec<Reference>) {
    let flow = root.mapping("flowControl");
    let detector = flow.mapping("saturationDetector");
    let new = reference(&detector, "pluginRef", None);
    detector.finish();
    let policies = flow_control_section(root, flow, flow_control);

    let detector = root.mapping("saturationDetector");
    if !detector.is_present() {
        return (new.map_or(Saturation::Default, Saturation::Plugin), policies);
    }
    root.warn(
        "saturationDetector",
        "DEPRECATION: top-level saturationDetector is deprecated, use \
         flowControl.saturationDetector instead",
    );
    let old = reference(&detector, "pluginRef", None);
    let saturation = match (new, old) {
        (Some(new), _) => Saturation::Plugin(new),
        (None, Some(old)) => {
            detector.finish();
            Saturation::Plugin(old)
        }
        (None, None) => Saturation::Inline(detector),
    };
    (saturation, policies)
}

/// The rest of `flowControl`: it has to be right, and has no effect.
fn flow_control_section(root: &Fields<'_>, flow: Fields<'_>, on: bool) -> Vec<Reference> {
    let settings = [
        "maxBytes",
        "maxRequests",
        "defaultRequestTTL",
        "noEndpointRequestTTL",
        "defaultPriorityBand",
        "defaultNegativePriorityBand",
        "priorityBands",
        "usageLimitPolicyPluginRef",
        "enableEviction",
    ];
    if !on && settings.iter().any(|name| flow.has(name)) {
        let text = "has no effect while the feature gate flowControl is off";
        root.warn("flowControl", text);
    }
    flow.take("maxBytes", quantity_value);
    flow.take("maxRequests", quantity_value);
    flow.take("defaultRequestTTL", duration_value);
    flow.take("noEndpointRequestTTL", duration_value);
    flow.boolean("enableEviction");
    let mut policies = Vec::new();
    policies.extend(reference(&flow, "usageLimitPolicyPluginRef", None));
    let mut bands = bounded(&flow, "priorityBands");
    for name in ["defaultPriorityBand", "defaultNegativePriorityBand"] {
        bands.push(flow.mapping(name));
    }
    for band in bands {
        band.signed("priority", i64::from(i32::MIN)..=i64::from(i32::MAX));
        band.take("maxBytes", quantity_value);
        band.take("maxRequests", quantity_value);
        policies.extend(reference(&band, "fairnessPolicyRef", None));
        policies.extend(reference(&band, "orderingPolicyRef", None));
        band.finish();
    }
    flow.finish();
    policies
}

/// A name of a plugin. `missing` is the fault if there is none.
fn reference(fields: &Fields<'_>, field: &'static str, missing: Option<&str>) -> Option<Reference> {
    let wrong = fields.has(field);
    match fields.string(field) {
        Some(name) if !name.is_empty() => Some(Reference { at: fields.path_of(field), name }),
        // What is there and no string is a fault already.
        None if wrong => None,
        _ => {
            if let Some(text) = missing {
                fields.fault(field, text);
            }
            None
        }
    }
}

/// The entries of a list of mappings, unless there are unreasonably many.
fn bounded<'r>(fields: &Fields<'r>, name: &'static str) -> Vec<Fields<'r>> {
    let mut entries = fields.each(name);
    if entries.len() > MAX_ENTRIES {
        fields.fault(name, format!("has {} entries; {MAX_ENTRIES} are the most", entries.len()));
        entries.truncate(MAX_ENTRIES);
    }
    entries
}
