//! A TCP proxy that passes on late, to show that lateness is seen.
//!
//! What the target sends is delayed piece by piece and stays in order; what is sent to it is not.
//!
//! # Concurrency
//!
//! Threads of its own: timers of tokio count whole milliseconds. Dropping the proxy closes its
//! connections and joins them.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::support::sync::lock;

/// Connections at a time; more are refused.
const MOST_CONNECTIONS: usize = 16;
/// Pieces of one connection that wait at most; then the target is not read.
const WAITING: usize = 1_024;
const PIECE_BYTES: usize = 16 << 10;

/// How late it passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// The mean.
    pub mean: Duration,
    /// Uniformly so much more or less.
    pub jitter: Duration,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for Delay {
    /// 2 ms ± 1 ms.
    fn default() -> Self {
        Self { mean: Duration::from_millis(2), jitter: Duration::from_millis(1), seed: 1 }
    }
}

/// A running proxy.
#[derive(Debug)]
pub struct DelayProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    delay: Delay,
    stop: AtomicBool,
    open: Mutex<Vec<(TcpStream, TcpStream)>>,
}

impl DelayProxy {
    /// Listens at a free port of `ip` and connects whoever comes to `target`.
    ///
    /// # Errors
    ///
    /// When it cannot listen or start its thread.
    pub fn start(ip: IpAddr, target: SocketAddr, delay: Delay) -> io::Result<Self> {
        let listener = TcpListener::bind((ip, 0))?;
        let address = listener.local_addr()?;
        let open = Mutex::default();
        let shared = Arc::new(Shared { target, delay, stop: AtomicBool::new(false), open });
        let own = Arc::clone(&shared);
        let acceptor =
            thread::Builder::new().name("delay".to_owned()).spawn(move || own.accept(&listener))?;
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for DelayProxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // It waits for somebody to come.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            // A panic there has been printed; a destructor cannot do more.
            drop(acceptor.join());
        }
    }
}

impl Shared {
    fn accept(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            for client in listener.incoming() {
                if self.stop.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(client) = client else { continue };
                if lock(&self.open).len() < MOST_CONNECTIONS {
                    // A connection that cannot be served is closed, and its owner comes again.
                    self.serve(scope, &client).unwrap_or_default();
                }
            }
            for (client, target) in lock(&self.open).iter() {
                // They may be closed already.
                client.shutdown(Shutdown::Both).unwrap_or_default();
                target.shutdown(Shutdown::Both).unwrap_or_default();
            }
        });
    }

    fn serve<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        client: &TcpStream,
    ) -> io::Result<()> {
        let target = TcpStream::connect_timeout(&self.target, Duration::from_secs(5))?;
        client.set_nodelay(true)?;
        target.set_nodelay(true)?;
        lock(&self.open).push((client.try_clone()?, target.try_clone()?));
        let name = client.peer_addr()?;
        let (pieces, due) = sync_channel(WAITING);
        let (from, to) = (client.try_clone()?, target.try_clone()?);
        scope.spawn(move || pass(from, to));
        let out = client.try_clone()?;
        scope.spawn(move || write_late(out, &due));
        scope.spawn(move || {
            read_ahead(&target, self.delay, &pieces);
            drop(pieces);
            target.shutdown(Shutdown::Both).unwrap_or_default();
            lock(&self.open).retain(|(client, _)| client.peer_addr().ok() != Some(name));
        });
        Ok(())
    }
}

/// A piece and when it is to be passed on.
type Piece = (Instant, Vec<u8>);

fn read_ahead(mut from: &TcpStream, delay: Delay, pieces: &SyncSender<Piece>) {
    let mut random = fastrand::Rng::with_seed(delay.seed);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut last = Instant::now();
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let early = delay.mean.saturating_sub(delay.jitter);
        let late = early + (delay.jitter * 2).mul_f64(random.f64());
        last = last.max(Instant::now() + late);
        if pieces.send((last, buffer[..read].to_vec())).is_err() {
            return;
        }
    }
}

fn write_late(mut to: TcpStream, pieces: &Receiver<Piece>) {
    for (due, piece) in pieces {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).unwrap_or_default();
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    // Either end may close at any time.
    io::copy(&mut from, &mut to).unwrap_or_default();
    to.shutdown(Shutdown::Both).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn answers_come_late_and_in_order() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let target = listener.local_addr().unwrap();
        let echo = thread::spawn(move || {
            let (mut from, _) = listener.accept().unwrap();
            let mut to = from.try_clone().unwrap();
            io::copy(&mut from, &mut to).unwrap();
        });
        let proxy =
            DelayProxy::start(Ipv4Addr::LOCALHOST.into(), target, Delay::default()).unwrap();
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        let began = Instant::now();
        for number in 0..20_u8 {
            let sent = Instant::now();
            client.write_all(&[number]).unwrap();
            let mut answer = [0];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [number]);
            assert!(sent.elapsed() >= Duration::from_millis(1));
        }
        assert!(began.elapsed() >= Duration::from_millis(25), "{:?}", began.elapsed());
        client.write_all(&[7; 100_000]).unwrap();
        let mut all = vec![0; 100_000];
        client.read_exact(&mut all).unwrap();
        drop(proxy);
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
        echo.join().unwrap();
    }
}
