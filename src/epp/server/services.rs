//! Which gRPC service a call goes to.

use std::{convert::Infallible, future::Future, pin::Pin};

use http::{Request, Response};
use hyper::body::Incoming;
use tonic::{
    Status,
    codec::CompressionEncoding,
    codegen::{Body, Service as _, StdError},
};

use crate::{
    epp::server::health::{Health, HealthService},
    proto::{
        ext_proc::external_processor_server::{self, ExternalProcessor, ExternalProcessorServer},
        health::health_server::{self, HealthServer},
    },
};

/// Limits of gRPC messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcOptions {
    /// Largest message that is accepted, in bytes, after decompression. Envoy sends whole bodies in
    /// one message, so gRPC's usual 4 MB would fail requests with images or long documents. A larger
    /// message ends its stream with `OUT_OF_RANGE`.
    pub max_receive_bytes: usize,
    /// Largest message that is sent, in bytes.
    pub max_send_bytes: usize,
}

impl Default for GrpcOptions {
    fn default() -> Self {
        Self { max_receive_bytes: 64 << 20, max_send_bytes: usize::MAX }
    }
}

type Answer = Response<tonic::body::Body>;

/// The future of an answer.
pub type Answering = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

/// The services of a listener: `ext_proc`, health, or both. Another service or method is answered
/// with `UNIMPLEMENTED`.
///
/// # Cost
///
/// One comparison of the path and a few reference counts a call; there is no router.
#[derive(Debug)]
pub struct Services<P> {
    process: Option<ExternalProcessorServer<P>>,
    health: Option<HealthServer<HealthService>>,
}

impl<P> Clone for Services<P> {
    fn clone(&self) -> Self {
        Self { process: self.process.clone(), health: self.health.clone() }
    }
}

impl<P: ExternalProcessor> Services<P> {
    /// `ext_proc` by `processor`, and health too if one is given (`--health-checking`). Compressed
    /// (gzip) messages are accepted; answers are not compressed.
    #[must_use]
    pub fn new(processor: P, options: GrpcOptions, health: Option<Health>) -> Self {
        let process = ExternalProcessorServer::new(processor)
            .max_decoding_message_size(options.max_receive_bytes)
            .max_encoding_message_size(options.max_send_bytes)
            .accept_compressed(CompressionEncoding::Gzip);
        Self { process: Some(process), health: health.map(health_server) }
    }
}

impl Services<super::null::Null> {
    /// Health alone, for the health listener.
    #[must_use]
    pub fn health(health: Health) -> Self {
        Self { process: None, health: Some(health_server(health)) }
    }
}

/// A health request names a service: a few dozen bytes.
fn health_server(health: Health) -> HealthServer<HealthService> {
    HealthServer::new(HealthService::new(health)).max_decoding_message_size(64 << 10)
}

impl<P: ExternalProcessor> Services<P> {
    /// Answers a call, whatever its body comes from.
    pub fn call<B>(&self, request: Request<B>) -> Answering
    where
        B: Body + Send + 'static,
        B::Error: Into<StdError> + Send + 'static,
    {
        // `/package.Service/Method`
        let service = request.uri().path().get(1..).and_then(|path| path.split('/').next());
        let service = service.unwrap_or_default();
        if service == external_processor_server::SERVICE_NAME
            && let Some(process) = &self.process
        {
            return process.clone().call(request);
        }
        if service == health_server::SERVICE_NAME
            && let Some(health) = &self.health
        {
            return health.clone().call(request);
        }
        let unknown = Status::unimplemented(format!("no service {service:?} here"));
        Box::pin(std::future::ready(Ok(unknown.into_http())))
    }
}

impl<P: ExternalProcessor> hyper::service::Service<Request<Incoming>> for Services<P> {
    type Response = Answer;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        Services::call(self, request)
    }
}
