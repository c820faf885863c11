//! Real Envoy, with the shipped configuration.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::{child::Child, page};

/// What operators are given.
const SHIPPED: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/envoy/recommended.yaml"));

/// A running Envoy. Its files go with it.
#[derive(Debug)]
pub(super) struct Envoy {
    /// Where clients connect.
    pub(super) clients: SocketAddr,
    /// Envoy itself; the child is what ends it with us.
    pub(super) pid: u32,
    pub(super) child: Child,
    _folder: TempDir,
}

/// Finds Envoy: the given path, or `envoy` among the folders of `PATH`.
///
/// # Errors
///
/// When there is none.
pub fn find(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        ensure!(path.is_file(), "no Envoy at {}", path.display());
        return Ok(path.to_owned());
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders)
        .map(|folder| folder.join("envoy"))
        .find(|path| path.is_file())
        .context("no envoy on PATH: name one with --envoy")
}

impl Envoy {
    /// Starts it in front of these pods, and waits until it asks the endpoint picker. `program` is this
    /// one.
    pub(super) async fn start(
        program: &Path,
        envoy: &Path,
        ext_proc: SocketAddr,
        pods: &[SocketAddr],
        patience: Duration,
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("a temporary folder for Envoy")?;
        let pods_file = folder.path().join("pods.yaml");
        let config_file = folder.path().join("envoy.yaml");
        let admin_file = folder.path().join("admin");
        fs::write(&pods_file, pods_yaml(pods))?;
        fs::write(&config_file, configuration(ext_proc, &pods_file)?)?;
        let arguments = [
            "component".as_ref(),
            "guard".as_ref(),
            "--".as_ref(),
            envoy.as_os_str(),
            "-c".as_ref(),
            config_file.as_os_str(),
            "--admin-address-path".as_ref(),
            admin_file.as_os_str(),
            // Several may run on a machine, and none of them hands over to another.
            "--disable-hot-restart".as_ref(),
            "--concurrency".as_ref(),
            "1".as_ref(),
            "--log-level".as_ref(),
            "warn".as_ref(),
        ];
        let mut child = Child::start("envoy", program, arguments)?;
        let pid = child.announced("pid ", patience).await?;
        let deadline = Instant::now() + patience;
        loop {
            let error = match state(&admin_file, pods.len()).await {
                Ok(clients) => return Ok(Self { clients, pid, child, _folder: folder }),
                Err(error) => error,
            };
            if let Some(last_words) = child.last_words().await {
                bail!(last_words);
            }
            if Instant::now() >= deadline {
                let late = format!("envoy is not ready within {patience:?}{}", child.quote());
                return Err(error.context(late));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Where clients connect, once it is live and knows its pods and the endpoint picker.
async fn state(admin_file: &Path, pods: usize) -> Result<SocketAddr> {
    let admin = fs::read_to_string(admin_file).context("no admin address")?;
    let admin: SocketAddr = admin.trim().parse().with_context(|| format!("admin {admin:?}"))?;
    let live = page(admin, "/ready").await?;
    ensure!(live.starts_with("LIVE"), "{live:?}");
    // Only an endpoint picker that passed a health check is asked; until then requests go anywhere.
    let healthy = page(admin, "/stats?filter=membership_healthy").await?;
    for (name, count) in [("endpoint-picker", 1), ("pods", pods)] {
        let line = format!("cluster.{name}.membership_healthy: {count}");
        ensure!(healthy.lines().any(|it| it == line), "{healthy:?} has no {line:?}");
    }
    let listeners = page(admin, "/listeners?format=json").await?;
    listener(&listeners).with_context(|| format!("no listener in {listeners:?}"))
}

fn listener(page: &str) -> Option<SocketAddr> {
    let page: Value = serde_json::from_str(page).ok()?;
    let address = page.pointer("/listener_statuses/0/local_address/socket_address")?.as_object()?;
    let port = u16::try_from(address.get("port_value")?.as_u64()?).ok()?;
    Some(SocketAddr::new(address.get("address")?.as_str()?.parse().ok()?, port))
}

/// The shipped configuration with free ports, this endpoint picker and this file of pods.
fn configuration(ext_proc: SocketAddr, pods_file: &Path) -> Result<String> {
    let picker = format!("address: {}, port_value: {}", quoted(ext_proc), ext_proc.port());
    let pods_file = format!("path: {:?}", pods_file.display().to_string());
    let pairs = [
        ("address: 0.0.0.0, port_value: 8081", "address: 127.0.0.1, port_value: 0"),
        ("port_value: 19000", "port_value: 0"),
        ("address: 127.0.0.1, port_value: 9002", &picker),
        ("path: deploy/envoy/pods.yaml", &pods_file),
    ];
    pairs.into_iter().try_fold(SHIPPED.to_owned(), |text, (from, to)| {
        ensure!(text.matches(from).count() == 1, "{from:?} is not once in the configuration");
        Ok(text.replace(from, to))
    })
}

fn quoted(address: SocketAddr) -> String {
    format!("\"{}\"", address.ip())
}

fn pods_yaml(pods: &[SocketAddr]) -> String {
    let mut text = String::from(
        "resources:\n  - \"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n    cluster_name: pods\n    endpoints:\n      - lb_endpoints:\n",
    );
    for pod in pods {
        text.push_str(&format!(
            "          - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}\n",
            quoted(*pod),
            pod.port()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_configuration_can_be_adapted() {
        let picker = "127.0.0.1:4711".parse().unwrap();
        let text = configuration(picker, Path::new("/tmp/a/pods.yaml")).unwrap();
        for part in ["\"127.0.0.1\", port_value: 4711", "path: \"/tmp/a/pods.yaml\""] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        let config: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(config["admin"]["address"]["socket_address"]["port_value"], 0);
        let pods: Value = serde_saphyr::from_str(&pods_yaml(&[picker, picker])).unwrap();
        let first = &pods["resources"][0]["endpoints"][0]["lb_endpoints"];
        assert_eq!(first.as_array().unwrap().len(), 2);
    }
}
