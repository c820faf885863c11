//! `grpc.health.v1`: whether to send us traffic.
//!
//! Without leader election every name gets the same kind of answer, known or not, as in the Go EPP;
//! only the readiness of plugins counts for fewer names. `Watch` is not implemented there either.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio_stream::Empty;
use tonic::{Request, Response, Status};

use crate::proto::{
    ext_proc::external_processor_server::SERVICE_NAME as EXT_PROC,
    health::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus, health_server,
    },
};

/// The names that clients ask for: the whole server, the probes of Kubernetes, Envoy's cluster.
pub const NAMES: [&str; 4] = ["", "liveness", "readiness", EXT_PROC];

/// What health depends on. Clones share one state; it starts as not serving.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<State>);

#[derive(Debug, Default)]
struct State {
    synced: AtomicBool,
    plugins_ready: AtomicBool,
    draining: AtomicBool,
}

impl Health {
    /// Not serving yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says whether the endpoints of the pool are known.
    pub fn set_synced(&self, synced: bool) {
        self.0.synced.store(synced, Ordering::Release);
    }

    /// Says whether all plugins can work. Without it `liveness` is served all the same.
    pub fn set_plugins_ready(&self, ready: bool) {
        self.0.plugins_ready.store(ready, Ordering::Release);
    }

    /// From now on not serving, for good.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    /// Is this service served?
    #[must_use]
    pub fn is_serving(&self, service: &str) -> bool {
        let needs_plugins = matches!(service, "" | "readiness" | EXT_PROC);
        self.0.synced.load(Ordering::Acquire)
            && (!needs_plugins || self.0.plugins_ready.load(Ordering::Acquire))
            && !self.0.draining.load(Ordering::Acquire)
    }

    fn answer(&self, service: &str) -> HealthCheckResponse {
        let status = if self.is_serving(service) {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        HealthCheckResponse { status: status.into() }
    }
}

/// The gRPC service that tells a [`Health`].
#[derive(Clone, Debug)]
pub struct HealthService(Health);

impl HealthService {
    /// Tells `health`.
    #[must_use]
    pub fn new(health: Health) -> Self {
        Self(health)
    }
}

#[tonic::async_trait]
impl health_server::Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(self.0.answer(&request.get_ref().service)))
    }

    async fn list(
        &self,
        _: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        let statuses = NAMES.map(|name| (name.to_owned(), self.0.answer(name))).into();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = Empty<Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("Watch is not implemented"))
    }
}
