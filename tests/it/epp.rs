//! The endpoint picker in front of mock engines: behind real Envoy, and asked by a plain client.

mod hermetic;
mod http;
mod path;
mod precise;
mod process;
mod proxy;
mod raw;
mod resilience;
pub(crate) mod rig;
