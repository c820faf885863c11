//! Bodies: gathered without copies where possible, sent in chunks that Envoy takes.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

/// The largest part of a body in one reply, in bytes; Envoy recommends at most 64 KiB a message.
pub(super) const CHUNK_BYTES: usize = 62_000;
/// So many pieces are held as they came; more are copied together, so that a body of tiny pieces
/// does not keep a buffer for each.
const MAX_PIECES: usize = 64;

/// Parts of a body, in order.
pub(super) type Pieces = SmallVec<[Bytes; 3]>;

/// A body that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct Gather {
    pieces: Pieces,
    /// Everything, once there were too many pieces.
    joined: BytesMut,
    bytes: usize,
}

impl Gather {
    /// Appends a piece.
    pub(super) fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.bytes += piece.len();
        if self.joined.is_empty() && self.pieces.len() < MAX_PIECES {
            self.pieces.push(piece);
            return;
        }
        for earlier in self.pieces.drain(..) {
            self.joined.extend_from_slice(&earlier);
        }
        self.joined.extend_from_slice(&piece);
    }

    /// Length so far, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The pieces, leaving nothing.
    pub(super) fn take_pieces(&mut self) -> Pieces {
        let this = std::mem::take(self);
        if this.joined.is_empty() { this.pieces } else { Pieces::from_iter([this.joined.freeze()]) }
    }

    /// The whole body in one piece, leaving nothing. A single piece is not copied.
    pub(super) fn take_whole(&mut self) -> Bytes {
        join(&self.take_pieces())
    }
}

/// Total length, in bytes.
pub(super) fn length(pieces: &[Bytes]) -> usize {
    pieces.iter().map(Bytes::len).sum()
}

/// One piece of several; copies unless there is only one.
pub(super) fn join(pieces: &[Bytes]) -> Bytes {
    match pieces {
        [] => Bytes::new(),
        [one] => one.clone(),
        many => {
            let mut whole = BytesMut::with_capacity(length(many));
            many.iter().for_each(|piece| whole.extend_from_slice(piece));
            whole.freeze()
        }
    }
}

/// Cuts a body into chunks of [`CHUNK_BYTES`] but for the last one; an empty body is one empty
/// chunk. `each` gets a chunk and whether it is the last. Only chunks that span pieces are copied.
pub(super) fn chunks(pieces: &[Bytes], mut each: impl FnMut(Bytes, bool)) {
    let mut left = length(pieces);
    let mut pieces = pieces.iter().filter(|piece| !piece.is_empty()).cloned();
    let mut current = Bytes::new();
    loop {
        let size = left.min(CHUNK_BYTES);
        if current.is_empty() {
            current = pieces.next().unwrap_or_default();
        }
        let chunk = if current.len() >= size {
            current.split_to(size)
        } else {
            let mut chunk = BytesMut::with_capacity(size);
            while chunk.len() < size && !current.is_empty() {
                let part = current.split_to(current.len().min(size - chunk.len()));
                chunk.extend_from_slice(&part);
                if current.is_empty() {
                    current = pieces.next().unwrap_or_default();
                }
            }
            chunk.freeze()
        };
        left -= size;
        each(chunk, left == 0);
        if left == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_cut_where_envoy_takes_it() {
        #[track_caller]
        fn check(pieces: &[usize], want: &[usize]) {
            let body: Vec<u8> = (0..pieces.iter().sum()).map(|i| (i % 251) as u8).collect();
            let mut rest = Bytes::from(body.clone());
            let pieces: Vec<Bytes> = pieces.iter().map(|size| rest.split_to(*size)).collect();
            let (mut sizes, mut out, mut lasts) = (Vec::new(), Vec::new(), Vec::new());
            chunks(&pieces, |chunk, last| {
                sizes.push(chunk.len());
                out.extend_from_slice(&chunk);
                lasts.push(last);
            });
            assert_eq!(sizes, want);
            assert!(out == body, "other bytes");
            assert!(lasts.pop().unwrap() && !lasts.contains(&true));
        }
        check(&[], &[0]);
        check(&[0, 0], &[0]);
        check(&[1], &[1]);
        check(&[62_000], &[62_000]);
        check(&[62_001], &[62_000, 1]);
        check(&[130_025], &[62_000, 62_000, 6_025]);
        check(&[10, 0, 20, 30], &[60]);
        check(&[61_999, 1, 1], &[62_000, 1]);
        check(&[100, 200_000, 100], &[62_000, 62_000, 62_000, 14_200]);
    }

    #[test]
    fn slices_are_not_copied() {
        let body = Bytes::from(vec![7; 200_000]);
        let mut at = 0;
        chunks(std::slice::from_ref(&body), |chunk, _| {
            assert_eq!(chunk.as_ptr(), body[at..].as_ptr());
            at += chunk.len();
        });
        let mut gather = Gather::default();
        gather.push(body.clone());
        gather.push(Bytes::new());
        assert_eq!((gather.bytes(), gather.take_whole().as_ptr()), (200_000, body.as_ptr()));
        assert_eq!((gather.bytes(), gather.take_whole()), (0, Bytes::new()));
    }

    #[test]
    fn many_tiny_pieces_become_one() {
        let mut gather = Gather::default();
        let body: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
        body.iter().for_each(|byte| gather.push(Bytes::copy_from_slice(&[*byte])));
        assert_eq!(gather.bytes(), 1000);
        assert!(gather.pieces.is_empty());
        assert_eq!(gather.take_whole(), body);
    }
}
