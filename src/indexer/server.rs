//! The gRPC listener: services, health, reflection, limits, drain.

use std::{sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch};
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    indexer::{metrics::ServerMetrics, service::Service},
    proto::{
        DESCRIPTORS,
        kvindexer::kv_indexer_server::{self, KvIndexerServer},
        llmd::indexer_service_server::{self, IndexerServiceServer},
    },
    support::access::Access,
};

pub(crate) mod gate;
pub(crate) mod guard;
mod tls;

use self::{
    gate::{Admitting, Gate, Limits},
    guard::Guarded,
    tls::TlsIncoming,
};

/// The services that health answers for; the empty name is the server as a whole.
const NAMES: [&str; 3] =
    ["", kv_indexer_server::SERVICE_NAME, indexer_service_server::SERVICE_NAME];

/// A connection silent for this long is pinged, and given up when the answer takes as long again:
/// a router that vanished without a FIN must not hold streams for ever.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Bytes of a request's headers at most: a token, trace contexts, and room.
const HEADERS: u32 = 16 << 10;

/// HTTP/2 window of a stream, in bytes: a message of a million tokens should not need sixty round
/// trips.
const STREAM_WINDOW: u32 = 1 << 20;

/// HTTP/2 window of a connection, in bytes. The h2 crate ends a connection whose unread DATA frames
/// of less than 256 bytes waste more than half of this, at 256 bytes a frame. A client that fills a
/// stream's window with small requests and reads no answers is to be held back instead: with 4 MiB
/// it was cut off at requests of 20 bytes, with 16 MiB it is not.
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Who is let in, and where refusals are counted.
#[derive(Clone, Debug)]
pub struct Protection {
    /// Who may make the calls that are not for everybody.
    pub access: Access,
    /// Connections and refusals.
    pub metrics: ServerMetrics,
}

/// [`serve_protected`], with all calls for everybody and nothing counted.
///
/// # Errors
///
/// When the transport fails.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    service: Service,
    ready: watch::Receiver<bool>,
    stop: CancellationToken,
    drain: Duration,
) -> anyhow::Result<()> {
    let metrics = ServerMetrics::register(&Registry::new())?;
    let protection = Protection { access: Access::Everybody, metrics };
    serve_protected(listener, tls, service, protection, ready, stop, drain).await
}

/// Serves both APIs on `listener`, over TLS if `tls` is given, until `stop`, then ends streams and lets other calls in flight end
/// for at most `drain`.
///
/// Health is SERVING for all names while `ready` is true. Set it to false some time before `stop`,
/// so that load balancers notice.
///
/// # Errors
///
/// When the transport fails.
pub async fn serve_protected(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    service: Service,
    protection: Protection,
    ready: watch::Receiver<bool>,
    stop: CancellationToken,
    drain: Duration,
) -> anyhow::Result<()> {
    let (reporter, health_server) = tonic_health::server::health_reporter();
    let now = *ready.borrow();
    report(&reporter, now).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let (limit, calls) =
        (service.config().max_message_bytes, service.config().max_concurrent_calls);
    let ours = KvIndexerServer::new(service.clone())
        .max_decoding_message_size(limit)
        .max_encoding_message_size(limit);
    let llmd = IndexerServiceServer::new(service.clone())
        .max_decoding_message_size(limit)
        .max_encoding_message_size(limit);
    let server = Server::builder()
        .max_concurrent_streams(calls)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let routes = Routes::new(health_server)
        .add_service(reflection)
        .add_service(ours)
        .add_service(llmd)
        .prepare();
    let Protection { access, metrics } = protection;
    let gate = Gate::new(Limits::from(service.config()), metrics.clone());
    let guarded = Guarded::new(routes, access, metrics);
    let tcp = TcpIncoming::from(listener).with_nodelay(Some(true));
    let incoming = Admitting::new(tcp, gate);
    let closing = async {
        stop.cancelled().await;
        service.close();
    };
    let serving = async {
        match tls {
            None => server.serve_with_incoming_shutdown(guarded, incoming, closing).await,
            Some(tls) => {
                let incoming = TlsIncoming::new(incoming, tls);
                server.serve_with_incoming_shutdown(guarded, incoming, closing).await
            }
        }
    };
    let health = watch_health(reporter, ready, stop.clone());
    // Half of the drain, so that the stages behind this one have theirs.
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(drain / 2).await;
    };
    tokio::select! {
        (served, ()) = async { tokio::join!(serving, health) } => served?,
        // A peer that holds a connection open, idle or deaf to GOAWAY, is no fault of ours.
        () = late => tracing::warn!("Connections that did not close were cut."),
    }
    if tokio::time::timeout(drain / 4, service.drained()).await.is_err() {
        tracing::warn!("Streams that did not end were cut.");
    }
    Ok(())
}

async fn report(reporter: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// Follows `ready` until `stop`, then ends the health watches, which would outlast any drain.
async fn watch_health(
    mut reporter: HealthReporter,
    mut ready: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    loop {
        let now = *ready.borrow_and_update();
        report(&reporter, now).await;
        let changed = async {
            if ready.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = changed => {}
        }
    }
    report(&reporter, false).await;
    for name in NAMES {
        reporter.clear_service_status(name).await;
    }
}
