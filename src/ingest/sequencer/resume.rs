//! The sequencer of a publisher whose row was restored from a snapshot.
//!
//! It is in the same place as after a reconnect: the last applied message is known by its hash, what
//! came after is not, and neither is whether the engine is still in that life. The replay tells all
//! of it. A publisher without one can prove nothing, so its row is degraded until a clear, or until
//! numbers or times that run backwards show a new life.

use std::time::Instant;

use super::{Action, Reason, Sequencer, SequencerConfig};
use crate::{ingest::snapshot::RowMark, model::PodState};

impl<P> Sequencer<P> {
    /// A publisher of which everything up to a mark is applied.
    pub(crate) fn resume(config: SequencerConfig, mark: &RowMark) -> Self {
        let mut sequencer = Self::new(config);
        sequencer.epoch = mark.epoch;
        sequencer.first = sequencer.first.min(mark.sequence);
        sequencer.applied = Some(mark.sequence);
        sequencer.newest = mark.newest;
        sequencer.window.push(mark.sequence, mark.payload_hash);
        sequencer.trust = match mark.trust {
            PodState::Live => (PodState::Live, Reason::None),
            PodState::Degraded => (PodState::Degraded, Reason::Restored),
            _ => (PodState::Partial, Reason::Restored),
        };
        sequencer.set_counting = mark.trust == PodState::Degraded;
        sequencer.joined = true;
        sequencer.restored = true;
        sequencer.unproven = true;
        sequencer.shown = None;
        sequencer
    }

    /// What the blocks can be trusted for, a fill under way aside.
    pub(crate) fn trust(&self) -> PodState {
        self.trust.0
    }

    /// Asks for what came after the mark; the replay's first reply shows whether it is the same life.
    pub(super) fn prove(&mut self, now: Instant, out: &mut Vec<Action<P>>) {
        if self.fill.is_some() {
            return;
        }
        if self.trust.0 == PodState::Degraded {
            // What was in doubt then is not known any more; all of it is now.
            out.push(Action::Loss(Reason::Restored));
        }
        if self.config.replay.is_none() {
            self.restored = false;
            return self.degrade(Reason::Restored, self.expected(), out);
        }
        self.begin_fill(self.applied, now, out);
        if let Some(fill) = &mut self.fill {
            // Whatever it was: until then it is a row that is being replayed.
            fill.from_live = true;
            fill.reason = Reason::Restored;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        ingest::sequencer::{Message, ReplayConfig},
        model::RowId,
    };

    /// A machine that goes on after message 4, and what it asked for first.
    fn resumed(replay: bool, trust: PodState) -> (Sequencer<()>, Vec<Action<()>>, Instant) {
        let mark = RowMark {
            id: RowId { pod: "a".into(), rank: None },
            lead: true,
            endpoint: "".into(),
            model: "m".into(),
            fingerprint: 0,
            epoch: 2,
            sequence: 4,
            payload_hash: 4,
            newest: 4.0,
            trust,
            damaged: None,
            muted: false,
            capped: false,
        };
        let replay = replay.then(ReplayConfig::default);
        let mut machine = Sequencer::resume(SequencerConfig { first_sequence: 0, replay }, &mark);
        let (mut out, now) = (Vec::new(), Instant::now());
        machine.start(now, &mut out);
        (machine, out, now)
    }

    fn message(sequence: u64, hash: u64, timestamp: f64) -> Message<()> {
        Message {
            sequence,
            timestamp,
            payload_hash: hash,
            payload_bytes: 1,
            begins_cleared: false,
            payload: (),
        }
    }

    fn delivered(out: &[Action<()>]) -> Vec<u64> {
        let sequences = out.iter().filter_map(|action| match action {
            Action::Deliver(message) => Some(message.sequence),
            _ => None,
        });
        sequences.collect()
    }

    #[test]
    fn the_same_life_goes_on() {
        let (mut machine, out, now) = resumed(true, PodState::Live);
        assert!(out.contains(&Action::RequestReplay { from: 4 }), "{out:?}");
        assert_eq!(machine.state(), (PodState::Replaying, Reason::Restored));
        let mut out = Vec::new();
        // A live message waits until the replay has proved the life.
        machine.message(message(6, 6, 6.0), now, &mut out);
        assert!(delivered(&out).is_empty());
        for sequence in 4..6 {
            machine.replayed(message(sequence, sequence, sequence as f64), now, &mut out);
        }
        assert_eq!(delivered(&out), [5, 6]);
        assert_eq!((machine.epoch(), machine.state()), (2, (PodState::Live, Reason::None)));
        // What came before the mark does not come again.
        machine.message(message(3, 3, 3.0), now, &mut out);
        assert_eq!(delivered(&out), [5, 6]);
    }

    #[test]
    fn another_life_is_noticed_before_its_first_message_counts() {
        // A reply of that number with another payload; a replay with nothing to say; a number that
        // runs backwards.
        for case in 0..3 {
            let (mut machine, _, now) = resumed(true, PodState::Live);
            let mut out = Vec::new();
            match case {
                0 => machine.replayed(message(4, 99, 9.0), now, &mut out),
                1 => machine.replay_end(now, &mut out),
                _ => machine.message(message(0, 77, 9.0), now, &mut out),
            }
            let reset = out.iter().position(|action| *action == Action::Reset { epoch: 3 });
            let first = out.iter().position(|action| matches!(action, Action::Deliver(_)));
            assert!(reset.is_some() && first.is_none_or(|first| reset < Some(first)), "{out:?}");
        }
    }

    #[test]
    fn what_cannot_be_proved_is_degraded() {
        let (machine, out, _) = resumed(false, PodState::Live);
        assert_eq!(machine.state(), (PodState::Degraded, Reason::Restored), "{out:?}");
        // A replay that is silent.
        let (mut machine, _, mut now) = resumed(true, PodState::Live);
        let mut out = Vec::new();
        while machine.state().0 == PodState::Replaying {
            now += Duration::from_secs(5);
            machine.tick(now, &mut out);
        }
        assert_eq!(machine.state(), (PodState::Degraded, Reason::ReplaySilent));
        // One that no longer has it.
        let (mut machine, _, now) = resumed(true, PodState::Live);
        machine.replayed(message(9, 9, 9.0), now, &mut out);
        assert_eq!(machine.state().0, PodState::Degraded);
        // What was in doubt stays so.
        let (mut machine, _, now) = resumed(true, PodState::Partial);
        assert_eq!(machine.state().0, PodState::Replaying);
        machine.replayed(message(4, 4, 4.0), now, &mut out);
        machine.replay_end(now, &mut out);
        assert_eq!(machine.state(), (PodState::Partial, Reason::Restored));
    }
}
