//! An HTTP client as small as the tests can do with: blocking, a connection a request.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use super::patience;

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
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other(format!("not HTTP: {head:?}")))?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_owned() };
    Ok(Reply { status, head: head.to_owned(), body })
}

/// A body without the sizes of its chunks.
fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some(chunk) = rest.get(..size).filter(|chunk| !chunk.is_empty()) else { break };
        whole.push_str(chunk);
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

/// `GET path`: status and body.
pub(crate) fn http_get(to: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let reply = read(send(to, "GET", path, &[], "")?)?;
    Ok((reply.status, reply.body))
}

#[test]
fn chunks_are_joined() {
    assert_eq!(unchunked("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), "abcde");
}

#[test]
fn http_answers_are_split() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let read = stream.read(&mut request).unwrap();
        stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nA: b\r\n\r\nnot yet").unwrap();
        String::from_utf8_lossy(&request[..read]).into_owned()
    });
    assert_eq!(http_get(address, "/readyz").unwrap(), (503, "not yet".to_owned()));
    assert!(server.join().unwrap().starts_with("GET /readyz HTTP/1.1\r\n"));
}
