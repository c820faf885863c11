//! The endpoint picker: an Envoy `ext_proc` server that chooses the pod for each inference request,
//! compatible with the Go EPP of llm-d and the Gateway API Inference Extension.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`ext_proc`] | the protocol: one state machine per HTTP exchange, no sockets |
//! | [`request`] | what a request asks for: one lazy scan of its body |
//! | [`director`] | a whole request → a routing answer or a refusal |
//! | [`scheduling`] | the scheduling cycle and what a plugin can be |
//! | [`plugins`] | the plugins, one a file, and their registry |
//! | [`datalayer`] | the endpoints and what is known of their load |
//! | [`args`] | the command line, in the Go EPP's spellings |
//! | [`command`] | the program, from the command line to the exit status |
//! | [`config`] | `EndpointPickerConfig` → plugins and profiles |
//! | [`metrics`] | what is counted, under the names of the Go EPP |
//! | [`server`] | the listeners: gRPC over HTTP/2, TLS, health, operators' pages |
//!
//! Data flows one way: `ext_proc` → `director` → `scheduling` → `plugins`, which read the
//! `datalayer`.

pub mod args;
pub mod command;
pub mod config;
pub mod datalayer;
pub mod director;
pub mod ext_proc;
pub mod metrics;
pub mod plugins;
pub mod precise;
pub mod request;
pub mod run;
pub mod scheduling;
pub mod server;
pub mod service;
