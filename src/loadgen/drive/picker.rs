//! Envoy's part towards an endpoint picker, as a client: ask, then tell how the answer goes on.

use std::net::SocketAddr;

use bytes::Bytes;

use super::Failure;

/// Connections to one endpoint picker, for one thread.
#[derive(Debug)]
pub struct Picker {}

/// An exchange that has been routed and goes on.
#[derive(Debug)]
pub struct Routed {
    /// Where the request goes.
    pub pod: SocketAddr,
}

/// What the endpoint picker said at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Tokens that it expected in the pod's cache.
    pub predicted_tokens: Option<u32>,
    /// Tokens that the pod reported, as the endpoint picker read it.
    pub actual_tokens: Option<u32>,
}

impl Picker {
    /// Connects in the background; a picker that is not there shows at the first request.
    ///
    /// # Errors
    ///
    /// An address that cannot be one.
    pub fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let _ = address;
        anyhow::bail!("not built yet")
    }

    /// Asks where a request goes.
    ///
    /// # Errors
    ///
    /// [`Failure::Refused`] and [`Failure::Picker`].
    pub async fn pick(&self, path: &str, id: &str, body: &[Bytes]) -> Result<Routed, Failure> {
        let (_, _, _) = (path, id, body);
        Err(Failure::Picker)
    }
}

impl Routed {
    /// Tells that the answer's head is there.
    pub fn headers(&mut self, status: u16, content_type: &str) {
        let (_, _) = (status, content_type);
    }

    /// Passes on a piece of the answer.
    pub fn piece(&mut self, piece: &Bytes) {
        let _ = piece;
    }

    /// Tells that the answer is complete, and waits for what the endpoint picker makes of it.
    pub async fn end(self) -> Prediction {
        Prediction::default()
    }
}
