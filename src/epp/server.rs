//! The listeners of the endpoint picker: gRPC over HTTP/2 and TLS, health, operators' pages.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`listen`] | TCP connections → HTTP/2 on threads of their own, limits, drain |
//! | [`health`] | `grpc.health.v1` |
//! | [`admin`] | `/metrics` and `/debug/…` |
//! | [`null`] | an `ext_proc` service that decides nothing: the yardstick |
//!
//! What an exchange is about is none of their business: [`Services`] takes any implementation of the
//! generated trait.

pub mod admin;
pub mod health;
pub mod listen;
pub mod null;
mod services;

pub use self::{
    listen::{ConnectionMetrics, ServerOptions, serve},
    services::{Answering, GrpcOptions, Services},
};

#[cfg(test)]
mod tests;
