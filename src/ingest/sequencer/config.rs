//! Settings of one publisher's sequencer.

use std::time::Duration;

/// How a replay is asked for and when it is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayConfig {
    /// Without progress for this long, an attempt has failed.
    pub idle: Duration,
    /// Attempts without any progress before the replay is given up.
    pub attempts: u32,
    /// After a given-up replay, gaps are not repaired for this long.
    pub cooldown: Duration,
    /// Live messages held while a replay runs, at most.
    pub held_messages: usize,
    /// Their payload bytes, at most.
    pub held_bytes: usize,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(2),
            attempts: 3,
            cooldown: Duration::from_secs(30),
            held_messages: 16_384,
            held_bytes: 128 << 20,
        }
    }
}

/// Settings of one publisher.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequencerConfig {
    /// Sequence of the first message of a life of the engine: 0, or 1.
    pub first_sequence: u64,
    /// Absent: the publisher has no replay socket.
    pub replay: Option<ReplayConfig>,
}
