//! A service that is not there, goes away, or keeps silent.

use std::{
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kv_indexer::epp::precise::{
    IndexError,
    remote::{RemoteConfig, RemoteTls, connect},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, rustls};

use super::{
    liar::Liar,
    rig::{BLOCK, MODEL, Picker, Server, config, query, tokens},
    wrong::rows,
};
use crate::support::eventually;

#[test]
fn a_killed_service_is_left_alone_and_taken_up_again() {
    let server = Server::start();
    let prompt = tokens(1, 4);
    let fill = |server: &Server| server.store(&server.row("a", None), &prompt);
    fill(&server);
    let picker = Picker::connected(config(server.address));
    picker.set(&["a"]);
    let query = query(&prompt);
    assert_eq!(picker.depths(&query), Ok(vec![4]));
    let entry =
        picker.index.speculate(&query, &picker.endpoint("a"), Duration::from_secs(60)).unwrap();

    let address = server.kill();
    // Whoever asks hears at once, and soon nobody asks any more.
    eventually("the breaker opens", || match picker.depths(&query) {
        Err(IndexError::Open) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let start = Instant::now();
    for _ in 0..1000 {
        picker.depths(&query).unwrap_err();
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(picker.metric("epp_indexer_breaker_transitions_total{to=\"open\"}") >= 1.0);
    assert!(picker.index.impediments(MODEL)[0].starts_with("no connection to the indexer at http"));
    // Of no effect, and no harm.
    picker.index.take_back(entry);
    assert_eq!(picker.index.speculate(&query, &picker.endpoint("a"), Duration::from_secs(1)), None);

    // Long enough for the longest wait between attempts.
    let away = Instant::now();
    while away.elapsed() < Duration::from_secs(2) {
        picker.depths(&query).unwrap_err();
        thread::yield_now();
    }
    let server = Server::at(address, BLOCK);
    fill(&server);
    let back = Instant::now();
    eventually("scores are back", || match picker.depths(&query) {
        Ok(depths) if depths == [4] => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let took = back.elapsed();
    println!("recovered {took:?} after the service's return");
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(picker.metric("epp_indexer_breaker_state"), 0.0);
    picker.index.extend(entry, Duration::from_secs(1));
}

#[test]
fn a_service_that_comes_late_is_found() {
    let server = Server::start();
    let address = server.kill();
    let picker = Picker::new(config(address));
    picker.set(&["a"]);
    assert_eq!(picker.depths(&query(&tokens(1, 4))), Err(IndexError::Disconnected));
    assert!(picker.index.addressing(MODEL).is_none());
    picker.until("epp_indexer_connections_total{result=\"failed\"}", |failed| failed >= 2.0);
    let server = Server::at(address, BLOCK);
    server.row("a", None);
    picker.until_depths(&query(&tokens(1, 4)), &[0]);
}

#[test]
fn silence_costs_the_deadline_and_opens_the_breaker() {
    let (address, _silent) = Liar::start(rows(), Arc::new(|_| None));
    let deadline = Duration::from_millis(20);
    let picker = Picker::connected(RemoteConfig { deadline, ..config(address) });
    picker.set(&["a"]);
    let query = query(&tokens(1, 4));
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(picker.depths(&query), Err(IndexError::Deadline));
        assert!(start.elapsed() >= deadline);
    }
    assert_eq!(picker.depths(&query), Err(IndexError::Open));
    // One question in a quarter of a second.
    let start = Instant::now();
    let mut asked = 0.0;
    while start.elapsed() < Duration::from_millis(900) {
        match picker.depths(&query) {
            Err(IndexError::Deadline | IndexError::Disconnected) => asked += 1.0,
            other => assert_eq!(other, Err(IndexError::Open)),
        }
    }
    assert!(asked <= start.elapsed().as_secs_f64() / 0.25 + 1.0, "{asked}");
    // A stream that has got stuck is given up.
    picker.until("epp_indexer_connections_total", |made| made >= 2.0);
}

#[test]
fn no_more_than_the_service_reads_is_asked() {
    let (address, _silent) = Liar::start(rows(), Arc::new(|_| None));
    let picker = Picker::connected(RemoteConfig {
        deadline: Duration::from_millis(1500),
        failures: u32::MAX,
        ..config(address)
    });
    picker.set(&["a"]);
    let (query, list) = (query(&tokens(1, 4)), picker.endpoints.list());
    let runtime = crate::support::runtime();
    let outcomes = runtime.block_on(async {
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..300 {
            let (index, query) = (Arc::clone(&picker.index), query.clone());
            let list = Arc::clone(&list);
            calls.spawn(async move { index.score(&query, &list).await.unwrap_err() });
        }
        calls.join_all().await
    });
    let busy = outcomes.iter().filter(|error| **error == IndexError::Busy).count();
    let late = outcomes.iter().filter(|error| **error == IndexError::Deadline).count();
    assert_eq!((busy, late), (44, 256));
    // The ones for which nobody waits any more still count, until the connection is given up.
    picker.until("epp_indexer_questions_in_flight", |waiting| waiting == 0.0);
}

/// TLS in front of a plain service; returns its address and the PEM of its certificate.
fn tls_in_front(
    server: &Server,
    runtime: &tokio::runtime::Runtime,
) -> (std::net::SocketAddr, String) {
    let pair = rcgen::generate_simple_self_signed(["indexer.test".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(pair.signing_key.serialize_der().into());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let (address, plain) = (listener.local_addr().unwrap(), server.address);
    runtime.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let mut inner = acceptor.accept(stream).await.ok()?;
                assert_eq!(inner.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                let mut outer = TcpStream::connect(plain).await.ok()?;
                tokio::io::copy_bidirectional(&mut inner, &mut outer).await.ok()
            });
        }
    });
    (address, pair.cert.pem())
}

#[test]
fn tls_is_spoken_with_whom_it_should_be() {
    let server = Server::start();
    server.store(&server.row("a", None), &tokens(1, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (address, pem) = tls_in_front(&server, &runtime);
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca.pem");
    fs::write(&ca, pem).unwrap();
    let trusted = RemoteTls {
        ca: Some(ca),
        server_name: Some("indexer.test".to_owned()),
        ..RemoteTls::default()
    };
    let anybody = RemoteTls { insecure_skip_verify: true, ..RemoteTls::default() };
    for good in [trusted.clone(), anybody] {
        let picker = Picker::tls(address, good);
        picker.set(&["a"]);
        picker.until_depths(&query(&tokens(1, 4)), &[4]);
    }
    let other_name = RemoteTls { server_name: Some("other.test".to_owned()), ..trusted };
    let picker = Picker::tls(address, other_name);
    eventually("it says why", || {
        let why = picker.index.impediments(MODEL).remove(0);
        if why.contains("certificate") { Ok(()) } else { Err(why) }
    });
}

#[test]
fn what_cannot_be_connected_to_is_refused_at_once() {
    let bad = RemoteConfig { address: "indexer".to_owned(), ..config(([127, 0, 0, 1], 1).into()) };
    let error =
        connect(bad, &Arc::default(), &prometheus::Registry::new()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("host:port"), "{error:#}");
}
