//! The connection of one SUB socket to its engine, as libzmq's monitor tells of it.
//!
//! libzmq connects again by itself when a connection breaks, but not after a breach of the protocol
//! (a frame over the limit, another server at that port): then it gives the endpoint up for good,
//! without a word. So whoever hears of a loss and of no new attempt connects anew.

use std::time::{Duration, Instant};

use crate::ingest::IngestConfig;

/// What became of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is there. Not for the first time?
    Up { again: bool },
    /// It was there and is gone.
    Down,
}

/// See the module's documentation.
pub(crate) struct Line {
    monitor: zmq::Socket,
    /// Where the monitor's other end goes when the line is closed.
    unheard: String,
    up: bool,
    up_before: bool,
    /// The connection is lost, and libzmq has not said yet that it tries again.
    lost: Option<Instant>,
    /// How long it is given for that; doubles while there is no connection.
    patience: Duration,
}

impl Line {
    /// Watches `sub`, which has connected nowhere yet. `number` is used once per context.
    ///
    /// # Errors
    ///
    /// libzmq's.
    pub(crate) fn watch(
        zmq: &zmq::Context,
        sub: &zmq::Socket,
        number: usize,
        config: &IngestConfig,
    ) -> zmq::Result<Self> {
        let monitor = zmq.socket(zmq::PAIR)?;
        // No limit: libzmq's own thread must never wait for us.
        monitor.set_rcvhwm(0)?;
        let line = Self {
            monitor,
            unheard: format!("inproc://unheard-{number}"),
            up: false,
            up_before: false,
            lost: None,
            patience: config.reconnect,
        };
        let events = [
            zmq::SocketEvent::CONNECTED,
            zmq::SocketEvent::CONNECT_RETRIED,
            zmq::SocketEvent::HANDSHAKE_SUCCEEDED,
            zmq::SocketEvent::DISCONNECTED,
        ];
        let name = format!("inproc://monitor-{number}");
        sub.monitor(&name, events.into_iter().fold(0, |all, event| all | event as i32))?;
        line.monitor.connect(&name)?;
        Ok(line)
    }

    /// Is to be called before the sockets are dropped: libzmq's own thread reports to the monitor,
    /// and waits for ever, and with it everything else that it serves, if the other end is closed
    /// before `sub` is gone, which happens some time after it was dropped.
    pub(crate) fn close(&self, sub: &zmq::Socket) {
        // A monitor of no events in the place of the old one.
        if let Err(error) = sub.monitor(&self.unheard, 0) {
            tracing::error!(%error, "Cannot end the monitor of a subscription.");
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up
    }

    /// To wait for news.
    pub(crate) fn poll_item(&self) -> zmq::PollItem<'_> {
        self.monitor.as_poll_item(zmq::POLLIN)
    }

    /// The next change that the monitor tells of.
    pub(crate) fn news(&mut self, config: &IngestConfig, now: Instant) -> Option<Change> {
        // Events are `[u16 event, u32 value]`, then the peer's address.
        while let Ok(frames) = self.monitor.recv_multipart(zmq::DONTWAIT) {
            let Some(&[low, high, ..]) = frames.first().map(Vec::as_slice) else { continue };
            let was_up = self.up;
            match zmq::SocketEvent::from_raw(u16::from_ne_bytes([low, high])) {
                zmq::SocketEvent::HANDSHAKE_SUCCEEDED => {
                    (self.up, self.lost, self.patience) = (true, None, config.reconnect);
                }
                zmq::SocketEvent::DISCONNECTED => (self.up, self.lost) = (false, Some(now)),
                // It is on its way.
                _ => self.lost = None,
            }
            match (was_up, self.up) {
                (false, true) => {
                    return Some(Change::Up {
                        again: std::mem::replace(&mut self.up_before, true),
                    });
                }
                (true, false) => return Some(Change::Down),
                _ => {}
            }
        }
        None
    }

    /// Connects anew if libzmq gave up.
    pub(crate) fn mend(
        &mut self,
        sub: &zmq::Socket,
        endpoint: &str,
        config: &IngestConfig,
        now: Instant,
    ) {
        if self.lost.is_none_or(|lost| now.duration_since(lost) < self.patience) {
            return;
        }
        // A poll takes the first frame of a message in; libzmq ends the process when the others are
        // asked for and their connection was taken away meanwhile. So what waits is read before.
        if sub.get_events().is_ok_and(|events| events.contains(zmq::POLLIN)) {
            return;
        }
        self.lost = Some(now);
        self.patience = (self.patience * 2).min(config.reconnect_max);
        tracing::warn!(endpoint, "libzmq gave the connection up; connecting anew.");
        // It knows no such endpoint any more if it gave up, which is what we ask for.
        sub.disconnect(endpoint).unwrap_or_default();
        if let Err(error) = sub.connect(endpoint) {
            tracing::error!(endpoint, %error, "Cannot connect.");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::frame;

    /// Connecting anew beside a message of which the poll has seen the first frame.
    #[test]
    fn a_message_that_waits_is_not_cut_in_half() {
        let zmq = zmq::Context::new();
        let engine = zmq.socket(zmq::XPUB).unwrap();
        // The new subscription may come before the old one has gone.
        engine.set_xpub_verbose(true).unwrap();
        engine.bind("tcp://127.0.0.1:*").unwrap();
        let endpoint = engine.get_last_endpoint().unwrap().unwrap();
        let sub = zmq.socket(zmq::SUB).unwrap();
        sub.set_subscribe(b"").unwrap();
        let config = IngestConfig::default();
        let mut line = Line::watch(&zmq, &sub, 1, &config).unwrap();
        sub.connect(&endpoint).unwrap();
        let subscribed = || {
            assert_eq!(engine.poll(zmq::POLLIN, 10_000).unwrap(), 1);
            engine.recv_bytes(0).unwrap().first() == Some(&1)
        };
        assert!(subscribed());
        engine.send_multipart([&b"topic"[..], b"sequence", b"payload"], 0).unwrap();
        assert_eq!(sub.poll(zmq::POLLIN, 10_000).unwrap(), 1);
        let now = Instant::now();
        line.lost = Some(now);
        line.mend(&sub, &endpoint, &config, now + Duration::from_secs(60));
        assert_eq!(line.lost, Some(now), "not yet");
        assert_eq!(frame::receive(&sub).unwrap().len(), 3);
        line.mend(&sub, &endpoint, &config, now + Duration::from_secs(60));
        assert_ne!(line.lost, Some(now), "connected anew");
        // The old connection goes, the new one comes.
        while !subscribed() {}
        line.close(&sub);
    }
}
