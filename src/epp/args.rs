//! `epp`'s command line: the flags of the Go EPP, all releases, and ours.
//!
//! # Spelling
//!
//! As Go reads them: one dash or two, `--grpc-port` or `--grpcPort`, `--flag=value` or `--flag value`,
//! booleans as `--secure-serving` or `--secure-serving=false`; a flag given twice counts as given
//! last. Durations are Go's (`50ms`, `1m30s`), sizes Kubernetes quantities (`10Mi`, `25MB`).
//!
//! # Differences to the Go EPP
//!
//! * `--pool-name` is `epp` unless given, where discovery does not come from Kubernetes.
//! * A word after a boolean flag (`--tracing false`) is its value; Go passes over it.
//! * Other words that belong to no flag are refused; Go passes over them.
//! * The flags that name metrics, which Go's later releases refuse, still work.
//! * Port 0 takes a free port.
//! * `--unknown-metrics=idle` restores what Go does with endpoints that have no metrics yet.

use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    epp::{
        config::{FILE_DISCOVERY, Loaded, Parts, load},
        datalayer::{UnknownMetrics, discovery::StaticList},
    },
    support::{
        fields::Fault,
        telemetry::LogFormat,
        tls::{self, CipherSuites, TlsVersion},
        units,
    },
};
use clap::{ArgAction, CommandFactory as _, Parser};

mod judge;
mod spelling;

/// Exit status for a bad command line or configuration (`EX_USAGE` of sysexits).
pub const EX_USAGE: u8 = 64;

/// The name of the pool where nobody gave one and Kubernetes does not have it.
const DEFAULT_POOL: &str = "epp";

/// Chooses the pod for each inference request: an Envoy ext_proc server.
#[derive(Clone, Debug, Parser)]
#[command(name = "epp", version, about, args_override_self = true)]
pub struct Args {
    /// Check flags and configuration, print every fault and warning, and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub check: bool,
    /// Configuration file (EndpointPickerConfig, YAML or JSON); without one, a default holds.
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<String>,
    /// The configuration itself, instead of a file.
    #[arg(long, value_name = "TEXT")]
    pub config_text: Option<String>,
    /// Allow plugins of Alpha stability.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub allow_experimental_plugins: bool,

    /// An endpoint that is always there; may be given several times.
    #[arg(long = "endpoint", value_name = "NAME=IP:PORT[,LABEL=VALUE…]", action = ArgAction::Append)]
    pub endpoints: Vec<String>,
    /// Name of the InferencePool, for metrics. Default: epp.
    #[arg(long, value_name = "NAME")]
    pub pool_name: Option<String>,
    /// Namespace of the InferencePool. Default: $NAMESPACE, or else default.
    #[arg(long, value_name = "NAME")]
    pub pool_namespace: Option<String>,
    /// API group of the InferencePool (Kubernetes only).
    #[arg(long, value_name = "GROUP")]
    pub pool_group: Option<String>,
    /// Labels of the pods, in lieu of an InferencePool (Kubernetes only).
    #[arg(long, value_name = "SELECTOR")]
    pub endpoint_selector: Option<String>,
    /// Ports of the pods that --endpoint-selector selects, 1 to 8 of them, separated by commas.
    #[arg(long, value_name = "PORTS")]
    pub endpoint_target_ports: Option<String>,
    /// Do not obey the subset of endpoints that the proxy hints at.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub disable_endpoint_subset_filter: bool,
    /// Tell the proxy the scores of the endpoints.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub emit_endpoint_scores: bool,

    /// Address that the three ports listen on. Default: all interfaces.
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,
    /// Port of ext_proc; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 9002)]
    pub grpc_port: u16,
    /// Port of gRPC health, never encrypted; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 9003)]
    pub grpc_health_port: u16,
    /// Port of /metrics; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 9090)]
    pub metrics_port: u16,
    /// Loopback address of debug routes, such as 127.0.0.1:9092. Default: none.
    #[arg(long, value_name = "ADDRESS")]
    pub debug_listen: Option<SocketAddr>,
    /// Largest gRPC message taken, such as 100Mi.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub grpc_max_recv_msg_size: Option<u64>,
    /// Largest gRPC message sent, such as 100Mi.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub grpc_max_send_msg_size: Option<u64>,
    /// Serve ext_proc over TLS.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = true, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub secure_serving: bool,
    /// Directory with tls.crt and tls.key. Default: a self-signed certificate, in memory.
    #[arg(long, value_name = "DIR")]
    pub cert_path: Option<String>,
    /// Read the certificate again when its files change.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub enable_cert_reload: bool,
    /// Lowest version of TLS: VersionTLS12 or VersionTLS13.
    #[arg(long, value_name = "VERSION", default_value = "VersionTLS12", value_parser = tls::version)]
    pub tls_min_version: TlsVersion,
    /// Cipher suites, by their IANA names, separated by commas.
    #[arg(long, value_name = "NAMES", default_value = "", hide_default_value = true,
        value_parser = tls::cipher_suites)]
    pub tls_cipher_suites: CipherSuites,
    /// Serve gRPC health on the port of ext_proc, too.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub health_checking: bool,
    /// Count ext_proc streams in metrics of their own.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_parser = units::boolean, value_name = "BOOL")]
    pub enable_grpc_stream_metrics: bool,
    /// How long requests are still served after SIGTERM.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = units::duration)]
    pub drain_timeout: Duration,

    /// Time between scrapes of an endpoint; at least 50ms.
    #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = units::duration)]
    pub refresh_metrics_interval: Duration,
    /// Accepted without effect: the pool's gauges are worked out when they are read.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = units::duration)]
    pub refresh_prometheus_metrics_interval: Duration,
    /// Age from which metrics of an endpoint are stale.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = units::duration)]
    pub metrics_staleness_threshold: Duration,

    /// What scorers think of an endpoint whose metrics nobody has seen: worst, as of the busiest one
    /// that is known, or idle, like the Go EPP. unknownMetrics of core-metrics-extractor goes before it.
    #[arg(long, value_name = "VIEW", default_value = "worst")]
    pub unknown_metrics: UnknownMetrics,

    /// Log lines as text or json. Default: what --zap-encoder says, or else text.
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log verbosity: 0 warnings, 1 and 2 information, 3 and 4 debug, from 5 on trace.
    #[arg(
        long = "v",
        short = 'v',
        value_name = "LEVEL",
        default_value_t = 2,
        allow_negative_numbers = true
    )]
    pub verbosity: i64,
    /// Log encoding of the Go EPP: json or console.
    #[arg(long, value_name = "ENCODER")]
    pub zap_encoder: Option<String>,
    /// Log level of the Go EPP: debug, info, error, panic, or a verbosity. Goes before -v.
    #[arg(long, value_name = "LEVEL")]
    pub zap_log_level: Option<String>,
    /// No effect.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub zap_devel: Option<bool>,
    /// No effect.
    #[arg(long, hide = true, value_name = "LEVEL")]
    pub zap_stacktrace_level: Option<String>,
    /// No effect.
    #[arg(long, hide = true, value_name = "ENCODING")]
    pub zap_time_encoding: Option<String>,

    /// Port that metrics are scraped from; 0 is each endpoint's own.
    #[arg(long, value_name = "PORT")]
    pub model_server_metrics_port: Option<u16>,
    /// Path that metrics are scraped from.
    #[arg(long, value_name = "PATH")]
    pub model_server_metrics_path: Option<String>,
    /// Scheme that metrics are scraped with: http or https.
    #[arg(long, value_name = "SCHEME")]
    pub model_server_metrics_scheme: Option<String>,
    /// Scrape without checking certificates.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub model_server_metrics_https_insecure_skip_verify: Option<bool>,
    /// Deprecated: metric of waiting requests.
    #[arg(long, value_name = "METRIC")]
    pub total_queued_requests_metric: Option<String>,
    /// Deprecated: metric of running requests.
    #[arg(long, value_name = "METRIC")]
    pub total_running_requests_metric: Option<String>,
    /// Deprecated: metric of the used fraction of the KV cache.
    #[arg(long, value_name = "METRIC")]
    pub kv_cache_usage_percentage_metric: Option<String>,
    /// Deprecated: metric of LoRA adapters.
    #[arg(long, value_name = "METRIC")]
    pub lora_info_metric: Option<String>,
    /// Deprecated: metric of the cache's configuration.
    #[arg(long, value_name = "METRIC")]
    pub cache_info_metric: Option<String>,

    /// No effect: there is no leader election.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub ha_enable_leader_election: Option<bool>,
    /// No effect: there is no pprof.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub enable_pprof: Option<bool>,
    /// No effect: traces are not built yet.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub tracing: Option<bool>,
    /// No effect: it takes Kubernetes to judge tokens.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = units::boolean, value_name = "BOOL")]
    pub metrics_endpoint_auth: Option<bool>,
    /// No effect: metrics are served in plain HTTP.
    #[arg(long, value_name = "FILE")]
    pub metrics_client_ca_file: Option<String>,
    /// No effect: metrics are served in plain HTTP.
    #[arg(long, value_name = "DIR")]
    pub metrics_cert_dir: Option<String>,
    /// No effect.
    #[arg(long, hide = true, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// No effect: the header is x-gateway-destination-endpoint.
    #[arg(long, hide = true, value_name = "KEY")]
    pub destination_endpoint_hint_key: Option<String>,
    /// No effect: the namespace is envoy.lb.
    #[arg(long, hide = true, value_name = "NAMESPACE")]
    pub destination_endpoint_hint_metadata_namespace: Option<String>,

    /// What was odd about the spelling.
    #[arg(skip)]
    notes: Vec<String>,
}

/// What to do after the command line and the configuration are read.
#[derive(Debug)]
pub enum Start {
    /// Run with this configuration.
    Run(Box<Loaded>),
    /// End with this status; everything has been said.
    Exit(u8),
}

impl Args {
    /// Parses a command line, the program's name first. Help, version and errors are printed.
    ///
    /// # Errors
    ///
    /// The exit status: 0 after help and version, [`EX_USAGE`] after an error.
    pub fn from_command_line<I, T>(line: I) -> Result<Self, u8>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        Self::parse_line(line).map_err(|error| {
            // A closed output is no reason to fail differently.
            error.print().unwrap_or_default();
            if error.use_stderr() { EX_USAGE } else { 0 }
        })
    }

    fn parse_line<I, T>(line: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        let line = line.into_iter().map(Into::into);
        let (line, notes) = spelling::normalise(line, &Self::command());
        let mut args = Self::try_parse_from(line)?;
        args.notes = notes;
        args.drop_empty();
        Ok(args)
    }

    /// Go takes an empty text for none.
    fn drop_empty(&mut self) {
        for text in [
            &mut self.config_file,
            &mut self.config_text,
            &mut self.pool_name,
            &mut self.pool_namespace,
            &mut self.pool_group,
            &mut self.endpoint_selector,
            &mut self.endpoint_target_ports,
            &mut self.cert_path,
            &mut self.metrics_client_ca_file,
            &mut self.metrics_cert_dir,
            &mut self.kubeconfig,
        ] {
            text.take_if(|text| text.is_empty());
        }
    }

    /// The name of the pool.
    #[must_use]
    pub fn pool_name(&self) -> &str {
        self.pool_name.as_deref().unwrap_or(DEFAULT_POOL)
    }

    /// The namespace of the pool: the flag, `$NAMESPACE`, `default`.
    #[must_use]
    pub fn pool_namespace(&self) -> String {
        let given = self.pool_namespace.clone();
        let given = given.or_else(|| std::env::var("NAMESPACE").ok());
        given.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned())
    }

    /// `--cert-path`; `None`: a self-signed certificate.
    #[must_use]
    pub fn cert_path(&self) -> Option<&Path> {
        self.cert_path.as_deref().map(Path::new)
    }

    /// How log lines look.
    #[must_use]
    pub fn log_format(&self) -> LogFormat {
        self.log_format.unwrap_or(match self.zap_encoder.as_deref() {
            Some("json") => LogFormat::Json,
            _ => LogFormat::Text,
        })
    }

    /// Directives for [`telemetry::init`](crate::support::telemetry::init). What is below information
    /// is said by this program alone, not by what it is built from.
    #[must_use]
    pub fn log_level(&self) -> String {
        let level = match self.zap_log_level.as_deref() {
            Some("debug") => "debug",
            Some("error" | "panic" | "dpanic" | "fatal") => "error",
            Some("warn") => "warn",
            Some(number) => number.parse().map_or("info", level),
            None => level(self.verbosity),
        };
        match level {
            "debug" | "trace" => format!("info,kv_indexer={level},epp={level}"),
            level => level.to_owned(),
        }
    }

    /// The endpoints of `--endpoint`.
    ///
    /// # Errors
    ///
    /// Every fault.
    pub fn endpoints(&self) -> Result<StaticList, Vec<Fault>> {
        StaticList::parse_all(&self.endpoints)
            .map_err(|texts| texts.into_iter().map(|text| Fault::new("--endpoint", text)).collect())
    }

    /// Reads the configuration and builds what it says; `parts` is completed with what flags say.
    ///
    /// # Errors
    ///
    /// Every fault of the flags and of the configuration.
    pub fn load(&self, parts: &Parts<'_>) -> Result<Loaded, Vec<Fault>> {
        let mut faults = self.faults();
        let text = match (&self.config_file, &self.config_text) {
            (Some(path), None) => std::fs::read_to_string(path)
                .map_err(|error| Fault::new("--config-file", format!("reading {path}: {error}"))),
            (_, text) => Ok(text.clone().unwrap_or_default()),
        };
        let text = match text {
            Ok(text) => text,
            Err(fault) => {
                faults.push(fault);
                return Err(faults);
            }
        };
        let defaults = self.default_parameters();
        let parts = Parts {
            allow_experimental: parts.allow_experimental || self.allow_experimental_plugins,
            defaults: &defaults,
            ..parts.clone()
        };
        match load(&text, &parts) {
            Ok(mut loaded) => {
                faults.extend(self.discovery_fault(&loaded));
                if !faults.is_empty() {
                    return Err(faults);
                }
                loaded.warnings.splice(..0, self.warnings());
                Ok(loaded)
            }
            Err(more) => {
                faults.extend(more);
                Err(faults)
            }
        }
    }

    /// Endpoints have to come from somewhere, and from one place.
    fn discovery_fault(&self, loaded: &Loaded) -> Option<Fault> {
        let given = !self.endpoints.is_empty();
        match &loaded.discovery {
            Some(discovery) if given => Some(Fault::new(
                "--endpoint",
                format!(
                    "endpoints come from '{}' of dataLayer.discovery already; give one of them",
                    discovery.name
                ),
            )),
            None if !given => {
                let file = |plugin: &&crate::epp::scheduling::Configured| {
                    plugin.plugin.type_name() == FILE_DISCOVERY
                };
                let text = match loaded.plugins.iter().find(file) {
                    Some(plugin) => format!(
                        "plugin '{0}' is configured and nothing refers to it; add `dataLayer: \
                         {{discovery: {{pluginRef: {0}}}}}`",
                        plugin.name
                    ),
                    None => {
                        "endpoints come from nowhere: discovery from Kubernetes is not built yet; \
                             add a plugin of type file-discovery and refer to it in \
                             dataLayer.discovery.pluginRef, or give --endpoint NAME=IP:PORT"
                            .to_owned()
                    }
                };
                Some(Fault::new("dataLayer.discovery", text))
            }
            _ => None,
        }
    }

    /// Loads the configuration and says on `out` and `err` what is to be said: with `--check`, that
    /// it is valid, and the warnings; without, nothing unless there are faults. Warnings of a
    /// configuration that runs are left to the log.
    pub fn start(&self, parts: &Parts<'_>, out: &mut dyn Write, err: &mut dyn Write) -> Start {
        let (said, status) = match self.load(parts) {
            Ok(loaded) if self.check => (say_valid(&loaded, out), 0),
            Ok(loaded) => return Start::Run(Box::new(loaded)),
            Err(faults) => (self.say_faults(&faults, err), EX_USAGE),
        };
        // Whoever closed our output still gets the status.
        said.unwrap_or_default();
        Start::Exit(status)
    }

    fn say_faults(&self, faults: &[Fault], err: &mut dyn Write) -> io::Result<()> {
        let path = self.config_file.as_ref().map(PathBuf::from);
        let place: &dyn Display = match &path {
            Some(path) => &path.display(),
            None => &"command line",
        };
        let count = faults.len();
        let noun = if count == 1 { "fault" } else { "faults" };
        writeln!(err, "epp: {place}: {count} {noun} in the configuration")?;
        faults.iter().try_for_each(|fault| writeln!(err, "  {fault}"))?;
        self.warnings().iter().try_for_each(|warning| writeln!(err, "  warning: {warning}"))
    }
}

fn say_valid(loaded: &Loaded, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "configuration is valid")?;
    loaded.warnings.iter().try_for_each(|warning| writeln!(out, "warning: {warning}"))
}

/// The level of a verbosity; a negative one is the default's.
fn level(verbosity: i64) -> &'static str {
    match verbosity {
        0 => "warn",
        i64::MIN..=2 => "info",
        3 | 4 => "debug",
        5.. => "trace",
    }
}

/// A quantity whose unit may end in B, as in 10MiB or 25MB.
fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    match text.strip_suffix(['B', 'b']) {
        Some(short) if !short.is_empty() => units::quantity(short),
        _ => units::quantity(text),
    }
}

#[cfg(test)]
mod tests;
