//! What the sequencer takes and what it asks for.

use std::fmt;

use crate::model::{CountMode, PodState};

/// One batch of a publisher, from the live stream or from a replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Message<P> {
    /// Number that the publisher gave it. `u64::MAX` is the replay's end marker and never data.
    pub sequence: u64,
    /// Seconds since the Unix epoch on the engine's clock. Need not be finite.
    pub timestamp: f64,
    /// Hash of the payload bytes: equal sequences with equal hashes are one message.
    pub payload_hash: u64,
    /// What holding the message costs, bytes.
    pub payload_bytes: usize,
    /// It begins with an `AllBlocksCleared`, as SGLang's first batch of a life does. Asked of the
    /// first sequence only.
    pub begins_cleared: bool,
    /// Moved through, never looked at.
    pub payload: P,
}

/// What the caller has to do, in the order given.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<P> {
    /// Apply the batch.
    Deliver(Message<P>),
    /// The engine began a new life: every block of the publisher goes, and it counts in the
    /// configured mode again.
    Reset {
        /// Number of the new life; the first is 1.
        epoch: u64,
    },
    /// Same life, but the whole history follows as [`Action::Deliver`]: every block goes first.
    Rebuild,
    /// From here on stores and removals add up like this.
    CountMode(CountMode),
    /// Removals may have been lost before the next [`Action::Deliver`]: whatever is held and not
    /// named by that one or a later one is in doubt.
    Loss(Reason),
    /// From here on they add up as configured for the pod.
    CountModeDefault,
    /// True as soon as every action before it has been carried out.
    State(PodState, Reason),
    /// The overlay: disconnected, or not.
    Stale(bool),
    /// Ask the engine's replay socket for everything from `from` on, on a fresh socket: replies to
    /// an earlier request must not reach the sequencer any more.
    RequestReplay {
        /// First sequence wanted.
        from: u64,
    },
    /// Close the replay socket, if it is open.
    CancelReplay,
    /// Count one of these.
    Count(Counter),
}

/// What is counted, each a label value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counter {
    /// A message that was received before, dropped.
    Duplicate,
    /// A message older than what is applied and not remembered, dropped.
    Late,
    /// Sequences are missing before a live message.
    Gap,
    /// Messages were applied behind missing ones that nobody could supply.
    GapUnfilled,
    /// A replay request.
    Replay,
    /// A replay that was given up.
    ReplayFailed,
    /// Sequences that a fresh replay does not have either.
    Hole,
    /// A new life of the engine.
    Restart,
    /// A live message that did not fit beside those already held, dropped; replay has it.
    HeldOverflow,
    /// The replay's end marker where a message belongs, dropped.
    EndMarker,
    /// A partial or degraded state that a whole replay ended.
    Healed,
    /// An attempt at that which changed nothing.
    HealFailed,
}

impl Counter {
    /// Every counter, in the order of its label.
    pub const ALL: [Self; 12] = [
        Self::Duplicate,
        Self::Late,
        Self::Gap,
        Self::GapUnfilled,
        Self::Replay,
        Self::ReplayFailed,
        Self::Hole,
        Self::Restart,
        Self::HeldOverflow,
        Self::EndMarker,
        Self::Healed,
        Self::HealFailed,
    ];

    /// Label value for metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Late => "late",
            Self::Gap => "gap",
            Self::GapUnfilled => "gap_unfilled",
            Self::Replay => "replay",
            Self::ReplayFailed => "replay_failed",
            Self::Hole => "hole",
            Self::Restart => "restart",
            Self::HeldOverflow => "held_overflow",
            Self::EndMarker => "end_marker",
            Self::Healed => "healed",
            Self::HealFailed => "heal_failed",
        }
    }
}

/// Why a state is what it is. [`Display`](fmt::Display) is the sentence for people, empty for
/// [`Reason::None`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Nothing to explain.
    #[default]
    None,
    /// The first message was not the publisher's first, and there is no replay to ask.
    JoinedMidStream,
    /// The engine no longer has what came before.
    HistoryStarts {
        /// Oldest sequence that it has.
        at: u64,
    },
    /// The replay socket did not answer.
    ReplaySilent,
    /// Messages are missing.
    Gap {
        /// How many.
        missing: u64,
        /// The first of them.
        at: u64,
    },
    /// The replay itself lacks messages.
    Hole {
        /// The first of them.
        at: u64,
    },
    /// After a reconnect without proof, the publisher's clock is behind: another life, or the same
    /// one with its clock set back.
    ClockBack {
        /// The sequence that came with it.
        at: u64,
    },
    /// After a reconnect: is it still the same life of the engine?
    Reconnected,
    /// It began with a snapshot: what came after is asked for, or cannot be, or was in doubt already.
    Restored,
}

impl Reason {
    /// Label value for metrics, without numbers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::JoinedMidStream => "joined_mid_stream",
            Self::HistoryStarts { .. } => "history_starts",
            Self::ReplaySilent => "replay_silent",
            Self::Gap { .. } => "gap",
            Self::Hole { .. } => "hole",
            Self::ClockBack { .. } => "clock_back",
            Self::Reconnected => "reconnected",
            Self::Restored => "restored",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::JoinedMidStream => f.write_str("joined mid-stream, no replay"),
            Self::HistoryStarts { at } => write!(f, "replay history starts at {at}"),
            Self::ReplaySilent => f.write_str("replay silent"),
            Self::Gap { missing, at } => write!(f, "gap of {missing} batches at {at}"),
            Self::Hole { at } => write!(f, "hole in replay at {at}"),
            Self::ClockBack { at } => write!(f, "clock set back after a reconnect at {at}"),
            Self::Reconnected => f.write_str("checking after a reconnect"),
            Self::Restored => f.write_str("restored from a snapshot"),
        }
    }
}
