//! An HTTP client as small as the tests can do with.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use kv_indexer::loadgen::engine::{Engine, EngineHandle, EngineOptions};

use crate::support::patience;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The data of its server-sent events.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.body.split("\n\n").filter(|event| !event.trim().is_empty());
        events.map(|event| event.trim().strip_prefix("data: ").unwrap().to_owned()).collect()
    }
}

/// Sends a request on a connection of its own and leaves the answer to be read.
pub(crate) fn send(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(patience()))?;
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    request.push_str(body);
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}

/// Reads an answer to its end, of either transfer coding.
pub(crate) fn read(mut stream: TcpStream) -> std::io::Result<Reply> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    stream.shutdown(Shutdown::Both).ok();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("no head: {text:?}"))
    })?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    Ok(Reply { status, head: head.to_owned(), body })
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

pub(crate) fn post(to: SocketAddr, path: &str, body: &str) -> Reply {
    read(send(to, "POST", path, &[("content-type", "application/json")], body).unwrap()).unwrap()
}

pub(crate) fn get(to: SocketAddr, path: &str) -> Reply {
    read(send(to, "GET", path, &[], "").unwrap()).unwrap()
}

/// An engine on a runtime of its own.
pub(crate) struct Running {
    runtime: tokio::runtime::Runtime,
    engine: Option<EngineHandle>,
}

impl Running {
    pub(crate) fn start(options: EngineOptions) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let engine = Some(runtime.block_on(Engine::start(options)).unwrap());
        Self { runtime, engine }
    }

    pub(crate) fn stop(&mut self) {
        self.runtime.block_on(self.engine.take().unwrap().stop());
    }

    /// Ends it as a kill does.
    pub(crate) fn kill(&mut self) {
        self.runtime.block_on(self.engine.take().unwrap().kill());
    }

    /// Waits until everybody has subscribed.
    pub(crate) fn subscribed(&self) {
        let there = self.runtime.block_on(self.wait_for_subscribers(patience()));
        assert!(there, "nobody subscribes");
    }

    /// Waits until nothing runs.
    pub(crate) fn idle(&self) {
        assert!(self.runtime.block_on(self.wait_idle(patience())), "it never ends");
    }
}

impl std::ops::Deref for Running {
    type Target = EngineHandle;

    fn deref(&self) -> &EngineHandle {
        self.engine.as_ref().unwrap()
    }
}
