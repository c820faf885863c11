//! A TCP proxy that knows nothing but bytes, and what may become of them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    sync::watch,
    task::JoinSet,
};

/// Little is on its way at once, so that who does not read is felt by who writes.
const SOCKET_BYTES: u32 = 8 << 10;

/// What becomes of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Pass,
    /// Each piece is passed on so late.
    Late(Duration),
    /// Nothing is read.
    Stalled,
    /// Everything vanishes, and no end of a connection is told to the other.
    HalfOpen,
    /// Connections are closed at once.
    Refusing,
    /// So many bytes more, and then the end.
    Truncating(usize),
}

#[derive(Clone, Copy, Debug)]
struct State {
    mode: Mode,
    /// Connections of an earlier one end.
    generation: u64,
}

/// One address before one address.
pub(crate) struct Link {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    state: watch::Sender<State>,
    _tasks: JoinSet<()>,
}

impl Link {
    /// Listens at a free port.
    pub(crate) fn start(target: SocketAddr, runtime: &Handle) -> Self {
        let _inside = runtime.enter();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_send_buffer_size(SOCKET_BYTES).unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(64).unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(target));
        let (state, watched) = watch::channel(State { mode: Mode::Pass, generation: 0 });
        let mut tasks = JoinSet::new();
        let to = Arc::clone(&target);
        tasks.spawn_on(
            async move {
                let mut connections = JoinSet::new();
                loop {
                    let Ok((client, _)) = listener.accept().await else { continue };
                    while connections.try_join_next().is_some() {}
                    let at = *to.lock().unwrap();
                    connections.spawn(serve(client, at, watched.clone()));
                }
            },
            runtime,
        );
        Self { address, target, state, _tasks: tasks }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections go from now on.
    pub(crate) fn aim(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.state.send_modify(|state| {
            // A stream with bytes missing is of no use to anybody.
            let lossy = |mode| matches!(mode, Mode::HalfOpen | Mode::Truncating(_));
            if mode == Mode::Refusing || lossy(state.mode) {
                state.generation += 1;
            }
            state.mode = mode;
        });
    }

    /// Ends all connections.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }
}

async fn serve(client: TcpStream, target: SocketAddr, state: watch::Receiver<State>) {
    let begun = *state.borrow();
    if begun.mode == Mode::Refusing {
        return;
    }
    let Ok(socket) = TcpSocket::new_v4() else { return };
    socket.set_recv_buffer_size(SOCKET_BYTES).unwrap();
    let Ok(server) = socket.connect(target).await else { return };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let up = pump(from_client, to_server, state.clone(), begun.generation);
    let down = pump(from_server, to_client, state, begun.generation);
    // Whichever ends first ends both.
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    generation: u64,
) {
    let mut ended = state.clone();
    let cut = ended.wait_for(|state| state.generation != generation);
    let pass = async move {
        let mut piece = vec![0; 4 << 10];
        let mut passed = 0;
        loop {
            if state.wait_for(|state| state.mode != Mode::Stalled).await.is_err() {
                return;
            }
            let read = from.read(&mut piece).await.unwrap_or(0);
            let mode = state.borrow_and_update().mode;
            if read == 0 {
                if mode == Mode::HalfOpen {
                    std::future::pending::<()>().await;
                }
                return;
            }
            let mut whole = &piece[..read];
            match mode {
                Mode::HalfOpen => continue,
                Mode::Late(by) => tokio::time::sleep(by).await,
                Mode::Truncating(after) => {
                    let left = after.saturating_sub(passed);
                    whole = &whole[..left.min(read)];
                    passed += whole.len();
                }
                Mode::Pass | Mode::Stalled | Mode::Refusing => {}
            }
            if to.write_all(whole).await.is_err() || whole.len() < read {
                return;
            }
        }
    };
    tokio::select! {
        _ = cut => {}
        () = pass => {}
    }
}
