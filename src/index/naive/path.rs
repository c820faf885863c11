//! Token paths: what the oracle knows of a prefix.

use std::sync::Arc;

use crate::{
    index::PodSpec,
    model::{ExtraKey, RequestKey},
};

/// Where an engine block lies: tokens `start..path.tokens.len()` of its path.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) start: usize,
    pub(super) path: Arc<Path>,
}

/// A prefix, up to and including one engine block.
#[derive(Clone, Debug, Default)]
pub(super) struct Path {
    pub(super) lora: String,
    pub(super) tokens: Vec<u32>,
    pub(super) extras: Vec<Extra>,
    pub(super) salt: Option<Vec<u8>>,
}

/// A multimodal item or digest: it taints the blocks that overlap `start..end`.
#[derive(Clone, Debug)]
pub(super) struct Extra {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) bytes: Vec<u8>,
}

pub(super) type Identity = (RequestKey, Vec<u32>, Vec<Vec<u8>>, Option<Vec<u8>>);

#[derive(Clone, Debug)]
pub(super) enum OwnedExtra {
    Text(String),
    Item(String, i64),
    Bytes(Vec<u8>),
}

impl Path {
    /// The path one engine block further.
    pub(super) fn extend(&self, tokens: &[u32], extras: &[OwnedExtra], lora: Option<&str>) -> Self {
        let mut path = self.clone();
        let start = path.tokens.len();
        path.tokens.extend_from_slice(tokens);
        let end = path.tokens.len();
        // vLLM repeats the event's adapter name as the first extra of every block.
        let extras = match extras {
            [OwnedExtra::Text(first), rest @ ..] if Some(first.as_str()) == lora => rest,
            all => all,
        };
        // The salt is the last bare string of block 0.
        let salt = (start == 0)
            .then(|| extras.iter().rposition(|extra| matches!(extra, OwnedExtra::Text(_))))
            .flatten();
        for (at, extra) in extras.iter().enumerate() {
            let (bytes, from) = match extra {
                OwnedExtra::Text(text) if Some(at) == salt => {
                    path.salt = Some(text.clone().into_bytes());
                    continue;
                }
                OwnedExtra::Text(text) => (text.clone().into_bytes(), 0),
                OwnedExtra::Item(id, offset) => {
                    (id.clone().into_bytes(), (*offset).max(0) as usize)
                }
                OwnedExtra::Bytes(bytes) => (bytes.clone(), 0),
            };
            if start + from < end {
                path.extras.push(Extra { start: start + from, end, bytes });
            }
        }
        path
    }

    pub(super) fn keys(&self, spec: &PodSpec) -> Vec<RequestKey> {
        let size = spec.scheme.block_size() as usize;
        let mut key = spec.scheme.root(&spec.model, &self.lora);
        let mut keys = Vec::new();
        for (block, tokens) in self.tokens.chunks_exact(size).enumerate() {
            let (from, to) = (block * size, (block + 1) * size);
            let mut extras: Vec<&[u8]> = Vec::new();
            for extra in &self.extras {
                if extra.start < to && extra.end > from && !extras.contains(&&*extra.bytes) {
                    extras.push(&extra.bytes);
                }
            }
            if let (0, Some(salt)) = (block, &self.salt) {
                extras.push(salt);
            }
            key = spec.scheme.next(key, tokens, &extras, &mut Vec::new());
            keys.push(key);
        }
        keys
    }

    /// What makes the first `end` tokens of two paths the same prefix: the key of the last full
    /// request block, and the tokens and extras after it.
    pub(super) fn identity(&self, end: usize, spec: &PodSpec) -> Identity {
        let size = spec.scheme.block_size() as usize;
        let from = end / size * size;
        let root = || spec.scheme.root(&spec.model, &self.lora);
        let key = (end / size).checked_sub(1).map_or_else(root, |last| self.keys(spec)[last]);
        let mut extras: Vec<Vec<u8>> = Vec::new();
        for extra in &self.extras {
            if extra.start < end && extra.end > from && !extras.contains(&extra.bytes) {
                extras.push(extra.bytes.clone());
            }
        }
        let salt = self.salt.clone().filter(|_| from == 0 && end > 0);
        (key, self.tokens[from..end].to_vec(), extras, salt)
    }
}

impl Place {
    pub(super) fn end(&self) -> usize {
        self.path.tokens.len()
    }

    pub(super) fn same(&self, other: &Self, spec: &PodSpec) -> bool {
        self.start == other.start
            && self.end() == other.end()
            && self.path.identity(self.end(), spec) == other.path.identity(other.end(), spec)
    }
}

pub(super) fn own(extras: &[ExtraKey<'_>]) -> Vec<OwnedExtra> {
    let own = |extra: &ExtraKey<'_>| match *extra {
        ExtraKey::Text(text) => OwnedExtra::Text(text.to_owned()),
        ExtraKey::Item { id, offset } => OwnedExtra::Item(id.to_owned(), offset),
        ExtraKey::Bytes(bytes) => OwnedExtra::Bytes(bytes.to_vec()),
    };
    extras.iter().map(own).collect()
}
