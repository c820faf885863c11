//! What can go wrong in a call of the gRPC API, and the one place where it becomes a status.

use prost::Message;
use tonic::{Code, Status};

use crate::{
    indexer::registry::RegistryError, ingest::speculation::TooMany, tokenize::TokenizeError,
};

/// Longest piece of a caller's text that a message repeats, in bytes. Statuses travel in HTTP/2
/// headers, which clients bound (8 KiB is common).
const ECHO_BYTES: usize = 128;

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// A field of the request is not legal.
    #[error("{field}: {why}")]
    Invalid {
        /// Path of the field, such as `prompts[3].token_ids_le`.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// The caller hashed with other settings than ours; its keys could only miss.
    #[error(
        "{field}: the request has {request:#018x}, model {model} has {server:#018x}: \
         algorithm, seed and block size must equal those of ListPods"
    )]
    Fingerprint {
        /// Path of the fingerprint.
        field: String,
        /// Model of the request.
        model: String,
        /// Fingerprint in the request.
        request: u64,
        /// Fingerprint of the model's settings here.
        server: u64,
    },
    /// Text was sent, and the model has no tokenizer here.
    #[error(
        "{field}: no tokenizer is configured for model {model}: see `tokenizers`, or send token_ids_le or block_keys"
    )]
    NoTokenizer {
        /// Path of the text.
        field: String,
        /// Model of the request.
        model: String,
    },
    /// Text was sent, and has no tokens now, or none that we can know.
    #[error("{field}: {error}")]
    Tokenize {
        /// Path of the text.
        field: String,
        /// Why; neither `NotConfigured` nor `Invalid`.
        error: TokenizeError,
    },
    /// Text was sent on a stream, whose answers keep their order and cannot wait for a tokenizer.
    #[error("{field}: not on ScoreStream: use Score, or send token_ids_le or block_keys")]
    NotOnStream {
        /// Path of the text.
        field: String,
    },
    /// The caller's time ran out.
    #[error("deadline passed after {done} of {prompts} prompts")]
    Deadline {
        /// Prompts that were answered.
        done: usize,
        /// Prompts of the request.
        prompts: usize,
    },
    /// The caller's time ran out while it waited for an event.
    #[error("deadline passed while waiting; timeout_ms ends a wait with an answer")]
    WaitDeadline,
    /// The answer is larger than a message may be.
    #[error(
        "the answer has {bytes} bytes or more, the limit is {limit}: ask for fewer prompts, \
         max_pods or SCORE_DETAIL_COMPACT"
    )]
    AnswerTooLarge {
        /// Encoded size up to the prompt that exceeded the limit.
        bytes: usize,
        /// Configured limit.
        limit: usize,
    },
    /// No such row.
    #[error("pod: {pod} is not registered")]
    UnknownPod {
        /// Pod, with `#rank` where a rank was asked for.
        pod: String,
    },
    /// No such speculative entry; it may have expired.
    #[error("handle: {handle} is unknown or has expired")]
    UnknownHandle {
        /// The handle.
        handle: u64,
    },
    /// The cap of speculative entries is reached.
    #[error(transparent)]
    TooManySpeculations(#[from] TooMany),
    /// The registry refused a declaration.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Not built.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// The server is going away; ask another replica.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl ScoreError {
    /// An illegal field.
    pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into() }
    }

    /// The status code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Fingerprint { .. } | Self::NoTokenizer { .. } => Code::FailedPrecondition,
            Self::Tokenize { error, .. } => match error {
                TokenizeError::Busy => Code::ResourceExhausted,
                TokenizeError::Late => Code::DeadlineExceeded,
                TokenizeError::Unavailable(_) => Code::Unavailable,
                TokenizeError::Invalid(_) => Code::InvalidArgument,
                TokenizeError::NotConfigured
                | TokenizeError::NoChatTemplate
                | TokenizeError::Multimodal
                | TokenizeError::Unsupported => Code::FailedPrecondition,
            },
            Self::NotOnStream { .. } | Self::Unimplemented(_) => Code::Unimplemented,
            Self::Deadline { .. } | Self::WaitDeadline => Code::DeadlineExceeded,
            Self::AnswerTooLarge { .. } | Self::TooManySpeculations { .. } => {
                Code::ResourceExhausted
            }
            Self::UnknownPod { .. } | Self::UnknownHandle { .. } => Code::NotFound,
            Self::Registry(error) => match error {
                RegistryError::Invalid { .. } => Code::InvalidArgument,
                RegistryError::Full { .. } => Code::ResourceExhausted,
                RegistryError::Fixed { .. } => Code::FailedPrecondition,
                RegistryError::Unavailable(_) => Code::Unavailable,
            },
            Self::ShuttingDown => Code::Unavailable,
        }
    }

    /// Path of the offending field; empty when no single field is at fault.
    #[must_use]
    pub fn field(&self) -> &str {
        match self {
            Self::Invalid { field, .. }
            | Self::NoTokenizer { field, .. }
            | Self::Tokenize { field, .. }
            | Self::NotOnStream { field }
            | Self::Fingerprint { field, .. } => field,
            Self::UnknownPod { .. } => "pod",
            Self::UnknownHandle { .. } => "handle",
            Self::Registry(RegistryError::Invalid { field, .. }) => field,
            _ => "",
        }
    }

    /// The same error with its field path under `parent`, for requests that contain a request.
    pub(crate) fn within(self, parent: &str) -> Self {
        match self {
            Self::Invalid { field, why } => {
                Self::Invalid { field: format!("{parent}.{field}"), why }
            }
            Self::NoTokenizer { field, model } => {
                Self::NoTokenizer { field: format!("{parent}.{field}"), model }
            }
            Self::Tokenize { field, error } => {
                Self::Tokenize { field: format!("{parent}.{field}"), error }
            }
            Self::Fingerprint { field, model, request, server } => {
                Self::Fingerprint { field: format!("{parent}.{field}"), model, request, server }
            }
            other => other,
        }
    }
}

impl From<ScoreError> for Status {
    fn from(error: ScoreError) -> Self {
        let (code, message) = (error.code(), error.to_string());
        match error.field() {
            "" => Self::new(code, message),
            field => {
                let details = field_violation(code, &message, field);
                Self::with_details(code, message, details.into())
            }
        }
    }
}

/// `text`, cut for a message.
pub(crate) fn echo(text: &str) -> String {
    if text.len() <= ECHO_BYTES {
        return text.to_owned();
    }
    let cut = text.floor_char_boundary(ECHO_BYTES);
    format!("{}…", text.get(..cut).unwrap_or_default())
}

/// The encoded `google.rpc.Status` with one `google.rpc.BadRequest`, which clients read from
/// `grpc-status-details-bin`. Three messages written out are less than a crate of all of them.
fn field_violation(code: Code, message: &str, field: &str) -> Vec<u8> {
    let violation = FieldViolation { field: field.to_owned(), description: message.to_owned() };
    let any = Any {
        type_url: "type.googleapis.com/google.rpc.BadRequest".to_owned(),
        value: BadRequest { field_violations: vec![violation] }.encode_to_vec(),
    };
    RpcStatus { code: code.into(), message: message.to_owned(), details: vec![any] }.encode_to_vec()
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `google.rpc.BadRequest`.
#[derive(Clone, PartialEq, Message)]
struct BadRequest {
    #[prost(message, repeated, tag = "1")]
    field_violations: Vec<FieldViolation>,
}

/// `google.rpc.BadRequest.FieldViolation`.
#[derive(Clone, PartialEq, Message)]
struct FieldViolation {
    #[prost(string, tag = "1")]
    field: String,
    #[prost(string, tag = "2")]
    description: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_error_carries_a_bad_request() {
        let status = Status::from(ScoreError::invalid("prompts[3].token_ids_le", "odd length"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "prompts[3].token_ids_le: odd length");
        let decoded = RpcStatus::decode(status.details()).unwrap();
        assert_eq!(decoded.code, 3);
        let bad = BadRequest::decode(decoded.details[0].value.as_slice()).unwrap();
        assert_eq!(bad.field_violations[0].field, "prompts[3].token_ids_le");
    }

    #[test]
    fn messages_repeat_only_the_start_of_long_text() {
        assert_eq!(echo("short"), "short");
        let long = echo(&"ä".repeat(500));
        assert!(long.len() <= ECHO_BYTES + '…'.len_utf8() && long.ends_with('…'), "{long}");
    }
}
