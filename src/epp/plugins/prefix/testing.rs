//! Endpoints, requests and a [`Building`] for tests.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use prometheus::Registry;
use smallvec::smallvec;

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointInfo, EndpointName, Endpoints, Metrics, UnknownMetrics},
        ext_proc::headers::{HeaderEdits, HeaderList},
        plugins::{Building, Factory},
        request::{Api, InferenceRequest, Parsed, PromptForm, PromptSpan},
        scheduling::{
            Cycle, Flight, Plugin, Produced, ProfileResults, ProfileRun, SchedulingResult,
        },
    },
    support::fields::{Document, Fields, Reader},
};

/// What discovery says of pod `number`.
pub(in crate::epp::plugins) fn info(number: u8) -> EndpointInfo {
    let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, number), 8000));
    EndpointInfo {
        name: EndpointName { namespace: "default".to_owned(), name: format!("pod-{number}") },
        address,
        metrics_address: address,
        labels: BTreeMap::new(),
    }
}

/// So many pods.
pub(in crate::epp::plugins) fn pods(count: u8) -> Arc<Endpoints> {
    let endpoints = Arc::new(Endpoints::new());
    (0..count).for_each(|number| endpoints.upsert(info(number)));
    endpoints
}

/// A request with this prompt, which is a JSON value.
pub(in crate::epp::plugins) fn request(form: PromptForm, prompt: &str) -> InferenceRequest {
    let head = r#"{"prompt":"#;
    let span = head.len()..head.len() + prompt.len();
    InferenceRequest {
        id: Arc::from("request"),
        headers: HeaderList::default(),
        parsed: Parsed {
            model: "model".to_owned(),
            prompt: smallvec![PromptSpan { form, span }],
            ..Parsed::unread(Api::Completions)
        },
        body: Bytes::from(format!("{head}{prompt}}}")),
        target_model: Arc::from("model"),
        fairness_id: Arc::from("default-flow"),
        priority: 0,
        received: Instant::now(),
    }
}

/// A request with this text, which needs no escapes.
pub(in crate::epp::plugins) fn text(prompt: &str) -> InferenceRequest {
    request(PromptForm::Text, &format!("{prompt:?}"))
}

/// One scheduling cycle.
pub(in crate::epp::plugins) struct Run {
    pub(in crate::epp::plugins) request: InferenceRequest,
    pub(in crate::epp::plugins) endpoints: Vec<Arc<Endpoint>>,
    pub(in crate::epp::plugins) produced: Produced,
    pub(in crate::epp::plugins) now: Instant,
}

impl Run {
    /// A cycle over all endpoints.
    pub(in crate::epp::plugins) fn new(endpoints: &Endpoints, request: InferenceRequest) -> Self {
        let endpoints = Vec::clone(&endpoints.list());
        Self { request, endpoints, produced: Produced::new(), now: Instant::now() }
    }

    /// Runs a producer.
    pub(in crate::epp::plugins) fn produce(&mut self, plugin: &dyn Plugin) {
        let producer = plugin.producer().expect("it is a producer");
        let future = producer.produce(&self.request, &self.endpoints, &mut self.produced);
        assert!(future.is_none(), "it does not wait");
    }

    /// Does something with the cycle.
    pub(in crate::epp::plugins) fn with<T>(&self, then: impl FnOnce(&Cycle<'_>) -> T) -> T {
        let metrics: Vec<Arc<Metrics>> = self.endpoints.iter().map(|pod| pod.metrics()).collect();
        then(&Cycle {
            unknown_metrics: UnknownMetrics::default(),
            request: &self.request,
            endpoints: &self.endpoints,
            metrics: &metrics,
            produced: &self.produced,
            now: self.now,
        })
    }

    /// The scores of all endpoints.
    pub(in crate::epp::plugins) fn score(&self, plugin: &dyn Plugin) -> Vec<f64> {
        let among: Vec<usize> = (0..self.endpoints.len()).collect();
        let mut scores = vec![0.0; among.len()];
        self.with(|cycle| plugin.scorer().unwrap().score(cycle, &among, &mut scores));
        scores
    }

    /// Routes to the first endpoint of each profile, the first of which is primary.
    pub(in crate::epp::plugins) fn route(
        &self,
        plugin: &dyn Plugin,
        picks: &[(&str, usize)],
    ) -> Option<Box<dyn Flight>> {
        let run = |pod| ProfileRun { picked: vec![pod], scored: Vec::new() };
        let results = picks.iter().map(|&(name, pod)| (Arc::from(name), Some(run(pod)))).collect();
        let result =
            SchedulingResult { primary: Arc::from(picks[0].0), results: ProfileResults(results) };
        let mut headers = HeaderEdits::new();
        let hears = plugin.pre_request().expect("it hears of routed requests");
        let flight = self.with(|cycle| hears.pre_request(cycle, &result, &mut headers));
        assert_eq!(headers, HeaderEdits::new());
        flight.expect("it refuses nothing")
    }
}

/// A plugin, and the warnings about its parameters.
type Built = (Arc<dyn Plugin>, Vec<String>);

/// Builds plugins with a registry of its own.
#[derive(Debug)]
pub(in crate::epp::plugins) struct Bench {
    name: Arc<str>,
    pub(in crate::epp::plugins) endpoints: Arc<Endpoints>,
    pub(in crate::epp::plugins) registry: Registry,
    /// Plugins that others may name.
    pub(in crate::epp::plugins) others: Vec<(Arc<str>, Arc<dyn Plugin>)>,
}

impl Bench {
    /// For a plugin of this name; names are those of metrics, and tests run beside each other.
    pub(in crate::epp::plugins) fn new(name: &str, pods: u8) -> Self {
        Self {
            name: Arc::from(name),
            endpoints: self::pods(pods),
            registry: Registry::new(),
            others: Vec::new(),
        }
    }

    /// Builds a plugin from its parameters.
    ///
    /// # Errors
    ///
    /// All faults.
    pub(in crate::epp::plugins) fn build(
        &self,
        factory: Option<Factory>,
        parameters: &str,
    ) -> Result<Arc<dyn Plugin>, Vec<String>> {
        self.try_build(factory, parameters).map(|(plugin, _)| plugin)
    }

    /// Asserts that parameters are refused, one of the faults saying `want`.
    #[track_caller]
    pub(in crate::epp::plugins) fn refuses(
        &self,
        factory: Option<Factory>,
        parameters: &str,
        want: &str,
    ) {
        let faults = self.build(factory, parameters).unwrap_err();
        let says = faults.iter().any(|fault| fault.contains(want));
        assert!(says, "{parameters}: {want:?} is not in {faults:?}");
    }

    /// Builds a plugin and gives the warnings, too.
    pub(in crate::epp::plugins) fn try_build(
        &self,
        factory: Option<Factory>,
        parameters: &str,
    ) -> Result<Built, Vec<String>> {
        let reader = Reader::new(Document::parse(parameters).unwrap());
        let params = reader.root();
        let plugin = factory.expect("it is built")(&params, self);
        params.finish();
        let report = reader.finish();
        if report.faults.is_empty() {
            return Ok((plugin.expect("no plugin and no fault"), report.warnings));
        }
        Err(report
            .faults
            .iter()
            .map(|fault| format!("{}: {}", fault.path, fault.message))
            .collect())
    }
}

impl Building for Bench {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn plugin(&self, params: &Fields<'_>, field: &str, name: &str) -> Option<Arc<dyn Plugin>> {
        let found = self.others.iter().find(|(known, _)| **known == *name);
        if found.is_none() {
            params.fault(field, format!("there is no plugin {name:?}"));
        }
        found.map(|(_, plugin)| Arc::clone(plugin))
    }

    fn default_of(&self, type_name: &str) -> Arc<str> {
        let found = self.others.iter().find(|(_, plugin)| plugin.type_name() == type_name);
        found.map_or_else(|| Arc::from(type_name), |(name, _)| Arc::clone(name))
    }

    fn endpoints(&self) -> &Arc<Endpoints> {
        &self.endpoints
    }

    fn registry(&self) -> &Registry {
        &self.registry
    }
}
