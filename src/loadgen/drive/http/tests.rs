use proptest::prelude::*;

use super::*;

/// Head, body, and whether the end was there, of an answer that comes in these pieces.
fn decode<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<(Option<Head>, Vec<u8>, bool), NotHttp> {
    let (mut decoder, mut head, mut body) = (Decoder::new(), None, Vec::new());
    for mut piece in pieces {
        loop {
            match decoder.next(&mut piece)? {
                Item::More => break,
                Item::Head(found) => head = Some(found),
                Item::Data(data) => body.extend_from_slice(data),
                Item::End => return Ok((head, body, true)),
            }
        }
    }
    Ok((head, body, false))
}

#[track_caller]
fn check(answer: &str, expected: Result<(u16, &str, bool), NotHttp>) {
    let answer = answer.as_bytes();
    for cut in 0..=answer.len() {
        let (a, b) = answer.split_at(cut);
        let found = decode([a, b]).map(|(head, body, end)| {
            (head.map_or(0, |head| head.status), String::from_utf8(body).unwrap(), end)
        });
        let expected = expected.map(|(status, body, end)| (status, body.to_owned(), end));
        assert_eq!(found, expected, "cut at {cut}");
    }
}

#[test]
fn answers_are_decoded_wherever_they_are_cut() {
    check("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhelloHTTP", Ok((200, "hello", true)));
    check("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", Ok((200, "", true)));
    check("HTTP/1.1 204 No Content\r\n\r\n", Ok((204, "", true)));
    check("HTTP/1.0 200 OK\r\n\r\nuntil the end", Ok((200, "until the end", false)));
    check(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA;x=y\r\n, chunked!\r\n0\r\nt: v\r\n\r\n",
        Ok((200, "hello, chunked!", true)),
    );
    check(
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length: 1\r\n\r\nx",
        Ok((404, "x", true)),
    );
    check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", Ok((200, "hel", false)));
}

#[test]
fn what_is_not_http_is_refused() {
    for answer in [
        "hello\r\n\r\n",
        "SSH-2.0-OpenSSH_9\r\n",
        "HTTP/2 200\r\n\r\n",
        "HTTP/1.1 2x0 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloworld",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10000000000000000\r\n",
    ] {
        check(answer, Err(NotHttp));
    }
    let long = "x".repeat(MAX_HEAD_BYTES);
    assert_eq!(decode([&b"HTTP/1.1 200 OK\r\na: "[..], long.as_bytes()]), Err(NotHttp));
}

#[test]
fn a_head_tells_who_served_and_whether_the_connection_stays() {
    #[track_caller]
    fn check(lines: &str, keeps: bool, pod: Option<&str>) {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{lines}\r\n");
        let head = decode([answer.as_bytes()]).unwrap().0.unwrap();
        assert_eq!((head.keeps, head.pod.as_deref()), (keeps, pod), "{lines}");
    }
    check("", true, None);
    check("Connection: close\r\n", false, None);
    check("connection: Keep-Alive, Upgrade\r\n", true, None);
    check("x-served-by: 10.0.0.1:80\r\n", true, Some("10.0.0.1:80"));
    check("X-Gateway-Destination-Endpoint-Served: a\r\nx-served-by: b\r\n", true, Some("a"));
}

proptest! {
    #[test]
    fn nothing_panics(
        data in prop::collection::vec(any::<u8>(), 0..300),
        begins in prop::sample::select(vec!["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"]),
        cut in any::<prop::sample::Index>(),
    ) {
        let answer = [begins.as_bytes(), &data].concat();
        let (a, b) = answer.split_at(cut.index(answer.len() + 1));
        prop_assert_eq!(decode([a, b]), decode([&answer[..]]));
    }
}
