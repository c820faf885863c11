//! The programs of the path: real Envoy, the real `epp`, mock engines.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use crate::support::{Program, eventually, http_get, yaml_file};

/// Names the Envoy to run; `tests/run` sets it.
const ENVOY_VARIABLE: &str = "KV_INDEXER_ENVOY";

/// A running `epp`.
pub(crate) struct Epp {
    pub(crate) grpc: SocketAddr,
    pub(crate) health: SocketAddr,
    pub(crate) metrics: SocketAddr,
    pub(crate) program: Program,
    _config: NamedTempFile,
}

impl Epp {
    /// Starts it on free loopback ports, in plaintext.
    pub(crate) fn start(config: &str, arguments: &[&str]) -> Self {
        let config = yaml_file(config);
        let mut command = Command::new(env!("CARGO_BIN_EXE_epp"));
        command
            .arg("--config-file")
            .arg(config.path())
            .args(["--bind-address", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0"])
            .args(["--metrics-port", "0", "--secure-serving=false", "--health-checking"])
            .args(arguments);
        let mut program = Program::start("epp", command);
        let grpc = program.announced("ext_proc listening on ");
        let health = program.announced("health listening on ");
        let metrics = program.announced("metrics listening on ");
        Self { grpc, health, metrics, program, _config: config }
    }

    /// The text of `/metrics`.
    pub(crate) fn scrape(&self) -> String {
        let (status, page) = http_get(self.metrics, "/metrics").unwrap();
        assert_eq!(status, 200, "{page}");
        page
    }

    /// The sum of a metric's series whose line contains `labels`.
    pub(crate) fn metric(&self, name: &str, labels: &str) -> f64 {
        sum_of(&self.scrape(), name, labels)
    }
}

/// The sum of the series of `name` whose labels contain `labels`.
pub(crate) fn sum_of(page: &str, name: &str, labels: &str) -> f64 {
    page.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels))
        .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// A running Envoy with one of the shipped configurations.
pub(crate) struct Envoy {
    pub(crate) clients: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) program: Program,
    folder: TempDir,
}

impl Envoy {
    /// Starts `deploy/envoy/NAME` with its ports replaced by free ones, its endpoint picker by `epp` and
    /// its pods by `pods`.
    pub(crate) fn start(name: &str, epp: SocketAddr, pods: &[SocketAddr]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/envoy").join(name);
        let text = fs::read_to_string(&shipped).unwrap();
        let pods_file = folder.path().join("pods.yaml");
        let config = replaced(
            &text,
            &[
                ("address: 0.0.0.0, port_value: 8081", "address: 127.0.0.1, port_value: 0"),
                ("port_value: 19000", "port_value: 0"),
                ("port_value: 9002", &format!("port_value: {}", epp.port())),
            ],
        );
        let config = config.replace("deploy/envoy/pods.yaml", pods_file.to_str().unwrap());
        let path = folder.path().join("envoy.yaml");
        fs::write(&path, config).unwrap();
        write_pods(&pods_file, pods);
        let admin_file = folder.path().join("admin");
        let mut command = Command::new(envoy_binary());
        command.arg("-c").arg(&path).arg("--admin-address-path").arg(&admin_file).args([
            "--use-dynamic-base-id",
            "--concurrency",
            "1",
            "--log-level",
            "warn",
        ]);
        let program = Program::start("envoy", command);
        let admin = eventually("envoy's admin address", || {
            let text = fs::read_to_string(&admin_file).map_err(|error| error.to_string())?;
            text.trim().parse::<SocketAddr>().map_err(|error| format!("{text:?}: {error}"))
        });
        let clients = eventually("envoy's listener", || {
            let (_, page) = http_get(admin, "/listeners?format=json").map_err(|e| e.to_string())?;
            listener(&page).ok_or(page)
        });
        let envoy = Self { clients, admin, program, folder };
        eventually("envoy is live", || match http_get(envoy.admin, "/ready") {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        envoy
    }

    /// Replaces the pods, as an operator does: a new file renamed over the old one.
    pub(crate) fn set_pods(&self, pods: &[SocketAddr]) {
        write_pods(&self.folder.path().join("pods.yaml"), pods);
    }

    /// The value of a counter or gauge of Envoy's; 0 if there is none.
    pub(crate) fn stat(&self, name: &str) -> u64 {
        let (_, page) = http_get(self.admin, &format!("/stats?filter=^{name}$")).unwrap();
        page.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.parse().ok())
            .unwrap_or(0)
    }
}

/// Replaces each text once; panics if one is not there, so that the tests follow the shipped files.
#[track_caller]
fn replaced(text: &str, pairs: &[(&str, &str)]) -> String {
    pairs.iter().fold(text.to_owned(), |text, (from, to)| {
        assert_eq!(text.matches(from).count(), 1, "{from:?} in the shipped configuration");
        text.replace(from, to)
    })
}

fn write_pods(path: &Path, pods: &[SocketAddr]) {
    let mut text = String::from(
        "resources:\n  - \"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n    cluster_name: pods\n    endpoints:\n      - lb_endpoints:\n",
    );
    for pod in pods {
        text.push_str(&format!(
            "          - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}\n",
            pod.ip(),
            pod.port()
        ));
    }
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

fn listener(page: &str) -> Option<SocketAddr> {
    let page: Value = serde_json::from_str(page).ok()?;
    let address = &page["listener_statuses"][0]["local_address"]["socket_address"];
    let port = u16::try_from(address["port_value"].as_u64()?).ok()?;
    Some(SocketAddr::new(address["address"].as_str()?.parse().ok()?, port))
}

pub(crate) fn envoy_binary() -> PathBuf {
    let named = std::env::var_os(ENVOY_VARIABLE).map(PathBuf::from);
    // Where `tests/run` puts it, for a plain `cargo test` after it.
    let installed = Path::new(env!("CARGO_BIN_EXE_epp"))
        .ancestors()
        .map(|folder| folder.join("tools/envoy/envoy/_bin/envoy"))
        .find(|path| path.exists());
    named
        .or(installed)
        .unwrap_or_else(|| panic!("no Envoy: run tests/run, or name one in {ENVOY_VARIABLE}"))
}

/// A pod's name, address and labels.
pub(crate) type Labelled<'a> = (&'a str, SocketAddr, &'a [(&'a str, &'a str)]);

/// The endpoints file of `pods`, each with labels.
pub(crate) fn endpoints_yaml(pods: &[Labelled<'_>]) -> String {
    let mut text = String::from("endpoints:\n");
    for (name, address, labels) in pods {
        text.push_str(&format!(
            "- name: {name}\n  address: \"{}\"\n  port: \"{}\"\n",
            address.ip(),
            address.port()
        ));
        if !labels.is_empty() {
            text.push_str("  labels:\n");
            for (key, value) in *labels {
                text.push_str(&format!("    {key}: {value}\n"));
            }
        }
    }
    text
}
