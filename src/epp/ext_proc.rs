//! The protocol between Envoy and us: one state machine per HTTP exchange, no sockets.
//!
//! Messages of one gRPC stream go in, replies come out; what needs the picker comes out as an
//! [`Ask`], which the caller answers before it passes the next message on. The machine knows no
//! socket, no runtime and no clock.
//!
//! # Model
//!
//! A request and its response are two conversations that do not know each other; what the first
//! leaves to the second is which model name to write back. For each Envoy says in its first message
//! how it sends the body:
//!
//! | mode | request | response |
//! | --- | --- | --- |
//! | `FULL_DUPLEX_STREAMED`, nothing said, `GRPC` | no reply until the body is whole; then headers, the body in chunks of at most 62 000 bytes, trailers if there were any | headers at once; events chunk by chunk; anything else once it is whole |
//! | `BUFFERED`, `BUFFERED_PARTIAL` | headers at once, only without what steers; the routing is in the reply to the body, which Envoy applies to the headers too | one reply, with a body only if it changed |
//! | `STREAMED` | routed by the headers alone (they leave Envoy with their reply); every chunk is answered "unchanged" | one reply per chunk |
//! | `NONE` | routed by the headers alone | headers only |
//!
//! The end of a body is the flag, on a message with bytes or on an empty one (Envoy 1.40 always
//! sends an empty one), or trailers. What comes after it is ignored.
//!
//! # Invariants
//!
//! * Headers are answered once, before their body; a body's end is said once, and nothing follows.
//! * In duplex mode what goes out is what came in, whatever the pieces, but for rewritten names and the
//!   usage that the client did not ask for ([`Routed::hides_usage`]). Of the latter nobody hears if the
//!   response is a stream; a response with trailers in `STREAMED` mode loses an event without an end.
//! * After an immediate response there is no reply. There is none once response headers were
//!   answered: Envoy would have to cut the response off.
//! * No message, in any order, makes it panic. A stream may begin with the response.
//!
//! # What Envoy does with a reply
//!
//! As read in its source (`ext_proc/{processor_state,mutation_utils}.cc`, `mutation_rules.cc`):
//!
//! * A header is overwritten unless `append` or `append_action` asks otherwise; we send neither.
//!   Removals come before settings. Removing what is not there does nothing.
//! * Unless its rules say otherwise it refuses to set or remove `host`, `:authority`, `:method`,
//!   `:scheme` and `x-envoy-*`: counted as `rejected_header_mutations` and else ignored. Removing
//!   any `:` header or `host` is refused. One invalid character in a name or value makes it refuse
//!   the whole reply and fail the request, so such a header is left out here.
//! * `content-length` is taken off the message in every mode but `BUFFERED`, and ignored among the
//!   headers to set. In `BUFFERED` mode a rewritten body needs it: if it differs from the body's
//!   length the request fails.
//! * Headers may be set in the reply to a body in `BUFFERED` mode only. `streamed_response` is
//!   accepted in duplex mode only, where a plain body mutation is refused.
//! * `clear_route_cache` counts only in a reply that changes headers.
//! * Trailers that came without any body: a body reply would be a fault, so there is none.
//!
//! # Differences to the Go EPP
//!
//! * Only headers that change are set; Go sets every header of the client anew, pseudo headers
//!   included, which Envoy counts as rejected.
//! * `Content-Length` is set if the body was rewritten, else only with
//!   [`ExchangeConfig::always_content_length`].
//! * The headers that steer a pod's sidecar are removed from what a client sent.
//! * Trailers end a body; Go never answers such a request.
//! * A subset hint may be a string with commas, as the protocol's text says. Go reads only a list.
//! * The modes other than duplex are served. Go answers all of them as duplex.
//! * Model names and usage that are split across chunks are seen.
//! * A body beyond [`ExchangeConfig::max_body_bytes`] is refused with 413; Go keeps any.
//! * A response beyond [`ExchangeConfig::max_response_bytes`] is passed on as it comes; Go keeps any.
//! * Response bodies without response headers (Envoy told to skip them) are passed on.
//!
//! # Cost
//!
//! A body that comes as one message is not copied, neither for the picker nor on its way out; one
//! in several is joined once. An untouched response chunk costs two searches and its reply.

mod ask;
mod body;
mod exchange;
pub mod fuzz;
pub mod headers;
mod remove_usage;
mod reply;
mod restore;
#[cfg(test)]
mod tests;
mod usage;

pub use self::{
    ask::{Ask, ExchangeConfig, Facts, Inbound, Phase, RewrittenBody, Routed},
    exchange::Exchange,
    reply::Replies,
    usage::Usage,
};
