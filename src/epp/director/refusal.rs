//! What is said instead of a routing answer.

use std::fmt;

/// Why the client gets an answer of ours instead of a pod's. The body is
/// `inference error: CODE - message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code} - {message}")]
pub struct Refusal {
    /// Class of the fault.
    pub code: RefusalCode,
    /// What is wrong, as the contract words it.
    pub message: String,
    /// Value of `x-llm-d-request-dropped-reason`.
    pub reason: Option<DropReason>,
}

impl Refusal {
    /// A refusal without a reason header.
    #[must_use]
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), reason: None }
    }

    /// With a reason header.
    #[must_use]
    pub fn because(self, reason: DropReason) -> Self {
        Self { reason: Some(reason), ..self }
    }
}

/// Classes of refusals, with the Go EPP's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// 400.
    BadRequest,
    /// 401.
    Unauthorized,
    /// 403.
    Forbidden,
    /// 404.
    NotFound,
    /// 412.
    PreconditionFailed,
    /// 413: the body is larger than we keep.
    PayloadTooLarge,
    /// 429.
    ResourceExhausted,
    /// 500.
    Internal,
    /// 503.
    ServiceUnavailable,
}

impl RefusalCode {
    /// All codes.
    pub const ALL: [Self; 9] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::PreconditionFailed,
        Self::PayloadTooLarge,
        Self::ResourceExhausted,
        Self::Internal,
        Self::ServiceUnavailable,
    ];

    /// The HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::PreconditionFailed => 412,
            Self::PayloadTooLarge => 413,
            Self::ResourceExhausted => 429,
            Self::Internal => 500,
            Self::ServiceUnavailable => 503,
        }
    }

    /// The name in bodies and in the label `error_code`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "BadRequest",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "NotFound",
            Self::PreconditionFailed => "PreconditionFailed",
            Self::PayloadTooLarge => "PayloadTooLarge",
            Self::ResourceExhausted => "ResourceExhausted",
            Self::Internal => "Internal",
            Self::ServiceUnavailable => "ServiceUnavailable",
        }
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Values of `x-llm-d-request-dropped-reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// No endpoint passed, or no capacity.
    RejectedSaturated,
    /// The pool, or its hinted subset, is empty.
    RejectedNoEndpoints,
}

impl DropReason {
    /// The header's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RejectedSaturated => "rejected-saturated",
            Self::RejectedNoEndpoints => "rejected-no-endpoints",
        }
    }
}
