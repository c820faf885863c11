//! Streams that are reset, which is how Envoy ends every exchange with a body: no number of them may
//! end their connection.

use super::*;

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;

/// The HPACK block of a call, without a table.
fn call() -> Vec<u8> {
    // :method POST, :scheme http
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &str| {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    };
    literal(&[0x04], "/envoy.service.ext_proc.v3.ExternalProcessor/Process");
    literal(&[0x01], "x");
    // content-type is entry 31.
    literal(&[0x0f, 0x10], "application/grpc");
    block
}

/// Sends `rounds` times `each` calls, every one followed by `after`, and checks that the connection
/// still answers a ping and did not go away.
fn check(rounds: u32, each: u32, after: impl Fn(u32) -> Vec<u8>) {
    on_thread(async move {
        let served = Served::start(options(1)).await;
        let mut peer = TcpStream::connect(served.address).await.unwrap();
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        peer.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        for round in 0..rounds {
            let mut bytes = Vec::new();
            for index in 0..each {
                let stream = 2 * (round * each + index) + 1;
                bytes.extend(frame(HEADERS, 0x4, stream, &call()));
                bytes.extend(after(stream));
            }
            let ping = u64::from(round).to_be_bytes();
            bytes.extend(frame(PING, 0, 0, &ping));
            peer.write_all(&bytes).await.unwrap();
            timeout(PATIENCE, async {
                loop {
                    let mut head = [0; 9];
                    peer.read_exact(&mut head).await.unwrap();
                    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
                    let mut payload = vec![0; length as usize];
                    peer.read_exact(&mut payload).await.unwrap();
                    match head[3] {
                        GO_AWAY => panic!("gone away: {}", String::from_utf8_lossy(&payload)),
                        SETTINGS if head[4] == 0 => {
                            peer.write_all(&frame(SETTINGS, 1, 0, &[])).await.unwrap();
                        }
                        PING if head[4] == 1 && payload == ping => break,
                        _ => {}
                    }
                }
            })
            .await
            .unwrap();
        }
        assert_eq!(served.metrics.open.get(), 1);
        served.call().await.echo("x".into()).await;
        drop(peer);
        served.end().await;
    });
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RESET, 0, stream, &8_u32.to_be_bytes())
}

/// A message of request headers: field 2 of the request, which is empty.
fn message(stream: u32) -> Vec<u8> {
    frame(DATA, 0, stream, &[0, 0, 0, 0, 2, 0x12, 0])
}

#[test]
fn ten_thousand_calls_reset_at_once() {
    check(1, 10_000, reset);
}

#[test]
fn ten_thousand_calls_reset_in_rounds() {
    check(100, 100, |stream| [message(stream), reset(stream)].concat());
}

#[test]
fn data_after_a_reset_is_ignored() {
    check(30, 100, |stream| [message(stream), reset(stream), message(stream)].concat());
}

#[test]
fn exchanges_reset_after_an_answer() {
    on_thread(async {
        let served = Served::start(options(1)).await;
        let caller = Caller::plain(served.address).await;
        for _ in 0..1500 {
            let mut exchange = Exchange::open(caller.clone(), served.address).await;
            exchange.send(Part::RequestHeaders(HttpHeaders::default())).await;
            assert!(matches!(exchange.reply().await, Reply::RequestHeaders(_)));
        }
        assert_eq!(served.metrics.accepted.get(), 1);
        served.end().await;
    });
}
