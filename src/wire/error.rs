//! Why a message, or one event of it, could not be used: bounded reasons for the counters, and
//! messages that say what was wrong and where.

use super::msgpack::Fault;

/// Why a whole message could not be used.
///
/// Every variant is counted under its [`reason`](Self::reason); none stops a subscriber.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The multipart message does not have the frames of its kind.
    #[error("message has {got} frames, want {want}")]
    FrameCount {
        /// Frames of the message.
        got: usize,
        /// What was expected, in words.
        want: &'static str,
    },
    /// The sequence frame is not 8 bytes.
    #[error("sequence frame has {got} bytes, want 8")]
    Sequence {
        /// Bytes of the frame.
        got: usize,
    },
    /// The sequence is the end marker of a replay where only data may come.
    #[error("sequence is the replay end marker, not data")]
    EndMarker,
    /// The payload frame is empty.
    #[error("payload is empty")]
    EmptyPayload,
    /// The pod id in the topic is over the limit.
    #[error("pod id of {got} bytes in the topic is over the limit of {limit}")]
    PodIdSize {
        /// Bytes of the pod id.
        got: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The model name in the topic is over the limit.
    #[error("model name of {got} bytes in the topic is over the limit of {limit}")]
    ModelSize {
        /// Bytes of the name.
        got: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The payload is over the limit, so it was not parsed.
    #[error("payload of {got} bytes is over the limit of {limit}")]
    PayloadSize {
        /// Bytes of the payload.
        got: usize,
        /// [`Limits::payload_bytes`](super::Limits::payload_bytes).
        limit: usize,
    },
    /// The payload ends inside a value, or declares more than it has.
    #[error("payload is cut short at byte {offset}")]
    Truncated {
        /// Where the missing value starts.
        offset: usize,
    },
    /// The payload is not msgpack.
    #[error("payload is not msgpack at byte {offset}")]
    Malformed {
        /// Where the impossible marker is.
        offset: usize,
    },
    /// Containers are nested too deep.
    #[error("payload is nested deeper than {limit} at byte {offset}")]
    Nesting {
        /// Where the container too many starts.
        offset: usize,
        /// The limit that applied.
        limit: usize,
    },
    /// Bytes follow the batch.
    #[error("{bytes} bytes follow the batch at byte {offset}")]
    TrailingBytes {
        /// Where the batch ends.
        offset: usize,
        /// How many bytes follow.
        bytes: usize,
    },
    /// The payload is msgpack, but not an array.
    #[error("batch is {found}, want array")]
    NotABatch {
        /// The type found.
        found: &'static str,
    },
    /// The batch has fewer than two elements.
    #[error("batch has {got} elements, want at least 2")]
    BatchLength {
        /// Elements of the batch.
        got: usize,
    },
    /// The timestamp is not a finite number.
    #[error("timestamp is {found}, want a finite number")]
    Timestamp {
        /// What was found instead.
        found: &'static str,
    },
    /// The second element is not an array.
    #[error("events are {found}, want array")]
    Events {
        /// The type found.
        found: &'static str,
    },
    /// The batch has more events than the limit.
    #[error("batch of {got} events is over the limit of {limit}")]
    TooManyEvents {
        /// Events that the batch declares.
        got: usize,
        /// [`Limits::events`](super::Limits::events).
        limit: usize,
    },
    /// The rank is neither nil nor an integer of 32 bits without sign.
    #[error("data-parallel rank at byte {offset} is {found}, want nil or 0..=4294967295")]
    Rank {
        /// Where the rank is.
        offset: usize,
        /// What was found instead.
        found: &'static str,
    },
}

impl DecodeError {
    /// Every value of [`reason`](Self::reason), for counters that start at 0.
    pub const REASONS: &'static [&'static str] = &[
        "frame_count",
        "sequence",
        "end_marker",
        "empty_payload",
        "pod_id_size",
        "model_size",
        "payload_size",
        "truncated",
        "malformed",
        "nesting",
        "trailing_bytes",
        "not_a_batch",
        "batch_length",
        "timestamp",
        "events",
        "too_many_events",
        "rank",
    ];

    /// A bounded label value for counters.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::FrameCount { .. } => "frame_count",
            Self::Sequence { .. } => "sequence",
            Self::EndMarker => "end_marker",
            Self::EmptyPayload => "empty_payload",
            Self::PodIdSize { .. } => "pod_id_size",
            Self::ModelSize { .. } => "model_size",
            Self::PayloadSize { .. } => "payload_size",
            Self::Truncated { .. } => "truncated",
            Self::Malformed { .. } => "malformed",
            Self::Nesting { .. } => "nesting",
            Self::TrailingBytes { .. } => "trailing_bytes",
            Self::NotABatch { .. } => "not_a_batch",
            Self::BatchLength { .. } => "batch_length",
            Self::Timestamp { .. } => "timestamp",
            Self::Events { .. } => "events",
            Self::TooManyEvents { .. } => "too_many_events",
            Self::Rank { .. } => "rank",
        }
    }

    /// The error for a fault; `wrong_type` makes the one for a value of an unexpected type.
    #[cold]
    pub(super) fn from_fault(
        fault: Fault,
        depth: usize,
        wrong_type: impl FnOnce(usize, &'static str) -> Self,
    ) -> Self {
        match fault {
            Fault::Truncated { offset } => Self::Truncated { offset },
            Fault::Reserved { offset } => Self::Malformed { offset },
            Fault::TooDeep { offset } => Self::Nesting { offset, limit: depth },
            Fault::Type { offset, found } => wrong_type(offset, found.as_str()),
        }
    }
}

/// Why one event of a batch could not be used. The others of its batch are not affected.
///
/// `event` is the event's number in its batch, from 0. Every variant is counted under its
/// [`reason`](Self::reason).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// The event is neither an array nor a map.
    #[error("event {event} is {found}, want array or map")]
    NotAnEvent {
        /// Number in the batch.
        event: usize,
        /// The type found.
        found: &'static str,
    },
    /// The event has no tag.
    #[error("event {event} has no tag")]
    MissingTag {
        /// Number in the batch.
        event: usize,
    },
    /// The tag is not a string.
    #[error("tag of event {event} is {found}, want str")]
    TagType {
        /// Number in the batch.
        event: usize,
        /// The type found.
        found: &'static str,
    },
    /// The tag names no event that we know: an engine newer than this program.
    #[error("event {event} has the unknown tag {tag:?}")]
    UnknownTag {
        /// Number in the batch.
        event: usize,
        /// The tag, at most its first 32 bytes.
        tag: Box<str>,
    },
    /// A required field is absent.
    #[error("event {event} has no {field}")]
    MissingField {
        /// Number in the batch.
        event: usize,
        /// Its name in the map form.
        field: &'static str,
    },
    /// A field, or a value in it, has the wrong type.
    #[error("{field} of event {event} has {found} at byte {offset}")]
    FieldType {
        /// Number in the batch.
        event: usize,
        /// Its name in the map form.
        field: &'static str,
        /// Where in the payload.
        offset: usize,
        /// The type found.
        found: &'static str,
    },
    /// A number is negative or too large.
    #[error("{field} of event {event} is out of range at byte {offset}")]
    FieldRange {
        /// Number in the batch.
        event: usize,
        /// Its name in the map form.
        field: &'static str,
        /// Where in the payload.
        offset: usize,
    },
    /// A block hash is a byte string of no bytes.
    #[error("{field} of event {event} has an empty hash at byte {offset}")]
    EmptyHash {
        /// Number in the batch.
        event: usize,
        /// Its name in the map form.
        field: &'static str,
        /// Where in the payload.
        offset: usize,
    },
    /// A token is not an integer of 32 bits without sign, nor a pair that starts with one.
    #[error("token of event {event} at byte {offset} is {found}, want 0..=4294967295")]
    Token {
        /// Number in the batch.
        event: usize,
        /// Where in the payload.
        offset: usize,
        /// What was found instead.
        found: &'static str,
    },
    /// A string is not UTF-8.
    #[error("{field} of event {event} is not UTF-8")]
    Utf8 {
        /// Number in the batch.
        event: usize,
        /// Its name in the map form.
        field: &'static str,
    },
    /// A known key occurs twice in the map.
    #[error("event {event} has {field} twice")]
    DuplicateKey {
        /// Number in the batch.
        event: usize,
        /// The key.
        field: &'static str,
    },
    /// The tokens fill the blocks exactly, yet there is not one list of extra keys per block.
    #[error("event {event} has extra keys for {got} blocks, and {blocks} blocks")]
    ExtraKeysLength {
        /// Number in the batch.
        event: usize,
        /// Lists of extra keys.
        got: usize,
        /// Block hashes.
        blocks: usize,
    },
    /// More blocks than the limit.
    #[error("event {event} has {got} blocks, limit {limit}")]
    TooManyBlocks {
        /// Number in the batch.
        event: usize,
        /// Hashes that the event declares.
        got: usize,
        /// [`Limits::blocks`](super::Limits::blocks).
        limit: usize,
    },
    /// More extra keys than one block or one event may have.
    #[error("event {event} has {got} extra keys, limit {limit}")]
    TooManyExtras {
        /// Number in the batch.
        event: usize,
        /// Inputs of a block, or of all blocks so far.
        got: usize,
        /// The limit that they passed.
        limit: usize,
    },
    /// More tokens than the limit.
    #[error("event {event} has {got} tokens, limit {limit}")]
    TooManyTokens {
        /// Number in the batch.
        event: usize,
        /// Tokens that the event declares.
        got: usize,
        /// [`Limits::tokens`](super::Limits::tokens).
        limit: usize,
    },
    /// The bytes are not msgpack. A batch with such bytes is refused before its events are read.
    #[error("event {event} is malformed at byte {offset}")]
    Malformed {
        /// Number in the batch.
        event: usize,
        /// Where in the payload.
        offset: usize,
    },
}

impl EventError {
    /// Every value of [`reason`](Self::reason), for counters that start at 0.
    pub const REASONS: &'static [&'static str] = &[
        "not_an_event",
        "missing_tag",
        "tag_type",
        "unknown_tag",
        "missing_field",
        "field_type",
        "field_range",
        "empty_hash",
        "token",
        "utf8",
        "duplicate_key",
        "extra_keys_length",
        "too_many_blocks",
        "too_many_extras",
        "too_many_tokens",
        "malformed_event",
    ];

    /// A bounded label value for counters.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAnEvent { .. } => "not_an_event",
            Self::MissingTag { .. } => "missing_tag",
            Self::TagType { .. } => "tag_type",
            Self::UnknownTag { .. } => "unknown_tag",
            Self::MissingField { .. } => "missing_field",
            Self::FieldType { .. } => "field_type",
            Self::FieldRange { .. } => "field_range",
            Self::EmptyHash { .. } => "empty_hash",
            Self::Token { .. } => "token",
            Self::Utf8 { .. } => "utf8",
            Self::DuplicateKey { .. } => "duplicate_key",
            Self::ExtraKeysLength { .. } => "extra_keys_length",
            Self::TooManyBlocks { .. } => "too_many_blocks",
            Self::TooManyExtras { .. } => "too_many_extras",
            Self::TooManyTokens { .. } => "too_many_tokens",
            Self::Malformed { .. } => "malformed_event",
        }
    }
}
