//! One publisher's batches → its row of the index. Runs on the row's lane.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    index::{BlockIndex, Extras, Remove, RowImage, Store, StoreOutcome},
    ingest::{
        fleet::{Fleet, PodDeclaration, Row},
        loss::{Doubt, LossConfig},
        metrics::IngestMetrics,
        sequencer::Reason,
        snapshot::RowMark,
    },
    model::{CountMode, ExtraKey, GroupKind, PodState, TierId, TierTable},
    support::clock::unix_ns,
    wire::{BatchReader, BlockRemoved, BlockStored, Event, EventError, Limits, Scratch},
};

/// Live engine keys stored again with other tokens before the stream counts as unchained. vLLM
/// and SGLang ≥ 0.5.7 chain their hashes and never do it.
const UNCHAINED_AFTER: u64 = 8;

/// What every applier needs.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) tiers: Arc<TierTable>,
    pub(crate) metrics: IngestMetrics,
    pub(crate) limits: Limits,
    pub(crate) orphan_timeout: Duration,
    pub(crate) loss: LossConfig,
}

/// Where in its stream a row is, as the next snapshot will say it.
#[derive(Debug)]
pub(crate) struct Position {
    /// Sequence and payload hash of the last batch applied in this life.
    last: Option<(u64, u64)>,
    /// Newest timestamp applied in it.
    newest: f64,
    /// What the blocks can be trusted for, a replay under way aside.
    trust: PodState,
    /// The publisher is declared without a rank.
    unranked: bool,
}

impl Position {
    /// A batch was applied.
    pub(crate) fn applied(&mut self, sequence: u64, payload_hash: u64, timestamp: f64) {
        self.last = Some((sequence, payload_hash));
        if timestamp.is_finite() && timestamp > self.newest {
            self.newest = timestamp;
        }
    }

    /// What comes can be trusted for this.
    pub(crate) fn trust(&mut self, trust: PodState) {
        self.trust = trust;
    }

    fn restart(&mut self) {
        (self.last, self.newest) = (None, f64::NEG_INFINITY);
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Applier {
    shared: Arc<Shared>,
    row: Arc<Row>,
    default_mode: CountMode,
    /// Events are decoded and checked, but not indexed: hashes of this engine are not chained.
    dry: bool,
    trust_unchained: bool,
    epoch: u64,
    state: PodState,
    reason: Reason,
    /// A batch or a removal could not be used: scores may be high, whatever the sequencer says.
    damaged: Option<u64>,
    doubt: Doubt,
    conflicts: u64,
    muted: bool,
    scratch: Scratch,
    /// An AllBlocksCleared was applied at (epoch, sequence); for the sequencer.
    cleared: Option<(u64, u64)>,
    pub(crate) position: Position,
}

impl Applier {
    pub(crate) fn new(shared: &Arc<Shared>, row: &Arc<Row>, declaration: &PodDeclaration) -> Self {
        let dry = !declaration.trust_unchained && is_unchained(declaration);
        if dry {
            tracing::warn!(
                pod = %row.id,
                version = declaration.engine_version.as_deref().unwrap_or_default(),
                "Engine does not chain its hashes; its events are not indexed.",
            );
        }
        Self {
            shared: Arc::clone(shared),
            row: Arc::clone(row),
            default_mode: declaration.count_mode,
            dry,
            trust_unchained: declaration.trust_unchained,
            epoch: 1,
            state: PodState::Connecting,
            reason: Reason::None,
            damaged: None,
            doubt: Doubt::new(&shared.loss, declaration.loss_policy),
            conflicts: 0,
            muted: false,
            scratch: Scratch::default(),
            cleared: None,
            position: Position {
                last: None,
                newest: f64::NEG_INFINITY,
                trust: PodState::Live,
                unranked: declaration.rank.is_none(),
            },
        }
    }

    /// Goes on from a snapshot, with the row that was restored from it.
    pub(crate) fn resume(&mut self, mark: &RowMark) {
        self.epoch = mark.epoch;
        (self.damaged, self.muted) = (mark.damaged, mark.muted);
        self.position.last = Some((mark.sequence, mark.payload_hash));
        (self.position.newest, self.position.trust) = (mark.newest, mark.trust);
        (self.state, self.reason) = (PodState::Replaying, Reason::Restored);
        self.count_mode((mark.trust == PodState::Degraded).then_some(CountMode::Set));
        self.publish();
    }

    /// What a snapshot says of the row beside its blocks; nothing before the first batch of a life.
    pub(crate) fn mark(&self) -> Option<RowMark> {
        let (sequence, payload_hash) = self.position.last?;
        let row = &self.row;
        (!row.model.is_empty()).then(|| RowMark {
            id: row.id.clone(),
            lead: self.position.unranked,
            endpoint: Arc::clone(&row.endpoint),
            model: Arc::clone(&row.model),
            fingerprint: row.scheme.fingerprint(),
            epoch: self.epoch,
            sequence,
            payload_hash,
            newest: self.position.newest,
            trust: self.position.trust,
            damaged: self.damaged,
            muted: self.muted,
            capped: row.status().capped,
        })
    }

    /// A copy of the row's blocks.
    pub(crate) fn image(&self) -> Option<RowImage> {
        self.index().export(self.row.slot)
    }

    fn index(&self) -> &dyn BlockIndex {
        &**self.shared.fleet.index()
    }

    /// Where the last AllBlocksCleared was applied, once.
    pub(crate) fn take_cleared(&mut self) -> Option<(u64, u64)> {
        self.cleared.take()
    }

    /// A new life of the engine begins.
    pub(crate) fn reset(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.forget();
        self.row.new_epoch(epoch);
        self.shared.fleet.changed();
    }

    /// The same life from its beginning: every block goes, the whole history follows.
    pub(crate) fn rebuild(&mut self) {
        self.forget();
        // Sequences that were visible are not any more.
        self.row.new_epoch(self.epoch);
    }

    fn forget(&mut self) {
        self.position.restart();
        self.index().clear(self.row.slot);
        self.doubt.forget();
        self.row.update(|status| status.capped = false);
        self.count_mode(None);
        self.recover();
    }

    /// Nothing that was misread or reused is left.
    fn recover(&mut self) {
        self.conflicts = 0;
        let muted = std::mem::take(&mut self.muted);
        if muted {
            self.index().set_muted(self.row.slot, false);
        }
        let damaged = self.damaged.take().is_some();
        if damaged {
            self.count_mode(None);
        }
        if muted || damaged {
            self.publish();
        }
    }

    /// From here on the row counts like this; `None` = as configured.
    pub(crate) fn count_mode(&mut self, mode: Option<CountMode>) {
        // What could not be read may have been a removal: one is enough until all is known again.
        let mode = mode.or(self.damaged.map(|_| CountMode::Set));
        self.index().set_count_mode(self.row.slot, mode.unwrap_or(self.default_mode));
    }

    pub(crate) fn state(&mut self, state: PodState, reason: Reason) {
        (self.state, self.reason) = (state, reason);
        self.publish();
    }

    fn publish(&self) {
        let (state, reason) = if self.muted {
            (PodState::Degraded, "unchained: engine keys are reused for other tokens".to_owned())
        } else if let (Some(sequence), PodState::Live | PodState::Partial | PodState::Replaying) =
            (self.damaged, self.state)
        {
            (PodState::Degraded, format!("batch {sequence} could not be read in full"))
        } else if self.dry && self.state == PodState::Live {
            (PodState::Partial, "not indexed: the engine does not chain its hashes".to_owned())
        } else {
            (self.state, self.reason.to_string())
        };
        self.row.update(|status| {
            status.state = state;
            status.reason = reason;
        });
        self.shared.fleet.changed();
    }

    /// Applies one batch and makes it visible.
    pub(crate) fn batch(&mut self, sequence: u64, payload: &[u8], now: Instant) {
        let shared = Arc::clone(&self.shared);
        let metrics = &shared.metrics;
        let mut scratch = std::mem::take(&mut self.scratch);
        let (mut rejected, mut orphans, mut refused) = (0, 0, 0);
        let mut timestamp = 0.0;
        match BatchReader::new(payload, &shared.limits) {
            Ok(mut reader) => {
                timestamp = reader.header().timestamp;
                while let Some(event) = reader.next_event(&mut scratch) {
                    match event {
                        Ok(_) if self.dry => {}
                        Ok(Event::Stored(stored)) => {
                            let outcome = self.stored(&stored, now);
                            orphans += u64::from(outcome.orphaned + outcome.orphans_dropped);
                            refused += u64::from(outcome.refused);
                        }
                        Ok(Event::Removed(removed)) => self.removed(&removed, sequence),
                        Ok(Event::Cleared) => {
                            metrics.cleared_events.inc();
                            self.cleared(sequence);
                        }
                        Err(error) => {
                            rejected += 1;
                            metrics.reject(error.reason());
                            tracing::debug!(pod = %self.row.id, sequence, %error, "Event skipped.");
                            if !matches!(error, EventError::UnknownTag { .. }) {
                                self.damage(sequence, now);
                            }
                        }
                    }
                }
                metrics.batches.inc();
            }
            Err(error) => {
                rejected += 1;
                metrics.reject(error.reason());
                tracing::debug!(pod = %self.row.id, sequence, %error, "Batch skipped.");
                self.damage(sequence, now);
            }
        }
        self.scratch = scratch;
        let visible = unix_ns();
        let lag_us = (timestamp > 0.0).then(|| (visible as f64 / 1e3 - timestamp * 1e6) as i64);
        if let Some(lag_us) = lag_us {
            metrics.lag.observe((lag_us as f64 / 1e6).max(0.0));
        }
        self.row.update(|status| {
            status.lag_us = lag_us.unwrap_or(status.lag_us);
            status.rejected_events += rejected;
            status.orphans += orphans;
            status.refused_blocks += refused;
            status.capped |= refused > 0;
            status.last_applied_unix_ns = visible;
        });
        self.row.applied(self.epoch, sequence, visible);
    }

    /// Whatever was missing or left over is gone with the rest.
    fn cleared(&mut self, sequence: u64) {
        self.index().clear(self.row.slot);
        self.doubt.forget();
        self.row.update(|status| status.capped = false);
        self.recover();
        if matches!(self.state, PodState::Partial | PodState::Degraded) {
            self.count_mode(None);
            self.state(PodState::Live, Reason::None);
        }
        self.position.trust(PodState::Live);
        self.cleared = Some((self.epoch, sequence));
    }

    /// Something that may have been a removal was lost: count so that the next one heals it.
    fn damage(&mut self, sequence: u64, now: Instant) {
        self.lost("unreadable", now);
        if self.damaged.is_none() {
            self.damaged = Some(sequence);
            self.count_mode(Some(CountMode::Set));
            self.publish();
        }
    }

    /// Removals may have been lost before what is applied from here on.
    pub(crate) fn lost(&mut self, reason: &str, now: Instant) {
        self.shared.metrics.losses.with_label_values(&[reason]).inc();
        let shared = Arc::clone(&self.shared);
        self.doubt.lost(&**shared.fleet.index(), self.row.slot, now);
    }

    /// Drops a slice of what has been in doubt for too long; is there more?
    pub(crate) fn age(&mut self, now: Instant) -> bool {
        let shared = Arc::clone(&self.shared);
        let dropped = self.doubt.age(&**shared.fleet.index(), self.row.slot, now);
        shared.metrics.aged_out_blocks.inc_by(dropped.blocks);
        dropped.more
    }

    fn tier(&self, medium: Option<&str>, locality: Option<&str>) -> TierId {
        let remote = locality.is_some_and(|locality| locality.eq_ignore_ascii_case("remote"));
        self.shared.tiers.id(if remote { Some("remote") } else { medium })
    }

    fn stored(&mut self, event: &BlockStored<'_>, now: Instant) -> StoreOutcome {
        let metrics = &self.shared.metrics;
        metrics.stored_events.inc();
        metrics.stored_blocks.inc_by(event.block_hashes.len() as u64);
        let numeric;
        let lora = match (event.lora_name.filter(|name| !name.is_empty()), event.lora_id) {
            (Some(name), _) => Some(name),
            // Engines before 0.14 name adapters by number only.
            (None, Some(id)) => {
                numeric = id.to_string();
                Some(numeric.as_str())
            }
            (None, None) => None,
        };
        let mut items: Vec<ExtraKey<'_>> = Vec::new();
        let mut ends: Vec<u32> = Vec::new();
        for block in event.extra_keys.iter().flat_map(|extras| extras.blocks()) {
            items.extend(block);
            ends.push(items.len() as u32);
        }
        let outcome = self.index().store(
            self.row.slot,
            &Store {
                keys: event.block_hashes,
                parent: event.parent,
                tokens: event.tokens,
                block_size: event.block_size,
                lora,
                extras: Extras { items: &items, ends: &ends },
                salt: event.cache_salt.filter(|salt| !salt.is_empty()),
                group: event.group,
                kind: group_kind(event),
                tier: self.tier(event.medium, event.locality),
                at: now,
            },
        );
        let count = |counter: &str, blocks: u32| {
            if blocks > 0 {
                metrics.orphans.with_label_values(&[counter]).inc_by(u64::from(blocks));
            }
        };
        count("waiting", outcome.orphaned);
        count("attached", outcome.attached);
        count("dropped", outcome.orphans_dropped);
        for (counter, blocks) in [
            (&metrics.refused_blocks, outcome.refused),
            (&metrics.unplaced_blocks, outcome.unplaced),
            (&metrics.conflicting_stores, outcome.conflicting),
        ] {
            if blocks > 0 {
                counter.inc_by(u64::from(blocks));
            }
        }
        self.conflicts += u64::from(outcome.conflicting);
        if self.conflicts >= UNCHAINED_AFTER && !self.muted && !self.trust_unchained {
            self.muted = true;
            self.index().set_muted(self.row.slot, true);
            tracing::warn!(pod = %self.row.id, "Engine keys are reused for other tokens; the pod scores 0.");
            self.publish();
        }
        outcome
    }

    fn removed(&self, event: &BlockRemoved<'_>, sequence: u64) {
        self.shared.metrics.removed_events.inc();
        self.shared.metrics.removed_blocks.inc_by(event.block_hashes.len() as u64);
        self.index().remove(
            self.row.slot,
            &Remove {
                keys: event.block_hashes,
                group: event.group,
                tier: self.tier(event.medium, event.locality),
                sequence,
            },
        );
    }

    /// Drops orphans that waited too long.
    pub(crate) fn expire_orphans(&self, now: Instant) {
        let Some(before) = now.checked_sub(self.shared.orphan_timeout) else { return };
        let expired = self.index().expire_orphans(self.row.slot, before);
        if expired > 0 {
            let orphans = &self.shared.metrics.orphans;
            orphans.with_label_values(&["expired"]).inc_by(expired as u64);
        }
    }
}

/// What the event says its attention group asks; absent when it says nothing.
fn group_kind(event: &BlockStored<'_>) -> Option<GroupKind> {
    Some(match (event.kind?, event.sliding_window) {
        ("full_attention" | "mla_attention" | "sink_full_attention", _) => GroupKind::Full,
        ("sliding_window" | "sliding_window_mla", Some(window)) if window > 0 => {
            GroupKind::Sliding { window }
        }
        _ => GroupKind::Unsupported,
    })
}

/// SGLang before 0.5.7 hashes each block on its own, so its keys name no prefix.
fn is_unchained(declaration: &PodDeclaration) -> bool {
    let Some(version) = declaration.engine_version.as_deref() else { return false };
    let mut numbers = version.split(['.', '-', '+']).map(|part| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().unwrap_or(0)
    });
    let version = [numbers.next(), numbers.next(), numbers.next()].map(Option::unwrap_or_default);
    declaration.engine.eq_ignore_ascii_case("sglang") && version < [0, 5, 7]
}
