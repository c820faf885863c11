//! Chained hashes of the blocks of a prompt.
//!
//! `h₀ = H(H(model), H(cache salt))` and `hᵢ = H(H(blockᵢ), hᵢ₋₁)`, as in the Go EPP, where a block is
//! the bytes of the text, or four bytes for each token id. Hashes never leave the process, so `H` may
//! be the fastest at hand, XXH3.
//!
//! # Cost
//!
//! The text is read where it lies; only blocks that lie in two pieces of it are put together first.

use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64;

/// The block hashes of a request, a chain for each of its prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chains {
    hashes: Vec<u64>,
    /// Where each chain ends.
    ends: SmallVec<[usize; 1]>,
}

impl Chains {
    /// Blocks of all chains.
    #[must_use]
    pub fn total(&self) -> usize {
        self.hashes.len()
    }

    /// The chains, each with its first block first; none is empty.
    pub fn iter(&self) -> impl Iterator<Item = &[u64]> {
        self.ends.iter().scan(0, |start, &end| {
            let chain = self.hashes.get(*start..end);
            *start = end;
            chain
        })
    }

    /// Adds a chain.
    pub fn push(&mut self, chain: &[u64]) {
        self.hashes.extend_from_slice(chain);
        self.end_chain();
    }

    fn end_chain(&mut self) {
        if self.hashes.len() > self.ends.last().copied().unwrap_or(0) {
            self.ends.push(self.hashes.len());
        }
    }
}

/// Hashes prompts that come in pieces.
#[derive(Debug)]
pub struct BlockHasher {
    root: u64,
    parent: u64,
    block_bytes: usize,
    max_blocks: usize,
    keep_tail: bool,
    /// Blocks of the chain so far.
    blocks: usize,
    /// The start of a block whose rest has not come yet.
    pending: Vec<u8>,
    chains: Chains,
}

impl BlockHasher {
    /// A hasher of the prompts of one request: `block_bytes` (at least 1) are a block, at most
    /// `max_blocks` of each prompt are hashed, and what is left of it is a block as well if
    /// `keep_tail`.
    #[must_use]
    pub fn new(
        model: &str,
        salt: &str,
        block_bytes: usize,
        max_blocks: usize,
        keep_tail: bool,
    ) -> Self {
        let root = join(xxh3_64(model.as_bytes()), xxh3_64(salt.as_bytes()));
        Self {
            root,
            parent: root,
            block_bytes: block_bytes.max(1),
            max_blocks,
            keep_tail,
            blocks: 0,
            pending: Vec::new(),
            chains: Chains::default(),
        }
    }

    /// Makes room for the blocks of `bytes` more.
    pub fn expect(&mut self, bytes: usize) {
        let blocks = (bytes / self.block_bytes + 1).min(self.max_blocks);
        self.chains.hashes.reserve(blocks);
    }

    /// The next piece of the prompt.
    pub fn push(&mut self, mut piece: &[u8]) {
        if !self.pending.is_empty() {
            let missing = self.block_bytes - self.pending.len();
            let (head, rest) = piece.split_at(missing.min(piece.len()));
            self.pending.extend_from_slice(head);
            piece = rest;
            if self.pending.len() < self.block_bytes {
                return;
            }
            let block = std::mem::take(&mut self.pending);
            self.block(&block);
            self.pending = block;
            self.pending.clear();
        }
        let mut blocks = piece.chunks_exact(self.block_bytes);
        for block in blocks.by_ref() {
            if self.is_full() {
                return;
            }
            self.block(block);
        }
        if !self.is_full() {
            self.pending.extend_from_slice(blocks.remainder());
        }
    }

    /// Ends a prompt; the next piece is another's first.
    pub fn end(&mut self) {
        if self.keep_tail && !self.pending.is_empty() {
            let block = std::mem::take(&mut self.pending);
            self.block(&block);
        }
        self.pending.clear();
        self.parent = self.root;
        self.blocks = 0;
        self.chains.end_chain();
    }

    /// The hashes of all prompts.
    #[must_use]
    pub fn finish(mut self) -> Chains {
        self.end();
        self.chains
    }

    /// Bytes of a prompt that are of interest.
    #[must_use]
    pub fn room(&self) -> usize {
        self.max_blocks.saturating_mul(self.block_bytes)
    }

    /// Is nothing more of this prompt of interest?
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.blocks >= self.max_blocks
    }

    fn block(&mut self, block: &[u8]) {
        if self.is_full() {
            return;
        }
        self.parent = join(xxh3_64(block), self.parent);
        self.chains.hashes.push(self.parent);
        self.blocks += 1;
    }
}

/// The hash of two hashes.
fn join(a: u64, b: u64) -> u64 {
    let mut both = [0; 16];
    both[..8].copy_from_slice(&a.to_le_bytes());
    both[8..].copy_from_slice(&b.to_le_bytes());
    xxh3_64(&both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, on a text in one piece.
    fn naive(
        model: &str,
        salt: &str,
        text: &[u8],
        block: usize,
        max: usize,
        tail: bool,
    ) -> Vec<u64> {
        let mut parent = join(xxh3_64(model.as_bytes()), xxh3_64(salt.as_bytes()));
        let blocks = text.chunks(block).filter(|chunk| tail || chunk.len() == block);
        blocks
            .take(max)
            .map(|chunk| {
                parent = join(xxh3_64(chunk), parent);
                parent
            })
            .collect()
    }

    fn hashed(text: &str, block: usize, max: usize, tail: bool) -> Vec<u64> {
        let mut hasher = BlockHasher::new("m", "", block, max, tail);
        hasher.push(text.as_bytes());
        hasher.finish().hashes
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            prompts in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..6), 0..4),
            block in 1_usize..40,
            max in 0_usize..12,
            tail: bool,
        ) {
            let mut hasher = BlockHasher::new("model", "salt", block, max, tail);
            let mut want = Chains::default();
            for pieces in &prompts {
                for piece in pieces {
                    hasher.push(piece);
                }
                hasher.end();
                want.push(&naive("model", "salt", &pieces.concat(), block, max, tail));
            }
            let got = hasher.finish();
            prop_assert_eq!(&got, &want);
            prop_assert_eq!(got.iter().map(<[u64]>::len).sum::<usize>(), got.total());
            prop_assert!(got.iter().all(|chain| !chain.is_empty()));
        }
    }

    #[test]
    fn blocks_are_counted_as_in_the_go_epp() {
        #[track_caller]
        fn check(text: &str, block: usize, max: usize, tail: bool, blocks: usize) {
            assert_eq!(hashed(text, block, max, tail).len(), blocks, "{text:?} by {block}");
        }
        check("", 4, 9, true, 0);
        check("abc", 4, 9, false, 0);
        check("abc", 4, 9, true, 1);
        check("abcd", 4, 9, false, 1);
        check("abcdef", 4, 9, false, 1);
        check("abcdef", 4, 9, true, 2);
        check("abcdefgh", 1, 3, true, 3);
        check("abcdefgh", 4, 0, true, 0);
        // No limit.
        check("abcdefgh", 1, usize::MAX, true, 8);
    }

    #[test]
    fn a_hash_stands_for_all_before_it() {
        let (a, b) = (hashed("aaaabbbbcccc", 4, 9, false), hashed("aaaaxxxxcccc", 4, 9, false));
        assert_eq!(a[0], b[0]);
        assert_ne!(a[1], b[1]);
        assert_ne!(a[2], b[2]);
        assert_eq!(a[..2], hashed("aaaabbbb", 4, 9, false));
    }

    #[test]
    fn models_and_salts_do_not_share() {
        let of = |model: &str, salt: &str| {
            let mut hasher = BlockHasher::new(model, salt, 4, 9, false);
            hasher.push(b"aaaa");
            hasher.finish().hashes[0]
        };
        let all = [of("m", ""), of("n", ""), of("m", "s"), of("ms", "")];
        for (at, hash) in all.iter().enumerate() {
            assert!(!all[..at].contains(hash), "{at}");
        }
    }
}
