//! The endpoint picker in front of mock engines: behind real Envoy, and asked by a plain client.

mod hermetic;
mod http;
mod path;
mod proxy;
mod resilience;
mod rig;
