//! ZeroMQ frames as received.

use std::{fmt, net::IpAddr, ops::Deref};

use crate::ingest::peers;

/// libzmq reads into buffers of this many bytes, and a message that lies in one keeps all of it.
/// Smaller frames are copied out, so that what is queued costs what it weighs.
const BUFFER: usize = 8192;

/// One frame of a multipart message.
pub(crate) enum Frame {
    /// Copied.
    Small(Box<[u8]>),
    /// As libzmq has it.
    Large(zmq::Message),
}

impl From<zmq::Message> for Frame {
    fn from(message: zmq::Message) -> Self {
        if message.len() < BUFFER { Self::Small((*message).into()) } else { Self::Large(message) }
    }
}

impl Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Large(message) => message,
        }
    }
}

impl AsRef<[u8]> for Frame {
    fn as_ref(&self) -> &[u8] {
        self
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
    receive_noting(socket, |_| {})
}

/// The same with the address of the peer, if the transport has addresses.
///
/// # Errors
///
/// As [`receive`].
pub(crate) fn receive_with_peer(socket: &zmq::Socket) -> zmq::Result<(Vec<Frame>, Option<IpAddr>)> {
    let mut peer = None;
    let note =
        |first: &mut zmq::Message| peer = first.gets("Peer-Address").and_then(peers::address);
    Ok((receive_noting(socket, note)?, peer))
}

fn receive_noting(
    socket: &zmq::Socket,
    mut note: impl FnMut(&mut zmq::Message),
) -> zmq::Result<Vec<Frame>> {
    let mut frames = Vec::with_capacity(4);
    loop {
        let mut frame = zmq::Message::new();
        socket.recv(&mut frame, zmq::DONTWAIT)?;
        if frames.is_empty() {
            note(&mut frame);
        }
        let more = frame.get_more();
        if frames.len() < MOST {
            frames.push(Frame::from(frame));
        }
        if !more {
            return Ok(frames);
        }
    }
}
