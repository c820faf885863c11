//! Compiles `proto/` with protox, so that no machine needs protoc.

use std::{env, error::Error, fs, path::PathBuf};

/// Our services and llm-d's: served with reflection.
const SERVED: [&str; 2] = ["proto/kvindexer/v1/kvindexer.proto", "proto/indexer/v1/indexer.proto"];
/// Envoy's protocol, cut down to what the endpoint picker speaks.
const ENVOY: &str = "proto/envoy/service/ext_proc/v3/external_processor.proto";
/// gRPC's health protocol as the endpoint picker serves it: with `List`.
const HEALTH: &str = "proto/grpc/health/v1/health.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(SERVED, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(&out, prost_bytes(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    let envoy = protox::compile([ENVOY], ["proto"])?;
    // Bodies of megabytes are passed on as they came, without a copy.
    tonic_prost_build::configure().bytes(".").compile_fds(envoy)?;
    tonic_prost_build::configure().compile_fds(protox::compile([HEALTH], ["proto"])?)?;
    Ok(())
}

fn prost_bytes(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}
