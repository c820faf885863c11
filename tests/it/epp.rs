//! The endpoint picker behind real Envoy, in front of mock engines.

mod http;
mod path;
mod resilience;
mod rig;
