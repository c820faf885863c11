//! Generated gRPC code of `proto/`; the comments there are the API reference.

#![expect(missing_docs, clippy::all, clippy::allow_attributes, reason = "generated code")]

/// Package `kvindexer.v1`: the score API.
pub mod kvindexer {
    tonic::include_proto!("kvindexer.v1");
}

/// Package `indexer.v1`: llm-d's API.
pub mod llmd {
    tonic::include_proto!("indexer.v1");
}

/// Package `envoy.service.ext_proc.v3`: what the endpoint picker speaks of Envoy's protocol.
pub mod ext_proc {
    tonic::include_proto!("envoy.service.ext_proc.v3");
}

/// Package `grpc.health.v1`: gRPC's health protocol with `List`, which `tonic-health` lacks.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// The encoded `FileDescriptorSet` of both score APIs, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
