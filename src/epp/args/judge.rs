//! What is wrong about flags by themselves, what has no effect, and what they say about plugins.

use serde_json::{Map, Value, json};

use super::Args;
use crate::{
    epp::{
        config::{METRICS_EXTRACTOR, METRICS_SOURCE},
        datalayer::scrape::MIN_INTERVAL,
    },
    support::{fields::Fault, tls::TlsVersion},
};

impl Args {
    /// Everything that is wrong about the flags by themselves.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut fault = |flag: &str, text: &str| faults.push(Fault::new(flag, text));
        if self.pool_name.is_some() && self.endpoint_selector.is_some() {
            fault("--endpoint-selector", "either pool-name or endpoint-selector must be set");
        }
        if let Err(text) = self.target_ports() {
            fault("--endpoint-target-ports", &text);
        }
        if self.config_file.is_some() && self.config_text.is_some() {
            let text =
                r#"both the "config-file" and "config-text" flags cannot be set at the same time"#;
            fault("--config-text", text);
        }
        if self.metrics_client_ca_file.is_some() && self.metrics_cert_dir.is_none() {
            let text = r#""metrics-client-ca-file" requires "metrics-cert-dir""#;
            fault("--metrics-client-ca-file", text);
        }
        if self.debug_listen.is_some_and(|address| !address.ip().is_loopback()) {
            let text = "is no loopback address: debug routes are for this machine alone";
            fault("--debug-listen", text);
        }
        if !matches!(self.zap_encoder.as_deref(), None | Some("json" | "console")) {
            fault("--zap-encoder", "must be json or console");
        }
        let words = ["debug", "info", "warn", "error", "dpanic", "panic", "fatal"];
        if let Some(level) = &self.zap_log_level
            && !words.contains(&level.as_str())
            && !level.parse::<i64>().is_ok_and(|number| number > 0)
        {
            fault("--zap-log-level", "must be debug, info, error, panic or a number above 0");
        }
        if let Some(scheme) = &self.model_server_metrics_scheme
            && !matches!(scheme.as_str(), "http" | "https")
        {
            fault("--model-server-metrics-scheme", "must be http or https");
        }
        if let Err(more) = self.endpoints() {
            faults.extend(more);
        }
        faults
    }

    /// Ports of `--endpoint-target-ports`, without doubles.
    fn target_ports(&self) -> Result<Vec<u16>, String> {
        let texts = self.endpoint_target_ports.as_deref().unwrap_or_default();
        let mut ports = Vec::new();
        for text in texts.split(',').filter(|_| !texts.is_empty()) {
            let port = text
                .parse()
                .map_err(|_| format!("invalid port number {text} in \"endpoint-target-ports\""))?;
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        if self.endpoint_selector.is_some() && !(1..=8).contains(&ports.len()) {
            return Err("flag \"endpoint-target-ports\" should have length from 1 to 8".to_owned());
        }
        Ok(ports)
    }

    /// What has no effect, or not the expected one; each begins with its flag.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.notes.clone();
        let mut warn = |flag: &str, applies: bool, text: &str| {
            if applies {
                warnings.push(format!("--{flag}: {text}"));
            }
        };
        let kubernetes = "has no effect: Kubernetes is not built yet";
        warn("pool-group", self.pool_group.is_some(), kubernetes);
        warn("endpoint-selector", self.endpoint_selector.is_some(), kubernetes);
        warn("endpoint-target-ports", self.endpoint_target_ports.is_some(), kubernetes);
        warn("kubeconfig", self.kubeconfig.is_some(), kubernetes);
        warn(
            "ha-enable-leader-election",
            self.ha_enable_leader_election == Some(true),
            "has no effect: without Kubernetes there is no leader election; every replica serves",
        );
        warn("enable-pprof", self.enable_pprof == Some(true), "has no effect: there is no pprof");
        warn("tracing", self.tracing == Some(true), "has no effect: traces are not built yet");
        warn(
            "metrics-endpoint-auth",
            self.metrics_endpoint_auth == Some(true),
            "has no effect: without Kubernetes nobody judges tokens; metrics are open to whoever \
             reaches their port",
        );
        let plain = "has no effect: metrics are served in plain HTTP; give their port to a proxy that \
                     encrypts, or bind it to loopback";
        warn("metrics-cert-dir", self.metrics_cert_dir.is_some(), plain);
        warn("metrics-client-ca-file", self.metrics_client_ca_file.is_some(), plain);
        for (flag, value) in self.metric_flags() {
            let text = "deprecated: use engineConfigs of core-metrics-extractor";
            warn(flag, value.is_some(), text);
        }
        for (flag, given, fixed) in [
            (
                "destination-endpoint-hint-key",
                &self.destination_endpoint_hint_key,
                "x-gateway-destination-endpoint",
            ),
            (
                "destination-endpoint-hint-metadata-namespace",
                &self.destination_endpoint_hint_metadata_namespace,
                "envoy.lb",
            ),
        ] {
            let other = given.as_deref().is_some_and(|given| given != fixed);
            warn(flag, other, &format!("has no effect: it is always {fixed}"));
        }
        warn(
            "refresh-metrics-interval",
            self.refresh_metrics_interval < MIN_INTERVAL,
            "is below the minimum; 50ms is taken",
        );
        warn(
            "enable-cert-reload",
            self.enable_cert_reload && self.cert_path.is_none(),
            "has no effect without --cert-path",
        );
        warn(
            "cert-path",
            self.cert_path.is_some() && !self.secure_serving,
            "has no effect with --secure-serving=false",
        );
        warn(
            "tls-min-version",
            self.tls_min_version == TlsVersion::Older,
            "is not built in; VersionTLS12 is taken",
        );
        for name in &self.tls_cipher_suites.left_out {
            warn("tls-cipher-suites", true, &format!("{name} is not built in and left out"));
        }
        let zap = "has no effect: logs are not written by zap";
        warn("zap-devel", self.zap_devel.is_some(), zap);
        warn("zap-stacktrace-level", self.zap_stacktrace_level.is_some(), zap);
        warn("zap-time-encoding", self.zap_time_encoding.is_some(), zap);
        warnings
    }

    /// The flags that name a metric, with what they say.
    fn metric_flags(&self) -> [(&'static str, &Option<String>); 5] {
        [
            ("total-queued-requests-metric", &self.total_queued_requests_metric),
            ("total-running-requests-metric", &self.total_running_requests_metric),
            ("kv-cache-usage-percentage-metric", &self.kv_cache_usage_percentage_metric),
            ("lora-info-metric", &self.lora_info_metric),
            ("cache-info-metric", &self.cache_info_metric),
        ]
    }

    /// What flags say about plugins to which the configuration gives no parameters.
    #[must_use]
    pub fn default_parameters(&self) -> Vec<(&'static str, Value)> {
        let mut defaults = Vec::new();
        let mut source = Map::new();
        if let Some(port) = self.model_server_metrics_port.filter(|port| *port > 0) {
            source.insert("port".to_owned(), port.into());
        }
        if let Some(path) = &self.model_server_metrics_path {
            source.insert("path".to_owned(), path.as_str().into());
        }
        if let Some(scheme) = &self.model_server_metrics_scheme {
            source.insert("scheme".to_owned(), scheme.as_str().into());
        }
        if let Some(skip) = self.model_server_metrics_https_insecure_skip_verify {
            source.insert("insecureSkipVerify".to_owned(), skip.into());
        }
        if !source.is_empty() {
            defaults.push((METRICS_SOURCE, Value::Object(source)));
        }
        if self.metric_flags().iter().any(|(_, value)| value.is_some()) {
            // An entry replaces all of the engine's metrics, so the others are named, too.
            let or = |given: &Option<String>, default: &str| match given {
                Some(given) => given.clone(),
                None => default.to_owned(),
            };
            let vllm = json!({
                "name": "vllm",
                "queuedRequestsSpec":
                    or(&self.total_queued_requests_metric, "vllm:num_requests_waiting"),
                "runningRequestsSpec":
                    or(&self.total_running_requests_metric, "vllm:num_requests_running"),
                "kvUsageSpec":
                    or(&self.kv_cache_usage_percentage_metric, "vllm:kv_cache_usage_perc"),
                "loraSpec": or(&self.lora_info_metric, "vllm:lora_requests_info"),
                "cacheInfoSpec": or(&self.cache_info_metric, "vllm:cache_config_info"),
            });
            defaults.push((METRICS_EXTRACTOR, json!({"engineConfigs": [vllm]})));
        }
        defaults
    }
}
