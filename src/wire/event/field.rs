//! Names and positions of events' fields on the wire.

/// Which event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Stored,
    Removed,
    Cleared,
}

impl Tag {
    /// Fields by position in the array form, after the tag.
    pub(super) const fn positions(self) -> &'static [Field] {
        match self {
            Self::Stored => &[
                Field::BlockHashes,
                Field::Parent,
                Field::TokenIds,
                Field::BlockSize,
                Field::LoraId,
                Field::Medium,
                Field::LoraName,
                Field::ExtraKeys,
                Field::Group,
                Field::Kind,
                Field::Window,
            ],
            Self::Removed => &[Field::BlockHashes, Field::Medium, Field::Group],
            Self::Cleared => &[],
        }
    }

    /// Whether the map form of this event has the field; others are passed over.
    pub(super) const fn has(self, field: Field) -> bool {
        match self {
            Self::Stored => true,
            Self::Removed => {
                matches!(field, Field::BlockHashes | Field::Medium | Field::Group | Field::Locality)
            }
            Self::Cleared => false,
        }
    }
}

/// A field that we read, in either form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Type,
    BlockHashes,
    Parent,
    TokenIds,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    Group,
    Kind,
    Window,
    Locality,
    CacheSalt,
}

impl Field {
    /// The field of a key of the map form.
    #[inline(always)] // a map has a dozen: a call costs more than the common case
    pub(super) fn from_key(key: &[u8]) -> Option<Self> {
        // By length first: a match on the keys alone would compare byte by byte.
        Some(match key.len() {
            4 if key == b"type" => Self::Type,
            6 if key == b"medium" => Self::Medium,
            7 if key == b"lora_id" => Self::LoraId,
            8 if key == b"locality" => Self::Locality,
            9 if key == b"token_ids" => Self::TokenIds,
            9 if key == b"group_idx" => Self::Group,
            9 if key == b"lora_name" => Self::LoraName,
            10 if key == b"block_size" => Self::BlockSize,
            10 if key == b"extra_keys" => Self::ExtraKeys,
            10 if key == b"cache_salt" => Self::CacheSalt,
            12 if key == b"block_hashes" => Self::BlockHashes,
            17 if key == b"parent_block_hash" => Self::Parent,
            18 if key == b"kv_cache_spec_kind" => Self::Kind,
            28 if key == b"kv_cache_spec_sliding_window" => Self::Window,
            _ => return None,
        })
    }

    /// The key of the map form.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::BlockHashes => "block_hashes",
            Self::Parent => "parent_block_hash",
            Self::TokenIds => "token_ids",
            Self::BlockSize => "block_size",
            Self::LoraId => "lora_id",
            Self::Medium => "medium",
            Self::LoraName => "lora_name",
            Self::ExtraKeys => "extra_keys",
            Self::Group => "group_idx",
            Self::Kind => "kv_cache_spec_kind",
            Self::Window => "kv_cache_spec_sliding_window",
            Self::Locality => "locality",
            Self::CacheSalt => "cache_salt",
        }
    }

    /// A bit of its own; the top two of the 16 are free.
    pub(super) const fn bit(self) -> u16 {
        1 << self as u16
    }
}
