//! Compiles `proto/` with protox, so that no machine needs protoc.

use std::{env, error::Error, fs, path::PathBuf};

const PROTOS: [&str; 2] = ["proto/kvindexer/v1/kvindexer.proto", "proto/indexer/v1/indexer.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(&out, prost_bytes(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}

fn prost_bytes(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}
