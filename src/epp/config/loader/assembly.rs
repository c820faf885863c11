//! What a configuration is made of besides its plugins: profiles and their handler, parsers, sources of
//! metrics, discovery, the detector of saturation, and the producers that nobody configured.

use std::{collections::BTreeSet, sync::Arc};

use super::{Found, Loader, MetricsSource, did_you_mean};
use crate::epp::{
    config::{
        DataLayer, FILE_DISCOVERY, METRICS_EXTRACTOR, METRICS_SOURCE, ProfileSpec, Reference,
        Saturation, order::produced,
    },
    request::{DEFAULT_PARSERS, ParserKind},
    scheduling::{Configured, DataKey, Filter, SchedulingProfile},
};

/// Handler, picker and detector that are added where there is none.
const SINGLE_HANDLER: &str = "single-profile-handler";
const DEFAULT_PICKER: &str = "max-score-picker";
const DEFAULT_DETECTOR: &str = "utilization-detector";
/// The profile of everything, where none is configured.
const DEFAULT_PROFILE: &str = "default";
/// Makes token ids where somebody reads them.
const TOKEN_PRODUCER: &str = "token-producer";

/// Types by what they are good for, where [`Plugin`] does not say it.
const DETECTORS: [&str; 2] = [DEFAULT_DETECTOR, "concurrency-detector"];
const SOURCES: [&str; 5] = [
    METRICS_SOURCE,
    "models-data-source",
    "k8s-notification-source",
    "endpoint-notification-source",
    "dcgm-data-source",
];
const DISCOVERIES: [&str; 1] = [FILE_DISCOVERY];

/// Profiles and who runs them.
impl Loader<'_> {
    pub(super) fn profiles(&self, specs: &[ProfileSpec]) -> Vec<SchedulingProfile> {
        // Before the default picker is added: it is for profiles, not for the profile of everything.
        let configured = self.built(|slot| slot.configured);
        let picker = configured.iter().find(|plugin| plugin.plugin.picker().is_some()).cloned();
        let mut profiles = Vec::new();
        if specs.is_empty() {
            let members = configured.into_iter().filter(|member| {
                let plugin = &member.plugin;
                plugin.filter().is_some() || plugin.scorer().is_some() || plugin.picker().is_some()
            });
            let mut draft = Draft::new(DEFAULT_PROFILE, "schedulingProfiles");
            members.for_each(|member| self.join(&mut draft, "schedulingProfiles", member, None));
            profiles.extend(self.complete(draft, picker.as_ref()));
        }
        for spec in specs {
            let mut draft = Draft::new(&spec.name, &spec.at);
            for member in &spec.plugins {
                let Reference { at, name } = &member.reference;
                match self.get(name) {
                    Found::Plugin(plugin) => self.join(&mut draft, at, plugin, member.weight),
                    Found::Failed => {}
                    Found::Undefined => {
                        let hint = self.hint(name);
                        let text = format!(
                            "schedulingProfiles[{}] references undefined plugin '{name}'{hint}",
                            spec.name
                        );
                        self.reader.fault(at, text);
                    }
                }
            }
            profiles.extend(self.complete(draft, picker.as_ref()));
        }
        profiles
    }

    /// Puts a plugin into a profile wherever it is of use.
    fn join(&self, draft: &mut Draft, at: &str, member: Configured, weight: Option<f64>) {
        let plugin = Arc::clone(&member.plugin);
        let is_scorer = plugin.scorer().is_some();
        if weight.is_some() && !is_scorer {
            let text = format!("'{}' is no scorer: its weight has no effect", member.name);
            self.reader.warn(at, text);
        }
        if plugin.filter().is_none() && !is_scorer && plugin.picker().is_none() {
            let text =
                format!("'{}' is no filter, scorer or picker: it has no effect here", member.name);
            self.reader.warn(at, text);
        }
        if plugin.filter().is_some() {
            draft.filters.push(member.clone());
        }
        if is_scorer {
            draft.scorers.push((member.clone(), weight.unwrap_or(1.0)));
        }
        if plugin.picker().is_some() {
            match &draft.picker {
                None => draft.picker = Some(member),
                Some(first) => {
                    let text = format!(
                        "failed to add plugin '{0}' to profile '{1}': failed to set '{0}' as picker, \
                         already have a registered picker plugin '{2}'",
                        member.name, draft.name, first.name
                    );
                    self.reader.fault(at, text);
                }
            }
        }
    }

    /// Gives a profile its picker: its own, the first one of the document, or the default one. Filters
    /// that only have a preference go behind the others.
    fn complete(&self, draft: Draft, first: Option<&Configured>) -> Option<SchedulingProfile> {
        let Draft { name, at, mut filters, scorers, picker } = draft;
        filters.sort_by_key(|it| it.plugin.filter().is_some_and(Filter::last));
        let picker = picker.or_else(|| first.cloned());
        let picker = picker.or_else(|| {
            let why = format!("profile '{name}' has no picker");
            self.default_of(DEFAULT_PICKER, &at, &why)
        })?;
        Some(SchedulingProfile { name, filters, scorers, picker })
    }

    /// The handler of these profiles; none stand for one called `default`.
    pub(super) fn handler(&self, specs: &[ProfileSpec]) -> Option<Configured> {
        let profiles = specs.len().max(1);
        let mut handlers = self.built(|_| true);
        handlers.retain(|plugin| plugin.plugin.profile_handler().is_some());
        if let [first, second, ..] = handlers.as_slice() {
            let text = format!(
                "multiple profile handlers found ('{}', '{}'); only one is allowed",
                first.name, second.name
            );
            self.reader.fault("plugins", text);
            return None;
        }
        match handlers.pop() {
            Some(handler) => {
                if handler.plugin.type_name() == SINGLE_HANDLER && profiles > 1 {
                    let text = "SingleProfileHandler cannot support multiple scheduling profiles";
                    self.reader.fault("schedulingProfiles", text);
                }
                let needs = handler.plugin.profile_handler().and_then(|it| it.needs());
                if let Some(needs) = needs {
                    let mut names = specs.iter().map(|spec| &*spec.name);
                    if !names.any(|name| name == needs)
                        && (!specs.is_empty() || needs != DEFAULT_PROFILE)
                    {
                        let text = format!(
                            "profile handler '{}' needs a profile '{needs}', and there is none",
                            handler.name
                        );
                        self.reader.fault("schedulingProfiles", text);
                    }
                }
                Some(handler)
            }
            None if profiles == 1 => {
                self.default_of(SINGLE_HANDLER, "plugins", "there is no profile handler")
            }
            // One of those that could not be built may be it.
            None if self.any_failed() => None,
            None => {
                self.reader.fault("plugins", "no profile handler configured");
                None
            }
        }
    }
}

/// A profile on its way.
struct Draft {
    name: Arc<str>,
    at: String,
    filters: Vec<Configured>,
    scorers: Vec<(Configured, f64)>,
    picker: Option<Configured>,
}

impl Draft {
    fn new(name: &str, at: &str) -> Self {
        let (filters, scorers) = (Vec::new(), Vec::new());
        Self { name: name.into(), at: at.to_owned(), filters, scorers, picker: None }
    }
}

/// Everything else.
impl<'r> Loader<'r> {
    pub(super) fn saturation(&self, saturation: Saturation<'r>) -> Option<Configured> {
        const WHY: &str = "there is no saturation detector";
        match saturation {
            Saturation::Default => self.default_of(DEFAULT_DETECTOR, "saturationDetector", WHY),
            Saturation::Inline(parameters) => {
                let at = parameters.path().to_owned();
                if self.index_of(DEFAULT_DETECTOR).is_some() {
                    let text = format!("'{DEFAULT_DETECTOR}' is among the plugins: set it there");
                    self.reader.fault(at, text);
                    return None;
                }
                let index = self.add(DEFAULT_DETECTOR, &at, WHY)?;
                let mut slots = self.slots.borrow_mut();
                slots[index].parameters = Some(parameters);
                slots[index].parameters_at = at;
                drop(slots);
                let plugin = self.build(index)?;
                Some(Configured { name: DEFAULT_DETECTOR.into(), plugin })
            }
            Saturation::Plugin(Reference { at, name }) => match self.get(&name) {
                Found::Plugin(plugin) if DETECTORS.contains(&plugin.plugin.type_name()) => {
                    Some(plugin)
                }
                Found::Plugin(_) => {
                    let text = format!("plugin '{name}' is not a fwkfc.SaturationDetector");
                    self.reader.fault(at, text);
                    None
                }
                Found::Failed => None,
                Found::Undefined if name == DEFAULT_DETECTOR => {
                    self.default_of(DEFAULT_DETECTOR, &at, WHY)
                }
                Found::Undefined => {
                    let hint = self.hint(&name);
                    let text =
                        format!("saturation detector references undefined plugin '{name}'{hint}");
                    self.reader.fault(at, text);
                    None
                }
            },
        }
    }

    pub(super) fn parsers(&self, references: &[Reference]) -> Vec<ParserKind> {
        let mut parsers = Vec::new();
        if references.is_empty() {
            let at = "requestHandler.parsers";
            for kind in DEFAULT_PARSERS {
                let parser = self.default_of(kind.type_name(), at, "no parsers are configured");
                parsers.extend(parser.map(|_| kind));
            }
            return parsers;
        }
        for Reference { at, name } in references {
            // A parser need not be among the plugins: the name of its type is enough.
            let parser = match self.get(name) {
                Found::Undefined if self.parts.types.find(name).is_some() => {
                    self.default_of(name, at, "a parser is referred to by its type")
                }
                Found::Undefined => {
                    let hint = self.parts.types.suggestion(name).map(did_you_mean);
                    let hint = hint.unwrap_or_else(|| self.hint(name));
                    let text = format!("plugin type '{name}' not found in registry{hint}");
                    self.reader.fault(at, text);
                    None
                }
                Found::Plugin(plugin) => Some(plugin),
                Found::Failed => None,
            };
            let Some(parser) = parser else { continue };
            match ParserKind::of_type(parser.plugin.type_name()) {
                Some(kind) => parsers.push(kind),
                None => {
                    let text = format!("the plugin \"{name}\" is not a parser plugin");
                    self.reader.fault(at, text);
                }
            }
        }
        parsers
    }

    pub(super) fn metrics(&self, layer: &DataLayer) -> Vec<MetricsSource> {
        let mut found = Vec::new();
        let mut given = layer.no_defaults;
        for spec in &layer.sources {
            let Reference { at, name } = &spec.source;
            let source = match self.get(name) {
                Found::Plugin(plugin) if SOURCES.contains(&plugin.plugin.type_name()) => {
                    Some(plugin)
                }
                Found::Failed => None,
                Found::Plugin(_) | Found::Undefined => {
                    let text = format!("the plugin {name} is not a fwkdl.DataSource");
                    self.reader.fault(at, text + &self.hint_if_undefined(name));
                    None
                }
            };
            let mut extractors = Vec::new();
            for Reference { at, name } in &spec.extractors {
                match self.get(name) {
                    Found::Plugin(plugin) => extractors.push((at, plugin)),
                    Found::Failed => {}
                    Found::Undefined => {
                        let text =
                            format!("the plugin {name} is not registered{}", self.hint(name));
                        self.reader.fault(at, text);
                    }
                }
            }
            let Some(source) = source else { continue };
            if source.plugin.type_name() != METRICS_SOURCE {
                continue;
            }
            given = true;
            for (at, extractor) in &extractors {
                if extractor.plugin.type_name() != METRICS_EXTRACTOR {
                    let text = format!("the plugin {} does not read metrics", extractor.name);
                    self.reader.fault(*at, text);
                }
            }
            let extractors = extractors.into_iter().map(|(_, extractor)| extractor).collect();
            found.push(MetricsSource { source, extractors });
        }
        if !given {
            let (at, why) = ("dataLayer", "metrics are scraped by default");
            let source = self.default_of(METRICS_SOURCE, at, why);
            let extractor = self.default_of(METRICS_EXTRACTOR, at, why);
            if let (Some(source), Some(extractor)) = (source, extractor) {
                found.push(MetricsSource { source, extractors: vec![extractor] });
            }
        }
        found
    }

    fn hint_if_undefined(&self, name: &str) -> String {
        if self.index_of(name).is_some() { String::new() } else { self.hint(name) }
    }

    pub(super) fn discovery(&self, reference: &Reference) -> Option<Configured> {
        let Reference { at, name } = reference;
        match self.get(name) {
            Found::Plugin(plugin) if DISCOVERIES.contains(&plugin.plugin.type_name()) => {
                Some(plugin)
            }
            Found::Plugin(_) => {
                let text =
                    format!("discovery: plugin \"{name}\" does not implement EndpointDiscovery");
                self.reader.fault(at, text);
                None
            }
            Found::Failed => None,
            Found::Undefined => {
                let hint = self.hint(name);
                let text = format!("discovery: no plugin found with name \"{name}\"{hint}");
                self.reader.fault(at, text);
                None
            }
        }
    }

    /// With flow control on, what it refers to has to be there.
    pub(super) fn policies(&self, references: &[Reference]) {
        for Reference { at, name } in references {
            match self.get(name) {
                Found::Plugin(plugin) if plugin.plugin.type_name().ends_with("-policy") => {}
                Found::Plugin(_) => {
                    let text = format!("plugin \"{name}\" is no policy of flow control");
                    self.reader.fault(at, text);
                }
                Found::Failed => {}
                // The default ones are always there.
                Found::Undefined if self.parts.types.find(name).is_some() => {}
                Found::Undefined => {
                    let hint = self.hint(name);
                    self.reader.fault(at, format!("plugin \"{name}\" not found{hint}"));
                }
            }
        }
    }

    /// Adds the default producer of every kind of data that somebody reads and nobody writes, until
    /// nothing is missing.
    pub(super) fn add_missing_producers(&self) {
        let mut tried = BTreeSet::new();
        loop {
            let plugins = self.built(|_| true);
            let writes: Vec<DataKey> = plugins.iter().flat_map(produced).collect();
            let mut added = false;
            for reader in &plugins {
                for key in reader.plugin.consumes() {
                    if writes.contains(&key) || !tried.insert(format!("{key:?}")) {
                        continue;
                    }
                    added = true;
                    self.add_producer(reader, &key);
                }
            }
            self.build_all();
            if !added {
                return;
            }
        }
    }

    fn add_producer(&self, reader: &Configured, key: &DataKey) {
        let (producer, data) = match key {
            DataKey::Tokens => {
                // While nobody makes them, who reads them estimates.
                let producer = self.parts.types.find(TOKEN_PRODUCER);
                if producer.is_none_or(|known| known.factory.is_none()) {
                    return;
                }
                (TOKEN_PRODUCER, "token ids")
            }
            DataKey::Prefix(name) => (&**name, "prefix matches"),
            DataKey::InFlight(name) => (&**name, "load in flight"),
        };
        let at = self.index_of(&reader.name).map(|at| self.slots.borrow()[at].at.clone());
        let at = at.unwrap_or_default();
        let why = format!("plugin '{}' reads {data}", reader.name);
        match self.get(producer) {
            Found::Failed => {}
            Found::Plugin(found) => {
                let text = format!(
                    "{why} of plugin '{producer}' (type: {}), which has none",
                    found.plugin.type_name()
                );
                self.reader.fault(at, text);
            }
            Found::Undefined if self.parts.types.find(producer).is_some() => {
                let Some(added) = self.default_of(producer, &at, &why) else { return };
                if !produced(&added).contains(key) {
                    let text = format!("{why} of plugin '{producer}', which has none");
                    self.reader.fault(at, text);
                }
            }
            Found::Undefined => {
                let text = format!(
                    "no default producer found for missing data key: {why} of '{producer}', and \
                     there is no such plugin{}",
                    self.hint(producer)
                );
                self.reader.fault(at, text);
            }
        }
    }
}
