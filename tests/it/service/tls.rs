//! The gRPC API over TLS, asked by `kv-indexer explain`.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use clap::Parser as _;
use kv_indexer::{
    indexer::explain::Explain,
    support::tls::{Certificate, ClientTls, ReloadMetrics, TlsOptions, client_config},
};
use prometheus::IntCounter;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tokio_util::sync::CancellationToken;

use super::{
    PATIENCE,
    fake::{WordLengths, World, config, keys},
};

/// Writes a self-signed pair for `name`, and returns the certificate's path.
fn write_pair(directory: &Path, name: &str) -> String {
    let pair = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    fs::write(directory.join("tls.key"), pair.signing_key.serialize_pem()).unwrap();
    fs::write(directory.join("tls.crt"), pair.cert.pem()).unwrap();
    directory.join("tls.crt").to_str().unwrap().to_owned()
}

/// Status, output and errors of `kv-indexer explain` about a prompt of words, on a thread of its own.
async fn explain(line: &str, prompt: &str) -> (u8, String, String) {
    let (line, prompt) = (line.to_owned(), prompt.to_owned());
    let run = move || {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), prompt).unwrap();
        let words = format!("explain --model llama --prompt-file {}", file.path().display());
        let words = words.split(' ').chain(line.split(' ')).map(str::to_owned);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = Explain::try_parse_from(words).unwrap().run(&mut out, &mut err);
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test]
async fn explain_speaks_to_a_server_with_tls() {
    let directory = tempfile::tempdir().unwrap();
    let ca = write_pair(directory.path(), "localhost");
    let clients = tempfile::tempdir().unwrap();
    let client = write_pair(clients.path(), "router");
    let other = tempfile::tempdir().unwrap();
    let wrong = write_pair(other.path(), "localhost");

    let mut world = World::with(config(), Some(Arc::new(WordLengths))).await;
    let row = world.row("a", None);
    world.index.hold(row.slot, &keys(&[1, 2, 3, 4]), 0);
    let options =
        TlsOptions { cert_path: Some(directory.path().to_owned()), ..TlsOptions::default() };
    let at = world.listen_tls(&options, Certificate::new(&options).unwrap()).await;
    // A peer that says nothing holds up nobody.
    let _silent = TcpStream::connect(at).await.unwrap();
    let server = format!("--pod a --server https://localhost:{}", at.port());
    let good = format!("{server} --tls-ca {ca}");

    let (status, out, err) = explain(&good, "a bb ccc dddd").await;
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("a: score 1, 1 blocks, 1 of them by events (gpu 1), live"), "{out}");
    assert!(out.contains("* the pod holds all 1 blocks"), "{out}");
    let (status, out, _) = explain(&good, "a bb ccc dddd e f g h").await;
    assert_eq!(status, 2);
    assert!(out.contains("first missing block: 1; held by nobody"), "{out}");
    let (status, ..) = explain(&format!("{good} --token-ids"), "[1, 2,3 4]").await;
    assert_eq!(status, 0);
    let (status, _, err) = explain(&format!("{good} --token-ids"), "[1, x]").await;
    assert!(status == 1 && err.contains("\"x\" is no token id"), "{err}");
    let (status, _, err) = explain(&format!("{good} --chat"), "{}").await;
    assert!(status == 1 && err.contains("chat_json: no messages"), "{err}");

    let any = format!("{server} --tls-insecure-skip-verify --tls-server-name elsewhere");
    assert_eq!(explain(&any, "a bb ccc dddd").await.0, 0);
    for bad in [
        format!("{server} --tls-ca {wrong}"),
        format!("{good} --tls-server-name elsewhere"),
        format!("--pod a --server localhost:{}", at.port()),
    ] {
        let (status, _, err) = explain(&bad, "a bb ccc dddd").await;
        assert!(status == 1 && err.starts_with("kv-indexer: explain: "), "{bad}: {err}");
    }

    let options = TlsOptions { client_ca: Some(client.clone().into()), ..options };
    let at = world.listen_tls(&options, Certificate::new(&options).unwrap()).await;
    let nobody = format!("--pod a --server https://localhost:{} --tls-ca {ca}", at.port());
    assert_eq!(explain(&nobody, "a bb ccc dddd").await.0, 1);
    let key = clients.path().join("tls.key");
    let known = format!("{nobody} --tls-cert {client} --tls-key {}", key.display());
    let (status, _, err) = explain(&known, "a bb ccc dddd").await;
    assert_eq!(status, 0, "{err}");
    world.shut_down().await.unwrap();
}

#[tokio::test]
async fn a_changed_certificate_is_shown_to_new_connections() {
    let directory = tempfile::tempdir().unwrap();
    write_pair(directory.path(), "localhost");
    let mut world = World::start().await;
    let options =
        TlsOptions { cert_path: Some(directory.path().to_owned()), ..TlsOptions::default() };
    let certificate = Certificate::new(&options).unwrap();
    let at = world.listen_tls(&options, certificate.clone()).await;
    let counter = |name: &str| IntCounter::new(name, name).unwrap();
    let metrics = ReloadMetrics { loaded: counter("loaded"), failed: counter("failed") };
    let stop = CancellationToken::new();
    let mut following = tokio::task::JoinSet::new();
    following.spawn(certificate.follow(metrics.clone(), stop.clone()));
    let first = shown(at).await;
    assert_eq!(shown(at).await, first);
    write_pair(directory.path(), "localhost");
    tokio::time::timeout(PATIENCE, async {
        while shown(at).await == first {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(metrics.loaded.get(), 1);
    stop.cancel();
    following.join_next().await.unwrap().unwrap().unwrap();
}

/// The certificate that a new connection sees.
async fn shown(at: SocketAddr) -> Vec<u8> {
    let any = ClientTls { insecure_skip_verify: true, ..ClientTls::default() };
    let connector = TlsConnector::from(Arc::new(client_config(&any, &[b"h2"]).unwrap()));
    let stream = TcpStream::connect(at).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}
