//! ZeroMQ frames as received, without a copy.

use std::{fmt, ops::Deref};

/// One frame of a multipart message.
pub(crate) struct Frame(zmq::Message);

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} bytes)", self.len())
    }
}

/// More frames than any message of ours has; the rest of a longer one is dropped.
const MOST: usize = 5;

/// Receives one multipart message without waiting.
///
/// # Errors
///
/// libzmq's; `EAGAIN` when there is none.
pub(crate) fn receive(socket: &zmq::Socket) -> zmq::Result<Vec<Frame>> {
    let mut frames = Vec::with_capacity(4);
    loop {
        let mut frame = zmq::Message::new();
        socket.recv(&mut frame, zmq::DONTWAIT)?;
        let more = frame.get_more();
        if frames.len() < MOST {
            frames.push(Frame(frame));
        }
        if !more {
            return Ok(frames);
        }
    }
}
