//! Plugins from their specifications, and what holds them together.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    sync::Arc,
};

use prometheus::Registry;
use serde_json::{Value, json};

use super::{DEFAULT_CONFIG, EndpointPickerConfig, PluginSpec, order};
use crate::{
    epp::{
        datalayer::Endpoints,
        plugins::{Building, PluginTypes, Registration, Stability, deprecation},
        request::ParserKind,
        scheduling::{Configured, Plugin, SchedulingProfile},
    },
    support::fields::{Document, Fault, Fields, Reader, closest},
};

mod assembly;

/// What plugins are built from, besides the configuration.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    /// The types that may be named.
    pub types: &'a PluginTypes,
    /// The endpoints.
    pub endpoints: &'a Arc<Endpoints>,
    /// Where plugins register metrics.
    pub metrics: &'a Registry,
    /// `--allow-experimental-plugins`.
    pub allow_experimental: bool,
    /// Parameters of plugins to which the configuration gives none, by canonical type: what flags
    /// say.
    pub defaults: &'a [(&'static str, Value)],
}

/// A configuration that can run.
#[derive(Debug)]
pub struct Loaded {
    /// All plugins: the configured ones in order, then those that were added.
    pub plugins: Vec<Configured>,
    /// At least one.
    pub profiles: Vec<SchedulingProfile>,
    /// The plugin with [`Plugin::profile_handler`].
    pub handler: Configured,
    /// Plugins with [`Plugin::producer`]; who reads comes after who writes.
    pub producers: Vec<Configured>,
    /// Plugins with [`Plugin::admitter`], in order.
    pub admitters: Vec<Configured>,
    /// Plugins with [`Plugin::pre_request`], in order.
    pub pre_requests: Vec<Configured>,
    /// The parsers, in the order in which they are asked; at least one.
    pub parsers: Vec<ParserKind>,
    /// `dataLayer.discovery`.
    pub discovery: Option<Configured>,
    /// What is scraped; empty = nothing.
    pub metrics: Vec<MetricsSource>,
    /// The detector, which has the thresholds of saturation.
    pub saturation: Configured,
    /// What has no effect, or not the expected one, in document order; each begins with its path.
    pub warnings: Vec<String>,
}

/// A source of metrics and who reads what it finds.
#[derive(Clone, Debug)]
pub struct MetricsSource {
    /// A plugin of type [`METRICS_SOURCE`](super::METRICS_SOURCE).
    pub source: Configured,
    /// Plugins of type [`METRICS_EXTRACTOR`](super::METRICS_EXTRACTOR).
    pub extractors: Vec<Configured>,
}

impl Loaded {
    /// The configuration in force, for people: names, types, weights. Parameters are left out, since
    /// they may hold secrets.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let name = |plugin: &Configured| plugin.name.to_string();
        let names = |list: &[Configured]| list.iter().map(name).collect::<Vec<_>>();
        let profile = |profile: &SchedulingProfile| {
            let scorers = profile
                .scorers
                .iter()
                .map(|(scorer, weight)| json!({"name": name(scorer), "weight": weight}));
            json!({
                "name": *profile.name,
                "filters": names(&profile.filters),
                "scorers": scorers.collect::<Vec<_>>(),
                "picker": name(&profile.picker),
            })
        };
        let plugin =
            |plugin: &Configured| json!({"name": name(plugin), "type": plugin.plugin.type_name()});
        json!({
            "plugins": self.plugins.iter().map(plugin).collect::<Vec<_>>(),
            "profiles": self.profiles.iter().map(profile).collect::<Vec<_>>(),
            "profileHandler": name(&self.handler),
            "producers": names(&self.producers),
            "admitters": names(&self.admitters),
            "preRequests": names(&self.pre_requests),
            "parsers": self.parsers.iter().map(|kind| kind.type_name()).collect::<Vec<_>>(),
            "discovery": self.discovery.as_ref().map(name),
            "metricsSources": self.metrics.iter().map(|metrics| json!({
                "name": name(&metrics.source),
                "extractors": names(&metrics.extractors),
            })).collect::<Vec<_>>(),
            "saturationDetector": name(&self.saturation),
        })
    }
}

/// Loads a configuration, YAML or JSON; an empty text is [`DEFAULT_CONFIG`].
///
/// # Errors
///
/// Every fault, in document order.
pub fn load(text: &str, parts: &Parts<'_>) -> Result<Loaded, Vec<Fault>> {
    let parse = |text: &str| {
        Document::parse(text).map_err(|mut fault| {
            fault.message = format!("failed to decode configuration JSON/YAML: {}", fault.message);
            vec![fault]
        })
    };
    let mut document = parse(text)?;
    if document.is_empty() {
        document = parse(DEFAULT_CONFIG)?;
    }
    let reader = Reader::new(document);
    let flags: Vec<(&str, Reader)> = parts
        .defaults
        .iter()
        .map(|(type_name, value)| (*type_name, Reader::new(Document::from(value.clone()))))
        .collect();
    // Apart, so that the fields of plugins that nobody configured suggest nothing.
    let added = Reader::new(Document::default());
    let config = EndpointPickerConfig::read(&reader);
    let loader = Loader {
        parts,
        reader: &reader,
        added: &added,
        flags: &flags,
        slots: RefCell::default(),
        chain: RefCell::default(),
        failed: Cell::new(false),
    };
    let loaded = loader.run(config);
    let failed = loader.failed.get();
    let owners = loader.owners();
    drop(loader);

    let report = reader.finish();
    let mut faults = report.faults;
    faults.extend(added.finish().faults);
    for fault in &mut faults {
        name_plugin(fault, &owners);
    }
    for (type_name, reader) in flags {
        faults.extend(reader.finish().faults.into_iter().map(|mut fault| {
            fault.message = format!("flags: plugin '{type_name}': {}", fault.message);
            fault
        }));
    }
    match loaded {
        Some(loaded) if faults.is_empty() && !failed => {
            Ok(Loaded { warnings: report.warnings, ..loaded })
        }
        _ => {
            if faults.is_empty() {
                faults.push(Fault::new("", "a plugin could not be created"));
            }
            Err(faults)
        }
    }
}

/// Says of a fault in the parameters of a plugin whose they are.
fn name_plugin(fault: &mut Fault, owners: &[(String, String)]) {
    let inside = |prefix: &str| {
        fault
            .path
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    if let Some((_, owner)) = owners.iter().find(|(prefix, _)| inside(prefix)) {
        fault.message = format!("failed to create {owner}: {}", fault.message);
    }
}

/// A plugin on its way.
struct Slot<'r> {
    name: Arc<str>,
    /// Type as written.
    type_name: String,
    /// Where it is written, or why it was added.
    at: String,
    registration: Option<Registration>,
    /// Taken when it is built.
    parameters: Option<Fields<'r>>,
    /// Path of the parameters.
    parameters_at: String,
    /// Written in `plugins`, not added.
    configured: bool,
    stage: Stage,
}

#[derive(Clone)]
enum Stage {
    Waiting,
    /// Its factory runs.
    Building,
    Done(Arc<dyn Plugin>),
    /// The fault is noted.
    Failed,
}

struct Loader<'r> {
    parts: &'r Parts<'r>,
    reader: &'r Reader,
    /// Of plugins that are added.
    added: &'r Reader,
    flags: &'r [(&'r str, Reader)],
    /// Grows while plugins are built; never borrowed while a factory runs.
    slots: RefCell<Vec<Slot<'r>>>,
    /// The plugins whose factories run, outermost first.
    chain: RefCell<Vec<usize>>,
    /// A factory gave nothing, whether or not it said why.
    failed: Cell<bool>,
}

/// What the factory of one plugin reaches.
struct Site<'l, 'r> {
    loader: &'l Loader<'r>,
    name: Arc<str>,
    at: String,
}

impl Building for Site<'_, '_> {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn plugin(&self, params: &Fields<'_>, field: &str, name: &str) -> Option<Arc<dyn Plugin>> {
        let Some(index) = self.loader.index_of(name) else {
            let hint = self.loader.hint(name);
            let text = format!("a plugin has a dependency on the unregistered plugin {name}{hint}");
            params.fault(field, text);
            return None;
        };
        if let Some(names) = self.loader.loop_to(index) {
            params.fault(field, format!("plugins refer to each other in a loop: {names}"));
            return None;
        }
        self.loader.build(index)
    }

    fn default_of(&self, type_name: &str) -> Arc<str> {
        self.loader.default_of(type_name, &self.at, &format!("plugin '{}' needs it", self.name));
        type_name.into()
    }

    fn endpoints(&self) -> &Arc<Endpoints> {
        self.loader.parts.endpoints
    }

    fn registry(&self) -> &Registry {
        self.loader.parts.metrics
    }
}

impl<'r> Loader<'r> {
    /// `None` if something is missing that cannot be done without; its fault is noted.
    fn run(&self, config: EndpointPickerConfig<'r>) -> Option<Loaded> {
        self.add_configured(config.plugins);
        self.build_all();
        let saturation = self.saturation(config.saturation);
        let profiles = self.profiles(&config.profiles);
        let handler = self.handler(&config.profiles);
        let parsers = self.parsers(&config.parsers);
        let metrics = self.metrics(&config.data_layer);
        let discovery = config.data_layer.discovery.as_ref().and_then(|it| self.discovery(it));
        if config.flow_control {
            self.policies(&config.policies);
        }
        self.add_missing_producers();
        let plugins = self.built(|_| true);
        let has = |test: fn(&dyn Plugin) -> bool| -> Vec<Configured> {
            plugins.iter().filter(|plugin| test(&*plugin.plugin)).cloned().collect()
        };
        let producers = has(|plugin| plugin.producer().is_some());
        let producers = order::producers(&producers).map_err(|names| {
            let names = names.join(" -> ");
            self.reader.fault("plugins", format!("data producers wait for each other: {names}"));
        });
        Some(Loaded {
            profiles,
            handler: handler?,
            producers: producers.ok()?,
            admitters: has(|plugin| plugin.admitter().is_some()),
            pre_requests: has(|plugin| plugin.pre_request().is_some()),
            parsers,
            discovery,
            metrics,
            saturation: saturation?,
            warnings: Vec::new(),
            plugins,
        })
    }

    /// Makes a slot of every specification whose name is not taken.
    fn add_configured(&self, specs: Vec<PluginSpec<'r>>) {
        let mut warned = BTreeSet::new();
        for spec in specs {
            if !spec.name.is_empty() && self.index_of(&spec.name).is_some() {
                self.reader.fault(&spec.at, format!("duplicate plugin name '{}'", spec.name));
                continue;
            }
            let registration = self.registration(&spec);
            if let Some(text) = registration.and_then(|known| deprecation(&spec.type_name, &known))
                && warned.insert(spec.type_name.clone())
            {
                let text = format!("DEPRECATION: type '{}' is deprecated: {text}", spec.type_name);
                self.reader.warn(format!("{}.type", spec.at), text);
            }
            let by_flags = registration.and_then(|known| self.by_flags(known.type_name));
            let parameters = match by_flags {
                Some(parameters) if !spec.parameters.is_present() => parameters,
                Some(_) => {
                    let text = "these go before what flags say of it";
                    self.reader.warn(spec.parameters.path(), text);
                    spec.parameters
                }
                None => spec.parameters,
            };
            self.slots.borrow_mut().push(Slot {
                name: spec.name.into(),
                type_name: spec.type_name,
                at: spec.at,
                stage: if registration.is_some() { Stage::Waiting } else { Stage::Failed },
                registration,
                parameters_at: parameters.path().to_owned(),
                parameters: Some(parameters),
                configured: true,
            });
        }
    }

    /// The registration of a specification's type, unless it cannot be used.
    fn registration(&self, spec: &PluginSpec<'_>) -> Option<Registration> {
        if spec.type_name.is_empty() {
            return None;
        }
        let whose = format!("plugin '{}'", spec.name);
        self.usable(&spec.type_name, &spec.name, &whose, &format!("{}.type", spec.at))
    }

    /// The registration of a type that can be built; otherwise the fault is noted at `at`, with whose
    /// it is.
    fn usable(&self, type_name: &str, name: &str, whose: &str, at: &str) -> Option<Registration> {
        let Some(known) = self.parts.types.find(type_name) else {
            let hint = self.parts.types.suggestion(type_name).map(did_you_mean).unwrap_or_default();
            let text = format!("plugin type '{type_name}' is not registered{hint}");
            self.reader.fault(at, text);
            return None;
        };
        if known.factory.is_none() {
            let text = format!("plugin type '{type_name}' is not built yet ({whose})");
            self.reader.fault(at, text);
            return None;
        }
        if known.stability == Stability::Alpha && !self.parts.allow_experimental {
            let text = format!(
                "plugin '{name}' (type: '{type_name}') has Alpha stability level, but command line \
                 flag --allow-experimental-plugins is not set"
            );
            self.reader.fault(at, text);
            return None;
        }
        Some(*known)
    }

    fn build_all(&self) {
        let mut index = 0;
        while index < self.slots.borrow().len() {
            self.build(index);
            index += 1;
        }
    }

    /// The plugin of a slot, built now if it was not yet.
    fn build(&self, index: usize) -> Option<Arc<dyn Plugin>> {
        let (factory, parameters, site) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index];
            match &slot.stage {
                Stage::Done(plugin) => return Some(Arc::clone(plugin)),
                Stage::Failed | Stage::Building => return None,
                Stage::Waiting => slot.stage = Stage::Building,
            }
            let factory = slot.registration.and_then(|known| known.factory);
            let site =
                Site { loader: self, name: Arc::clone(&slot.name), at: slot.parameters_at.clone() };
            (factory, slot.parameters.take(), site)
        };
        let plugin = match (factory, parameters) {
            (Some(factory), Some(parameters)) => {
                self.chain.borrow_mut().push(index);
                let plugin = factory(&parameters, &site);
                self.chain.borrow_mut().pop();
                parameters.finish();
                plugin
            }
            // Only what has both ever waits.
            _ => None,
        };
        if plugin.is_none() {
            self.failed.set(true);
        }
        self.slots.borrow_mut()[index].stage = match &plugin {
            Some(plugin) => Stage::Done(Arc::clone(plugin)),
            None => Stage::Failed,
        };
        plugin
    }

    /// The names along the loop that building this slot now would close.
    fn loop_to(&self, index: usize) -> Option<String> {
        let chain = self.chain.borrow();
        let start = chain.iter().position(|&at| at == index)?;
        let slots = self.slots.borrow();
        let names = chain[start..].iter().chain([&index]).map(|&at| &*slots[at].name);
        Some(names.collect::<Vec<_>>().join(" -> "))
    }

    fn index_of(&self, name: &str) -> Option<usize> {
        self.slots.borrow().iter().position(|slot| *slot.name == *name)
    }

    /// A built plugin by name.
    fn get(&self, name: &str) -> Found {
        let slots = self.slots.borrow();
        match slots.iter().find(|slot| *slot.name == *name) {
            None => Found::Undefined,
            Some(Slot { name, stage: Stage::Done(plugin), .. }) => {
                Found::Plugin(Configured { name: Arc::clone(name), plugin: Arc::clone(plugin) })
            }
            Some(_) => Found::Failed,
        }
    }

    /// The plugin that bears the name of its type, which is added if there is none. `why` is said if
    /// that is impossible, at `at`.
    fn default_of(&self, type_name: &str, at: &str, why: &str) -> Option<Configured> {
        let index = match self.index_of(type_name) {
            Some(index) => {
                let known = self.slots.borrow()[index].registration;
                let wanted = self.parts.types.find(type_name).map(|wanted| wanted.type_name);
                if let Some(known) = known.filter(|known| Some(known.type_name) != wanted) {
                    let text = format!(
                        "the name '{type_name}' is taken by a plugin of type '{}', and {why}",
                        known.type_name
                    );
                    self.reader.fault(at, text);
                    return None;
                }
                index
            }
            None => self.add(type_name, at, why)?,
        };
        // Somebody up the chain may be it: then only its name is wanted.
        let plugin = self.build(index)?;
        Some(Configured { name: type_name.into(), plugin })
    }

    fn add(&self, type_name: &str, at: &str, why: &str) -> Option<usize> {
        let registration = self.usable(type_name, type_name, why, at)?;
        let by_flags = self.by_flags(registration.type_name);
        let parameters = by_flags.unwrap_or_else(|| self.added.absent(type_name));
        let mut slots = self.slots.borrow_mut();
        slots.push(Slot {
            name: type_name.into(),
            type_name: type_name.to_owned(),
            at: at.to_owned(),
            registration: Some(registration),
            parameters_at: parameters.path().to_owned(),
            parameters: Some(parameters),
            configured: false,
            stage: Stage::Waiting,
        });
        Some(slots.len() - 1)
    }

    /// What flags say about plugins of a type.
    fn by_flags(&self, type_name: &str) -> Option<Fields<'r>> {
        let (_, reader) = self.flags.iter().find(|(known, _)| *known == type_name)?;
        Some(reader.root())
    }

    /// Built plugins, in order.
    fn built(&self, which: impl Fn(&Slot<'r>) -> bool) -> Vec<Configured> {
        let slots = self.slots.borrow();
        slots
            .iter()
            .filter(|slot| which(slot))
            .filter_map(|slot| match &slot.stage {
                Stage::Done(plugin) => {
                    Some(Configured { name: Arc::clone(&slot.name), plugin: Arc::clone(plugin) })
                }
                _ => None,
            })
            .collect()
    }

    fn any_failed(&self) -> bool {
        self.slots.borrow().iter().any(|slot| matches!(slot.stage, Stage::Failed))
    }

    /// A suggestion for a name that no plugin has.
    fn hint(&self, wrong: &str) -> String {
        let slots = self.slots.borrow();
        closest(wrong, slots.iter().map(|slot| &*slot.name)).map(did_you_mean).unwrap_or_default()
    }

    /// Paths of parameters, and whose they are.
    fn owners(&self) -> Vec<(String, String)> {
        let slots = self.slots.borrow();
        let owners = slots.iter().filter(|slot| !slot.parameters_at.is_empty());
        owners
            .map(|slot| {
                let owner = format!("plugin '{}' (type: {})", slot.name, slot.type_name);
                (slot.parameters_at.clone(), owner)
            })
            .collect()
    }
}

/// What a name leads to.
enum Found {
    Plugin(Configured),
    /// Its fault is noted already.
    Failed,
    Undefined,
}

fn did_you_mean(name: &str) -> String {
    format!("; did you mean `{name}`?")
}
