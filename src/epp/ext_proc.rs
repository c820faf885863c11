//! The protocol between Envoy and us: one state machine per HTTP exchange, no sockets.

pub mod headers;
