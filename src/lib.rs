//! Precise prefix-cache routing for LLM fleets: `kv-indexer`, `epp` and `loadgen`.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`model`] | identities, keys and states |
//! | [`hash`] | tokens → request keys |
//! | [`wire`] | KV-event batches of vLLM and SGLang → events |
//! | [`index`] | which pod holds which block |
//! | [`ingest`] | ZeroMQ streams → index, and what each pod's answer can be trusted for |
//! | [`tokenize`] | text and chats → token ids |
//! | [`indexer`] | the service: configuration, gRPC, HTTP admin |
//! | [`epp`] | the endpoint picker: Envoy ext_proc, scheduling, plugins |
//! | [`loadgen`] | the load driver |
//! | [`support`] | configuration reading, telemetry, supervisor, admin server |
//!
//! ARCHITECTURE.md has the data flow and the invariants.

pub mod epp;
pub mod hash;
pub mod index;
pub mod indexer;
pub mod ingest;
pub mod loadgen;
pub mod model;
pub mod proto;
pub mod support;
pub mod tokenize;
pub mod wire;
