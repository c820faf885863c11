//! Requests, endpoints and configurations for tests of plugins.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use prometheus::Registry;
use serde_json::Value;
use smallvec::SmallVec;

use super::{Configured, Cycle, Plugin, Produced, PromptTokens, SchedulingProfile};
use crate::{
    epp::{
        datalayer::{
            Endpoint, EndpointId, EndpointInfo, EndpointName, Endpoints, Metrics, UnknownMetrics,
        },
        ext_proc::headers::HeaderList,
        plugins::{Building, Registration},
        request::{Api, InferenceRequest, Parsed, PromptForm, PromptSpan},
    },
    support::fields::{Fault, Fields, Reader},
};

/// The `now` of all cycles, far enough from the start of time to count back.
pub(crate) static NOW: LazyLock<Instant> =
    LazyLock::new(|| Instant::now() + Duration::from_secs(3600));

/// One prompt's tokens, as the engine makes them.
pub(crate) fn exact_tokens(ids: &[u32]) -> PromptTokens {
    PromptTokens { prompts: vec![ids.to_vec().into()], exact: true }
}

/// Everything that a [`Cycle`] borrows.
pub(crate) struct Rig {
    pub(crate) request: InferenceRequest,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    pub(crate) metrics: Vec<Arc<Metrics>>,
    pub(crate) produced: Produced,
    pub(crate) unknown_metrics: UnknownMetrics,
}

impl Rig {
    /// Endpoints `pod-1`, … at `10.0.0.1:8000`, … with these metrics. To tell what was never scraped
    /// from what was, metrics other than the default count as scraped now.
    pub(crate) fn new(metrics: impl IntoIterator<Item = Metrics>) -> Self {
        let metrics: Vec<_> = metrics.into_iter().map(Arc::new).collect();
        let labels = vec![&[][..]; metrics.len()];
        Self { metrics, ..Self::labelled(&labels) }
    }

    /// Scraped and idle endpoints with these labels.
    pub(crate) fn labelled(labels: &[&[(&str, &str)]]) -> Self {
        let endpoint = |(at, labels): (usize, &&[(&str, &str)])| {
            let address = SocketAddr::from(([10, 0, 0, at as u8 + 1], 8000));
            let name = format!("pod-{}", at + 1);
            let labels: BTreeMap<_, _> =
                labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
            let info = EndpointInfo {
                name: EndpointName { namespace: "default".to_owned(), name },
                address,
                metrics_address: address,
                labels,
            };
            Arc::new(Endpoint::new(EndpointId(at as u64), info))
        };
        Self {
            request: request("model", "a prompt"),
            endpoints: labels.iter().enumerate().map(endpoint).collect(),
            metrics: labels.iter().map(|_| Arc::new(scraped())).collect(),
            produced: Produced::new(),
            unknown_metrics: UnknownMetrics::default(),
        }
    }

    pub(crate) fn cycle(&self) -> Cycle<'_> {
        Cycle {
            request: &self.request,
            endpoints: &self.endpoints,
            metrics: &self.metrics,
            produced: &self.produced,
            unknown_metrics: self.unknown_metrics,
            now: *NOW,
        }
    }

    /// The scores of all endpoints.
    #[track_caller]
    pub(crate) fn scores(&self, plugin: &dyn Plugin) -> Vec<f64> {
        let among: Vec<usize> = (0..self.endpoints.len()).collect();
        let mut scores = vec![0.0; among.len()];
        plugin.scorer().unwrap().score(&self.cycle(), &among, &mut scores);
        scores
    }

    /// Who of all endpoints passes.
    #[track_caller]
    pub(crate) fn passing(&self, plugin: &dyn Plugin) -> Vec<usize> {
        let mut keep = (0..self.endpoints.len()).collect();
        plugin.filter().unwrap().filter(&self.cycle(), &mut keep);
        keep
    }
}

/// Metrics of an idle endpoint, scraped now.
pub(crate) fn scraped() -> Metrics {
    Metrics { updated: Some(*NOW), ..Metrics::default() }
}

/// Metrics with a queue, scraped now.
pub(crate) fn waiting(waiting: u64) -> Metrics {
    Metrics { waiting, ..scraped() }
}

/// Compares scores to within rounding.
#[track_caller]
pub(crate) fn assert_close(got: &[f64], want: &[f64]) {
    let close = got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-9);
    assert!(close, "got {got:?}, want {want:?}");
}

/// A completion.
pub(crate) fn request(model: &str, prompt: &str) -> InferenceRequest {
    let body = format!("{{\"prompt\":\"{prompt}\"}}");
    let span = 10..body.len() - 1;
    let mut spans = SmallVec::new();
    spans.push(PromptSpan { form: PromptForm::Text, span });
    InferenceRequest {
        id: "request-1".into(),
        headers: HeaderList::default(),
        parsed: Parsed {
            api: Api::Completions,
            model: model.to_owned(),
            model_span: None,
            stream: false,
            max_output_tokens: None,
            cache_salt: None,
            prompt: spans,
            tools: None,
            usage_edit: None,
            multimodal: false,
        },
        body: Bytes::from(body),
        target_model: model.into(),
        fairness_id: "default-flow".into(),
        priority: 0,
        received: *NOW,
    }
}

/// A [`Building`] with some plugins already built.
#[derive(Default)]
pub(crate) struct Site {
    pub(crate) plugins: Vec<Configured>,
    pub(crate) registry: Registry,
    name: Arc<str>,
    endpoints: Arc<Endpoints>,
}

impl Site {
    /// Builds a plugin from parameters as a configuration does. The error lists all faults.
    pub(crate) fn build(
        &mut self,
        registration: Registration,
        params: Value,
    ) -> Result<Arc<dyn Plugin>, Vec<String>> {
        self.name = registration.type_name.into();
        let reader = Reader::new(params.into());
        let fields = reader.root();
        let plugin = (registration.factory.unwrap())(&fields, self);
        fields.finish();
        let faults = reader.finish().faults;
        match plugin {
            Some(plugin) if faults.is_empty() => {
                assert_eq!(plugin.type_name(), registration.type_name);
                let configured =
                    Configured { name: Arc::clone(&self.name), plugin: Arc::clone(&plugin) };
                self.plugins.push(configured);
                Ok(plugin)
            }
            None if faults.is_empty() => panic!("nothing was built and nothing said"),
            _ => Err(faults.iter().map(Fault::to_string).collect()),
        }
    }
}

impl Building for Site {
    fn name(&self) -> &Arc<str> {
        &self.name
    }
    fn plugin(&self, params: &Fields<'_>, field: &str, name: &str) -> Option<Arc<dyn Plugin>> {
        let found = self.plugins.iter().find(|plugin| *plugin.name == *name);
        if found.is_none() {
            params.fault(field, format!("no plugin is named '{name}'"));
        }
        found.map(|plugin| Arc::clone(&plugin.plugin))
    }
    fn default_of(&self, type_name: &str) -> Arc<str> {
        type_name.into()
    }
    fn endpoints(&self) -> &Arc<Endpoints> {
        &self.endpoints
    }
    fn registry(&self) -> &Registry {
        &self.registry
    }
}

/// Builds a plugin that needs no others.
pub(crate) fn build(
    registration: Registration,
    params: Value,
) -> Result<Arc<dyn Plugin>, Vec<String>> {
    Site::default().build(registration, params)
}

/// A plugin under its type's name.
pub(crate) fn configured(plugin: &Arc<dyn Plugin>) -> Configured {
    Configured { name: plugin.type_name().into(), plugin: Arc::clone(plugin) }
}

/// A profile of these plugins.
pub(crate) fn profile(
    name: &str,
    filters: &[Arc<dyn Plugin>],
    scorers: &[(Arc<dyn Plugin>, f64)],
    picker: &Arc<dyn Plugin>,
) -> SchedulingProfile {
    SchedulingProfile {
        name: name.into(),
        filters: filters.iter().map(configured).collect(),
        scorers: scorers.iter().map(|(plugin, weight)| (configured(plugin), *weight)).collect(),
        picker: configured(picker),
    }
}
