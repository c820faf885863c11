//! The mock engine of `loadgen::engine`, over its real sockets.

mod client;
mod http;
mod indexed;
mod process;
mod words;
