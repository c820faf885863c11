//! One publisher: its sequencer, its row, its replay request. Lives on a subscriber thread.
//!
//! A publisher's row needs a model and, where the engine has one, a rank. What the declaration
//! leaves open is learnt from the first message; until then a *provisional* row shows the state
//! and the batches wait here.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    hash::Models,
    ingest::{
        IngestConfig,
        apply::{Applier, Shared},
        curve::Keys,
        fleet::{PodDeclaration, Row},
        frame::{self, Frame},
        lane::{Item, Lanes, Pipe},
        sequencer::{Action, Message, Reason, Sequencer, SequencerConfig},
    },
    model::{PodState, RowId},
    wire::{BatchHeader, BatchReader, Event, ReplayReply, Scratch, Topic, header},
};

/// Payload bytes that wait for a model name at most; it may never come.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// Why a publisher without a model is not indexed.
const NO_MODEL: &str = "no model is known, so nothing is indexed";

/// Frames beyond this make libzmq cut the connection, with whatever else is under way on it. So
/// what is a little over the limit of a payload is let in, to be refused alone.
pub(crate) fn most_frame_bytes(config: &IngestConfig) -> i64 {
    i64::try_from(config.limits.payload_bytes.saturating_mul(2)).unwrap_or(i64::MAX).max(4 << 20)
}

/// What a batch costs beside its payload while it waits, bytes.
const WAITING_OVERHEAD: usize = 128;

type Actions = Vec<Action<Frame>>;

/// What publishers of one process share.
pub(crate) struct Context {
    pub(crate) config: IngestConfig,
    pub(crate) models: Models,
    pub(crate) shared: Arc<Shared>,
    pub(crate) lanes: Lanes,
    pub(crate) curve: Option<Keys>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("config", &self.config).finish_non_exhaustive()
    }
}

/// See the module's documentation.
pub(crate) struct Publisher {
    context: Arc<Context>,
    declaration: Arc<PodDeclaration>,
    sequencer: Sequencer<Frame>,
    row: Arc<Row>,
    pipe: Arc<Pipe>,
    /// Items that wait for the row to be settled, and their bytes.
    waiting: Option<(VecDeque<Item>, usize)>,
    /// Rank of the first batch that named one, when none is declared.
    learnt: Option<u32>,
    /// What the lane was told that the blocks can be trusted for.
    trust: PodState,
    /// Why the row cannot be settled, once that is known.
    blocked: Option<String>,
    /// Where its sockets are made; a share in the context's limit on sockets.
    zmq: Arc<zmq::Context>,
    /// The open replay request.
    dealer: Option<zmq::Socket>,
    /// The sequencer has been told to begin.
    started: bool,
    actions: Actions,
}

impl Publisher {
    /// A publisher with its row; `None` when no row can be had.
    pub(crate) fn new(
        context: &Arc<Context>,
        declaration: &Arc<PodDeclaration>,
        zmq: &Arc<zmq::Context>,
        now: Instant,
    ) -> Option<Self> {
        let model = declaration.model.as_deref().unwrap_or_default();
        let canonical = context.models.canonical(model);
        let id = RowId { pod: Arc::from(declaration.pod.as_str()), rank: declaration.rank };
        let fleet = &context.shared.fleet;
        let (row, mark) = match fleet.claim(declaration, canonical) {
            Some((row, mark)) => (row, Some(mark)),
            None => {
                fleet.drop_restored(&id);
                let row = fleet.add(
                    id,
                    &declaration.endpoint,
                    context.models.scheme(canonical),
                    &Arc::from(canonical),
                    declaration.count_mode,
                )?;
                (row, None)
            }
        };
        // Whoever sends on our bound socket is connected.
        row.update(|status| {
            status.connected = declaration.endpoint.is_empty();
            status.stale &= !status.connected;
        });
        let mut applier = Applier::new(&context.shared, &row, declaration);
        if let Some(mark) = &mark {
            applier.resume(mark);
        }
        let pipe = context.lanes.pipe(applier);
        let replay = declaration.replay_endpoint.as_ref().map(|_| context.config.replay.clone());
        let config = SequencerConfig { first_sequence: declaration.first_sequence, replay };
        let mut publisher = Self {
            context: Arc::clone(context),
            declaration: Arc::clone(declaration),
            sequencer: mark.as_ref().map_or_else(
                || Sequencer::new(config.clone()),
                |mark| Sequencer::resume(config.clone(), mark),
            ),
            trust: mark.as_ref().map_or(PodState::Live, |mark| mark.trust),
            learnt: mark.as_ref().and_then(|mark| mark.id.rank),
            row,
            pipe,
            // With both known there is nothing to wait for, not even for a first message.
            waiting: (mark.is_none()
                && (declaration.model.is_none() || declaration.rank.is_none()))
            .then(Default::default),
            blocked: None,
            zmq: Arc::clone(zmq),
            dealer: None,
            started: false,
            actions: Vec::new(),
        };
        if publisher.declaration.replay_endpoint.is_none() {
            publisher.start(now);
        }
        Some(publisher)
    }

    /// Begins with the history. Not before the engine is there: silence would look like a replay
    /// socket that does not answer.
    fn start(&mut self, now: Instant) {
        if !self.started {
            self.started = true;
            self.drive(|sequencer, out| sequencer.start(now, out));
        }
    }

    pub(crate) fn zmq(&self) -> Arc<zmq::Context> {
        Arc::clone(&self.zmq)
    }

    /// Can a batch of this rank be its own?
    pub(crate) fn takes(&self, rank: Option<u32>) -> bool {
        self.declaration.rank.is_some()
            || rank.is_none()
            || self.learnt.is_none_or(|learnt| Some(learnt) == rank)
    }

    /// Is there room for one more message? Otherwise it is lost, and the sequencer is told.
    pub(crate) fn has_room(&self) -> bool {
        let config = &self.context.config;
        let waiting = self.waiting.as_ref().map_or(0, |(_, bytes)| *bytes);
        waiting < config.queue_bytes.min(MAX_WAITING_BYTES)
            && self.pipe.has_room(config.queue_batches, config.queue_bytes)
    }

    /// The open replay socket, while its replies can be taken in.
    pub(crate) fn dealer(&self) -> Option<&zmq::Socket> {
        self.dealer.as_ref().filter(|_| self.has_room())
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.sequencer.deadline()
    }

    /// A live message whose frames are sound; `header` is absent if its payload is not.
    pub(crate) fn message(
        &mut self,
        model: &str,
        sequence: u64,
        header: Option<&BatchHeader>,
        payload: Frame,
        now: Instant,
    ) {
        self.context.shared.metrics.messages.inc();
        self.row.update(|status| status.messages += 1);
        self.start(now);
        // First, since it may make room: what waits for a model waits no more.
        let message = self.parse(model, sequence, header, payload);
        if !self.has_room() {
            self.context.shared.metrics.dropped.with_label_values(&["queue_full"]).inc();
            return self.drive(|sequencer, out| sequencer.lost(sequence, now, out));
        }
        self.drive(|sequencer, out| sequencer.message(message, now, out));
    }

    /// Reads what the replay socket has; `false` when it has nothing more for now.
    pub(crate) fn replay(&mut self, now: Instant) -> bool {
        let Some(dealer) = self.dealer.as_ref() else { return false };
        let mut frames = match frame::receive(dealer) {
            Ok(frames) => frames,
            Err(zmq::Error::EAGAIN | zmq::Error::EINTR) => return false,
            Err(error) => {
                tracing::warn!(pod = %self.row.id, %error, "Replay socket failed.");
                self.drive(|sequencer, out| sequencer.replay_failed(now, out));
                return false;
            }
        };
        match ReplayReply::parse(&frames) {
            Ok(ReplayReply::End) => {
                self.drive(|sequencer, out| sequencer.replay_end(now, out));
            }
            Ok(ReplayReply::Batch { sequence, .. }) => {
                // Newer engines repeat the topic.
                let topic = if let [_, topic, _, _] = &frames[..] { topic } else { &b""[..] };
                let model = Topic::parse(topic, usize::MAX)
                    .map_or_else(|_| String::new(), |topic| topic.model.into_owned());
                let Some(payload) = frames.pop() else { return true };
                let header = header(&payload, &self.context.config.limits).ok();
                let message = self.parse(&model, sequence, header.as_ref(), payload);
                self.drive(|sequencer, out| sequencer.replayed(message, now, out));
            }
            Err(error) => self.context.shared.metrics.reject(error.reason()),
        }
        true
    }

    /// Takes from the payload what ordering needs, and settles the row if this tells how.
    fn parse(
        &mut self,
        model: &str,
        sequence: u64,
        header: Option<&BatchHeader>,
        payload: Frame,
    ) -> Message<Frame> {
        if let Some(header) = header {
            self.learnt = self.learnt.or(header.rank);
            if self.waiting.is_some() {
                self.settle(model, header.rank);
            }
        }
        // A payload that is no batch keeps its place in the order; the lane rejects it. Its time
        // is the beginning of all times, so that it can never start a new life.
        Message {
            sequence,
            timestamp: header.map_or(f64::NEG_INFINITY, |header| header.timestamp),
            payload_hash: xxh3_64(&payload),
            payload_bytes: payload.len(),
            begins_cleared: sequence <= self.declaration.first_sequence
                && self.begins_cleared(&payload),
            payload,
        }
    }

    fn begins_cleared(&self, payload: &[u8]) -> bool {
        let reader = BatchReader::new(payload, &self.context.config.limits);
        let mut scratch = Scratch::default();
        reader.is_ok_and(|mut reader| {
            matches!(reader.next_event(&mut scratch), Some(Ok(Event::Cleared)))
        })
    }

    /// Replaces the provisional row by the final one and lets what waited go.
    fn settle(&mut self, model: &str, rank: Option<u32>) {
        let model = self.declaration.model.clone().unwrap_or_else(|| model.to_owned());
        let rank = self.declaration.rank.or(self.learnt).or(rank);
        if model.is_empty() {
            return self.block(NO_MODEL.to_owned());
        }
        if self.row.id.rank != rank || *self.row.model != *self.context.models.canonical(&model) {
            let (context, models) = (&self.context, &self.context.models);
            let model = models.canonical(&model);
            let id = RowId { pod: Arc::clone(&self.row.id.pod), rank };
            context.shared.fleet.drop_restored(&id);
            if context.shared.fleet.is_taken(&id, self.row.slot) {
                return self.block(format!("another publisher is {id}, so nothing is indexed"));
            }
            self.pipe.close();
            let new = context.shared.fleet.replace(
                &self.row,
                id,
                models.scheme(model),
                &Arc::from(model),
                self.declaration.count_mode,
            );
            let Some(row) = new else {
                tracing::error!(pod = %self.row.id, "Another row took its place in this instant.");
                return;
            };
            let applier = Applier::new(&context.shared, &row, &self.declaration);
            (self.row, self.pipe) = (row, context.lanes.pipe(applier));
        }
        for item in self.waiting.take().into_iter().flat_map(|(items, _)| items) {
            self.pipe.push(item);
        }
    }

    /// Says once why nothing of this publisher is indexed; it stays as it is until that changes.
    fn block(&mut self, why: String) {
        if self.blocked.as_ref() != Some(&why) {
            tracing::warn!(pod = %self.row.id, why, "Not indexed.");
            self.row.update(|status| status.reason.clone_from(&why));
            self.blocked = Some(why);
        }
    }

    pub(crate) fn connected(&mut self, now: Instant) {
        self.row.update(|status| {
            // Fresh rows start as not connected; only a return counts.
            status.reconnections += u64::from(status.stale);
            status.connected = true;
            status.stale = false;
        });
        self.start(now);
        self.drive(|sequencer, out| sequencer.connected(now, out));
    }

    pub(crate) fn disconnected(&mut self, now: Instant) {
        self.row.update(|status| status.connected = false);
        self.drive(|sequencer, out| sequencer.disconnected(now, out));
    }

    pub(crate) fn tick(&mut self, now: Instant) {
        if let Some((epoch, sequence)) = self.pipe.take_cleared() {
            self.drive(|sequencer, out| sequencer.cleared(epoch, sequence, now, out));
        }
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.drive(|sequencer, out| sequencer.tick(now, out));
        }
    }

    /// Runs the state machine and carries out what it asks for.
    fn drive(&mut self, input: impl FnOnce(&mut Sequencer<Frame>, &mut Actions)) {
        let mut actions = std::mem::take(&mut self.actions);
        input(&mut self.sequencer, &mut actions);
        let trust = self.sequencer.trust();
        let changed = trust != self.trust;
        self.trust = trust;
        // Doubt before what it is about, its end after that.
        if changed && trust != PodState::Live {
            self.tell();
        }
        for action in actions.drain(..) {
            match action {
                Action::Deliver(message) => {
                    let Message { sequence, payload, payload_hash, timestamp, .. } = message;
                    self.push(Item::Batch { sequence, payload, payload_hash, timestamp });
                }
                Action::Reset { epoch } => self.push(Item::Reset { epoch }),
                Action::Rebuild => self.push(Item::Rebuild),
                Action::CountMode(mode) => self.push(Item::CountMode(Some(mode))),
                Action::Loss(reason) => self.push(Item::Loss(reason)),
                Action::CountModeDefault => self.push(Item::CountMode(None)),
                Action::State(state, reason) => self.show(state, reason),
                Action::Stale(stale) => {
                    self.row.update(|status| status.stale = stale);
                    self.context.shared.fleet.changed();
                }
                Action::RequestReplay { from } => self.request(from),
                Action::CancelReplay => self.dealer = None,
                Action::Count(counter) => self.context.shared.metrics.notice(counter, &self.row),
            }
        }
        if changed && trust == PodState::Live {
            self.tell();
        }
        self.actions = actions;
        let seen = self.sequencer.seen().max(self.sequencer.applied());
        self.row.update(|status| status.seen = seen);
    }

    fn show(&mut self, state: PodState, reason: Reason) {
        self.push(Item::State(state, reason, self.trust));
        if self.waiting.is_some() {
            // Nothing is applied yet, so the state is true at once.
            self.row.update(|status| {
                status.state = state;
                status.reason = self.blocked.clone().unwrap_or_else(|| reason.to_string());
            });
            self.context.shared.fleet.changed();
        }
    }

    /// Tells the lane again what holds, for a trust that the state does not show.
    fn tell(&mut self) {
        let (state, reason) = self.sequencer.state();
        self.push(Item::State(state, reason, self.trust));
    }

    fn push(&mut self, item: Item) {
        match &mut self.waiting {
            Some((items, bytes)) => {
                match (&item, items.back_mut()) {
                    (Item::Batch { payload, .. }, _) => *bytes += payload.len() + WAITING_OVERHEAD,
                    // States in between were shown; a connection that flaps must not pile them up.
                    (Item::State(..), Some(last @ Item::State(..))) => {
                        *last = item;
                        return;
                    }
                    _ => {}
                }
                items.push_back(item);
            }
            None => self.pipe.push(item),
        }
    }

    /// Asks on a fresh socket, so that replies to an earlier request go nowhere.
    fn request(&mut self, from: u64) {
        self.dealer = None;
        let Some(endpoint) = self.declaration.replay_endpoint.clone() else { return };
        match self.open(&endpoint, from) {
            Ok(dealer) => self.dealer = Some(dealer),
            // The sequencer notices the silence and decides.
            Err(error) => {
                tracing::warn!(pod = %self.row.id, %endpoint, %error, "Cannot ask for a replay.");
            }
        }
    }

    fn open(&self, endpoint: &str, from: u64) -> zmq::Result<zmq::Socket> {
        let dealer = self.zmq.socket(zmq::DEALER)?;
        dealer.set_linger(0)?;
        dealer.set_maxmsgsize(most_frame_bytes(&self.context.config))?;
        dealer.set_rcvhwm(self.context.config.receive_high_water_mark)?;
        dealer.set_ipv6(true)?;
        dealer.set_reconnect_ivl(200)?;
        if let Some(keys) = &self.context.curve {
            keys.connect(&dealer)?;
        }
        dealer.connect(endpoint)?;
        // The request waits in the socket until the engine is there; HWM 1000 never blocks it.
        dealer.send_multipart([&b""[..], &from.to_be_bytes()], zmq::DONTWAIT)?;
        Ok(dealer)
    }

    /// Takes the row and its blocks out of the index.
    pub(crate) fn remove(self) {
        self.pipe.close();
        self.context.shared.fleet.remove(self.row.slot);
    }
}
