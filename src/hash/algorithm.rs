//! The three hash algorithms and their settings.

use std::{fmt, str::FromStr};

use xxhash_rust::{xxh3, xxh64};

use crate::model::RequestKey;

/// How a block's key follows from its parent's key, its tokens and its extras.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Ours: XXH3-64 over the raw tokens, seeded with the parent key.
    #[default]
    Xxh3,
    /// llm-d's `xxh64`, bit for bit (`pkg/kvcache/kvblock/token_processor.go`).
    Xxh64,
    /// llm-d's default: FNV-1a-64 over canonical CBOR of `[parent, tokens, extras]`.
    CborFnv,
}

impl Algorithm {
    /// Name in configuration and API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xxh3 => "xxh3",
            Self::Xxh64 => "xxh64",
            Self::CborFnv => "cbor-fnv",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "xxh3" => Ok(Self::Xxh3),
            "xxh64" => Ok(Self::Xxh64),
            "cbor-fnv" => Ok(Self::CborFnv),
            _ => Err(format!("unknown hash algorithm {name:?}: xxh3, xxh64 and cbor-fnv exist")),
        }
    }
}

/// Everything that decides which key equal tokens get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheme {
    algorithm: Algorithm,
    seed: String,
    block_size: u32,
}

impl Scheme {
    /// A scheme with blocks of `block_size` tokens; 0 reads as 1.
    #[must_use]
    pub fn new(algorithm: Algorithm, seed: impl Into<String>, block_size: u32) -> Self {
        Self { algorithm, seed: seed.into(), block_size: block_size.max(1) }
    }

    /// The algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The seed.
    #[must_use]
    pub fn seed(&self) -> &str {
        &self.seed
    }

    /// Tokens per request block, at least 1.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Changes whenever equal tokens would get other keys:
    /// `XXH3_64("kvx1" ‖ algorithm ‖ u32 block size ‖ u32 len ‖ seed)`.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut input = b"kvx1".to_vec();
        input.extend_from_slice(self.algorithm.as_str().as_bytes());
        input.extend_from_slice(&self.block_size.to_le_bytes());
        push_sized(&mut input, self.seed.as_bytes());
        xxh3::xxh3_64(&input)
    }

    /// The key before a prompt's first block. An empty `lora` is the base model. llm-d's algorithms
    /// let the adapter's name replace the model's.
    #[must_use]
    pub fn root(&self, model: &str, lora: &str) -> RequestKey {
        let name = if lora.is_empty() { model } else { lora };
        RequestKey(match self.algorithm {
            Algorithm::Xxh3 => {
                let mut input = Vec::with_capacity(12 + self.seed.len() + model.len() + lora.len());
                push_sized(&mut input, self.seed.as_bytes());
                push_sized(&mut input, model.as_bytes());
                push_sized(&mut input, lora.as_bytes());
                xxh3::xxh3_64(&input)
            }
            Algorithm::Xxh64 => {
                let mut input = xxh64::xxh64(self.seed.as_bytes(), 0).to_le_bytes().to_vec();
                input.extend_from_slice(&(name.len() as u64).to_le_bytes());
                input.extend_from_slice(name.as_bytes());
                xxh64::xxh64(&input, 0)
            }
            Algorithm::CborFnv => {
                let mut fnv = Fnv::default();
                fnv.cbor_head(4, 3);
                fnv.cbor_head(0, Fnv::of(self.seed.as_bytes()));
                fnv.byte(CBOR_NULL);
                fnv.cbor_text(name.as_bytes());
                fnv.0
            }
        })
    }

    /// The key of the block after `parent`. `tokens` has `block_size` elements; `extras` are the
    /// multimodal hashes that touch the block by start position, each once, then the cache salt
    /// (block 0 only). `scratch` is overwritten and can be reused.
    #[must_use]
    pub fn next(
        &self,
        parent: RequestKey,
        tokens: &[u32],
        extras: &[&[u8]],
        scratch: &mut Vec<u8>,
    ) -> RequestKey {
        RequestKey(match self.algorithm {
            Algorithm::Xxh3 if extras.is_empty() && cfg!(target_endian = "little") => {
                xxh3::xxh3_64_with_seed(bytemuck::cast_slice(tokens), parent.0)
            }
            Algorithm::Xxh3 => {
                scratch.clear();
                push_tokens(scratch, tokens);
                for extra in extras {
                    push_sized(scratch, extra);
                }
                xxh3::xxh3_64_with_seed(scratch, parent.0)
            }
            Algorithm::Xxh64 => {
                scratch.clear();
                scratch.extend_from_slice(&parent.0.to_le_bytes());
                push_tokens(scratch, tokens);
                for extra in extras {
                    scratch.extend_from_slice(&(extra.len() as u64).to_le_bytes());
                    scratch.extend_from_slice(extra);
                }
                xxh64::xxh64(scratch, 0)
            }
            Algorithm::CborFnv => {
                let mut fnv = Fnv::default();
                fnv.cbor_head(4, 3);
                fnv.cbor_head(0, parent.0);
                fnv.cbor_head(4, tokens.len() as u64);
                for &token in tokens {
                    fnv.cbor_head(0, u64::from(token));
                }
                if extras.is_empty() {
                    fnv.byte(CBOR_NULL);
                } else {
                    fnv.cbor_head(4, extras.len() as u64);
                    for extra in extras {
                        fnv.cbor_head(5, 1);
                        fnv.cbor_text(b"Hash");
                        fnv.cbor_text(extra);
                    }
                }
                fnv.0
            }
        })
    }
}

impl Scheme {
    /// The keys of all full blocks of `tokens` behind `parent`, without extras.
    #[must_use]
    pub fn chain(&self, parent: RequestKey, tokens: &[u32]) -> Vec<RequestKey> {
        let blocks = tokens.chunks_exact(self.block_size as usize);
        let mut key = parent;
        if self.algorithm == Algorithm::Xxh3 && cfg!(target_endian = "little") {
            let next = |tokens: &[u32]| {
                key = RequestKey(xxh3::xxh3_64_with_seed(bytemuck::cast_slice(tokens), key.0));
                key
            };
            return blocks.map(next).collect();
        }
        let mut scratch = Vec::new();
        let next = |tokens: &[u32]| {
            key = self.next(key, tokens, &[], &mut scratch);
            key
        };
        blocks.map(next).collect()
    }
}

fn push_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn push_tokens(out: &mut Vec<u8>, tokens: &[u32]) {
    if cfg!(target_endian = "little") {
        out.extend_from_slice(bytemuck::cast_slice(tokens));
    } else {
        out.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
}

const CBOR_NULL: u8 = 0xf6;

/// FNV-1a with 64 bits, fed with canonical CBOR (RFC 7049, section 3.9).
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(14_695_981_039_346_656_037)
    }
}

impl Fnv {
    fn of(bytes: &[u8]) -> u64 {
        let mut fnv = Self::default();
        fnv.bytes(bytes);
        fnv.0
    }

    fn byte(&mut self, byte: u8) {
        self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(1_099_511_628_211);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.byte(byte);
        }
    }

    /// A CBOR head: major type and shortest argument.
    fn cbor_head(&mut self, major: u8, argument: u64) {
        let major = major << 5;
        let bytes = argument.to_be_bytes();
        match argument {
            0..=23 => self.byte(major | bytes[7]),
            24..=0xff => {
                self.byte(major | 24);
                self.byte(bytes[7]);
            }
            0x100..=0xffff => {
                self.byte(major | 25);
                self.bytes(&bytes[6..]);
            }
            0x1_0000..=0xffff_ffff => {
                self.byte(major | 26);
                self.bytes(&bytes[4..]);
            }
            _ => {
                self.byte(major | 27);
                self.bytes(&bytes);
            }
        }
    }

    /// A text string; bytes that are no UTF-8 (embedding digests) go in as a byte string.
    fn cbor_text(&mut self, text: &[u8]) {
        let major = if std::str::from_utf8(text).is_ok() { 3 } else { 2 };
        self.cbor_head(major, text.len() as u64);
        self.bytes(text);
    }
}
