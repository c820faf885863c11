//! The replay socket: a ROUTER on a thread of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{
    END_OF_REPLAY, PublishError, PublisherOptions, ReplayForm,
    sockets::{Buffer, Message, bind},
};
use crate::support::sync::lock;

/// It looks this often whether it should stop, milliseconds.
const POLL_MS: i64 = 20;

/// The ROUTER and its thread.
pub(super) struct ReplayServer {
    /// Where it is bound, with the real port.
    pub(super) endpoint: String,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ReplayServer {
    /// Binds the socket on a thread of its own.
    pub(super) fn start<M: Message>(
        context: &zmq::Context,
        endpoint: &str,
        options: &PublisherOptions,
        buffer: &Buffer<M>,
        patience: Duration,
    ) -> Result<Self, PublishError> {
        let (report, bound) = mpsc::sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let replies = Replies { buffer: Arc::clone(buffer), form: options.form };
        // As vLLM 0.33: room for two whole replays. Older versions keep ZeroMQ's 1 000 and lose
        // messages to slow readers.
        let hwm = options.buffer_steps.saturating_add(1).saturating_mul(2);
        let hwm = i32::try_from(hwm).unwrap_or(i32::MAX);
        let thread = {
            let (context, endpoint, stop) =
                (context.clone(), endpoint.to_owned(), Arc::clone(&stop));
            thread::Builder::new().name("replay".to_owned()).spawn(move || {
                let socket = match bind(&context, zmq::ROUTER, &endpoint, hwm, patience) {
                    Ok((socket, real)) => {
                        if report.send(Ok(real)).is_err() {
                            return;
                        }
                        socket
                    }
                    Err(error) => {
                        // Nobody waits for it only if `start` itself is gone.
                        drop(report.send(Err(error)));
                        return;
                    }
                };
                replies.serve(&socket, &stop);
            })?
        };
        let mut server = Self { endpoint: String::new(), stop, thread: Some(thread) };
        match bound.recv() {
            Ok(endpoint) => server.endpoint = endpoint?,
            Err(_) => return Err(std::io::Error::other("it ended at once").into()),
        }
        Ok(server)
    }
}

impl Drop for ReplayServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; a destructor cannot do more.
            drop(thread.join());
        }
    }
}

/// What the replay thread needs to answer.
struct Replies<M> {
    buffer: Buffer<M>,
    form: ReplayForm,
}

impl<M: Message> Replies<M> {
    fn serve(&self, socket: &zmq::Socket, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match socket.poll(zmq::POLLIN, POLL_MS) {
                Ok(0) | Err(zmq::Error::EINTR) => continue,
                Ok(_) => {}
                Err(_) => return,
            }
            let Ok(request) = socket.recv_multipart(zmq::DONTWAIT) else { continue };
            if let Some((identity, start)) = parse_request(&request)
                && self.answer(socket, identity, start, stop).is_err()
            {
                return;
            }
        }
    }

    fn answer(
        &self,
        socket: &zmq::Socket,
        identity: &[u8],
        start: u64,
        stop: &AtomicBool,
    ) -> Result<(), zmq::Error> {
        let buffered: Vec<M> = lock(&self.buffer).iter().cloned().collect();
        for batch in buffered.iter().map(M::batch).filter(|batch| batch.sequence >= start) {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let sequence = batch.sequence.to_be_bytes();
            self.send(socket, identity, batch.topic.as_bytes(), &sequence, &batch.payload)?;
        }
        self.send(socket, identity, b"", &END_OF_REPLAY, b"")
    }

    fn send(
        &self,
        socket: &zmq::Socket,
        identity: &[u8],
        topic: &[u8],
        sequence: &[u8],
        payload: &[u8],
    ) -> Result<(), zmq::Error> {
        match self.form {
            ReplayForm::TwoFrames => socket.send_multipart([identity, b"", sequence, payload], 0),
            ReplayForm::ThreeFrames => {
                socket.send_multipart([identity, b"", topic, sequence, payload], 0)
            }
        }
    }
}

/// The identity and the first sequence asked for. The engine demands three frames and reads the last
/// one as a big-endian number of any length; it does not look at the one between.
fn parse_request(frames: &[Vec<u8>]) -> Option<(&[u8], u64)> {
    let [identity, _, start] = frames else { return None };
    let start = start.iter().try_fold(0_u64, |value, &byte| {
        value.checked_mul(256).map(|shifted| shifted | u64::from(byte))
    });
    // Beyond 64 bits is beyond every sequence: the end marker alone.
    Some((identity, start.unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(frames: &[&[u8]], expected: Option<u64>) {
        let frames: Vec<Vec<u8>> = frames.iter().map(|frame| frame.to_vec()).collect();
        assert_eq!(parse_request(&frames).map(|(_, start)| start), expected);
    }

    #[test]
    fn requests_are_read_as_the_engine_reads_them() {
        check(&[b"id", b"", &7_u64.to_be_bytes()], Some(7));
        check(&[b"id", b"", &[0, 0, 0, 1]], Some(1));
        check(&[b"id", b"", b""], Some(0));
        check(&[b"id", b"x", &[5]], Some(5));
        check(&[b"id", b"", &[1; 9]], Some(u64::MAX));
        check(&[b"id", &7_u64.to_be_bytes()], None);
        check(&[b"id", b"", b"", &[1]], None);
    }
}
