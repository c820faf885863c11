//! One thread that sends: its part of the plan, its connections, its requests in flight.
//!
//! # Model
//!
//! First requests come from a list: of its own in open loops, one for all threads in closed ones, so that
//! every place stays taken to the end. A turn joins when the answer before it is complete, and is due
//! when its think time is over. Bodies of what comes soon are made, and connections for bursts opened,
//! while nothing is due.
//!
//! # Failure
//!
//! Turns behind a request that did not complete are not sent.

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    net::SocketAddr,
    rc::Rc,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    Drive, Ended, Exchange, Failure, Pacing, Target,
    client::{Client, Clock, Flight, Notes},
    gaps,
    pace::Alarm,
};

/// How long before a request that is due the thread stops sleeping: what a wake-up may take.
const SPIN_NS: u64 = 100_000;
/// Requests closer together than this are worth it: 500 a second.
const CLOSE_NS: u64 = 2_000_000;
/// How far ahead bodies are made, and connections opened.
const AHEAD_NS: u64 = 500_000_000;
/// Bytes of bodies that are made ahead at most.
const AHEAD_BYTES: usize = 8 << 20;
/// Nothing is made ahead when something is due so soon.
const BUSY_NS: u64 = 300_000;

/// What the threads of a run share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Requests that come after each request's answer.
    pub(super) turns: HashMap<u32, Vec<u32>>,
    /// First requests of closed loops, and how many of them are taken.
    pub(super) firsts: Vec<u32>,
    pub(super) taken: AtomicUsize,
    /// Requests in flight.
    pub(super) in_flight: AtomicU64,
    /// Requests sent, ever.
    pub(super) sent: AtomicU64,
    /// Threads that still send.
    pub(super) sending: AtomicUsize,
    pub(super) stop: CancellationToken,
}

/// What one thread is to do.
pub(super) struct Lane<'a, B> {
    pub(super) drive: &'a Drive,
    pub(super) shared: &'a Shared,
    pub(super) bodies: B,
    pub(super) client: Rc<Client>,
    pub(super) clock: Clock,
    /// Requests at once at most; of closed loops.
    pub(super) places: usize,
    /// First requests of this thread; of open loops.
    pub(super) firsts: VecDeque<u32>,
    pub(super) gateway: Option<SocketAddr>,
    pub(super) state: State,
}

/// What a thread has in its hands.
pub(super) struct State {
    alarm: Alarm,
    tasks: JoinSet<Option<u32>>,
    flights: HashMap<u32, Flight>,
    /// When requests in flight are given up, in order.
    timeouts: VecDeque<(u64, u32)>,
    /// Turns that have joined, by when they are due.
    later: BinaryHeap<Reverse<(u64, u32)>>,
    /// Turns of closed loops that are due, in the plan's order.
    due: BinaryHeap<Reverse<u32>>,
    /// Bodies made ahead, of the first ones of `firsts`.
    made: VecDeque<Vec<Bytes>>,
    made_bytes: usize,
    /// Connections that bursts ahead will need, and those that are being opened.
    promised: HashMap<SocketAddr, usize>,
    last_due: u64,
    exchanges: Vec<Exchange>,
    gaps: Histogram<u64>,
    last_sent: u64,
    /// Room for gaps, used again.
    spare: Vec<Vec<u64>>,
}

impl State {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            alarm: Alarm::new()?,
            tasks: JoinSet::new(),
            flights: HashMap::new(),
            timeouts: VecDeque::new(),
            later: BinaryHeap::new(),
            due: BinaryHeap::new(),
            made: VecDeque::new(),
            made_bytes: 0,
            promised: HashMap::new(),
            last_due: 0,
            exchanges: Vec::new(),
            gaps: gaps()?,
            last_sent: 0,
            spare: Vec::new(),
        })
    }
}

/// What a thread brings back.
#[derive(Debug)]
pub(super) struct Brought {
    pub(super) exchanges: Vec<Exchange>,
    pub(super) gaps: Histogram<u64>,
    pub(super) last_sent: u64,
    pub(super) ended: u64,
}

/// What to do next.
enum Next {
    /// Send this one, which was meant to be sent then.
    Send(u32, u64),
    /// Nothing before this time.
    At(u64),
    /// Nothing before an answer.
    Answer,
    /// Nothing any more.
    Over,
}

impl<B: FnMut(&super::super::workload::Planned) -> Vec<Bytes>> Lane<'_, B> {
    /// Makes what is due at the very start.
    pub(super) async fn get_ready(&mut self) {
        while self.make_one(0) {}
        // A server that is not there shows with the requests.
        let opened = async { while self.state.tasks.join_next().await.is_some() {} };
        drop(tokio::time::timeout(Duration::from_secs(1), opened).await);
    }

    /// Sends all and waits for the answers.
    pub(super) async fn run(mut self) -> anyhow::Result<Brought> {
        let stop = self.shared.stop.clone();
        let mut stopped = std::pin::pin!(stop.cancelled());
        let mut sending = true;
        let grace = ns(self.drive.grace);
        let last = self.drive.duration.map_or(u64::MAX, ns);
        loop {
            while let Some(joined) = self.state.tasks.try_join_next() {
                self.joined(joined.ok().flatten());
            }
            let now = self.clock.now();
            self.expire(now);
            let mut wake = u64::MAX;
            let mut soon = false;
            if sending {
                // All that is due now goes out before anything else is looked at: a burst is one.
                let next = loop {
                    match self.next(now, last) {
                        Next::Send(request, intended) => self.send(request, intended),
                        other => break other,
                    }
                    if stop.is_cancelled() {
                        break Next::Over;
                    }
                };
                match next {
                    Next::At(at) => {
                        let close = self.is_close(at);
                        let due_in = at.saturating_sub(self.clock.now());
                        soon = due_in > BUSY_NS && self.make_one(now);
                        soon |= close && due_in <= SPIN_NS;
                        if !soon {
                            wake = wake.min(if close { at - SPIN_NS } else { at });
                        }
                        wake = wake.min(last);
                    }
                    Next::Answer => wake = wake.min(last),
                    Next::Over => {
                        sending = false;
                        self.shared.sending.fetch_sub(1, Relaxed);
                    }
                    Next::Send(..) => {}
                }
            }
            let mut end = u64::MAX;
            if !sending {
                if self.state.flights.is_empty() {
                    break;
                }
                end = self.state.last_sent.saturating_add(grace);
                if now >= end {
                    break;
                }
            }
            let now = self.clock.now();
            // Looked at after the sends, which bring timeouts of their own.
            let timeout = self.state.timeouts.front().map_or(u64::MAX, |(at, _)| *at);
            let wake = wake.min(end).min(timeout);
            let soon = soon || wake <= now;
            tokio::select! {
                biased;
                () = &mut stopped => break,
                () = tokio::task::yield_now(), if soon => {}
                Some(joined) = self.state.tasks.join_next() => self.joined(joined.ok().flatten()),
                fired = self.state.alarm.until(wake, now), if !soon => fired?,
            }
        }
        if sending {
            self.shared.sending.fetch_sub(1, Relaxed);
        }
        Ok(self.cut())
    }

    /// Is the request that is due then part of a burst or a quick succession?
    fn is_close(&self, at: u64) -> bool {
        let next = self.firsts.front();
        let planned = next.and_then(|request| self.drive.plan.requests.get(*request as usize));
        let bursts = planned.is_some_and(|planned| planned.burst.is_some());
        let quick = at.saturating_sub(self.state.last_due) < CLOSE_NS;
        self.drive.pacing == Pacing::Open && at > SPIN_NS && (bursts || quick)
    }

    fn next(&mut self, now: u64, last: u64) -> Next {
        if now >= last {
            return Next::Over;
        }
        let later = self.state.later.peek().map(|Reverse((at, _))| *at);
        let waits = !self.state.flights.is_empty() && !self.shared.turns.is_empty();
        match self.drive.pacing {
            Pacing::Open => {
                let first = self.firsts.front().map(|request| self.at(*request));
                let turn_is_first = later.is_some_and(|at| first.is_none_or(|first| at < first));
                match if turn_is_first { later } else { first } {
                    None if waits => Next::Answer,
                    None => Next::Over,
                    Some(at) if at > now => Next::At(at),
                    Some(at) => {
                        let request = if turn_is_first {
                            self.state.later.pop().map(|Reverse((_, request))| request)
                        } else {
                            self.firsts.pop_front()
                        };
                        request.map_or(Next::Over, |request| Next::Send(request, at))
                    }
                }
            }
            Pacing::Closed { .. } => {
                while let Some(Reverse((at, request))) = self.state.later.peek().copied()
                    && at <= now
                {
                    self.state.later.pop();
                    self.state.due.push(Reverse(request));
                }
                if self.state.flights.len() >= self.places {
                    return Next::Answer;
                }
                let taken = self.shared.taken.load(Relaxed);
                let first = self.shared.firsts.get(taken).copied();
                let turn = self.state.due.peek().map(|Reverse(request)| *request);
                if turn.is_some_and(|turn| first.is_none_or(|first| turn < first)) {
                    self.state.due.pop();
                    return turn.map_or(Next::Over, |turn| Next::Send(turn, now));
                }
                if first.is_some() {
                    let taken = self.shared.taken.fetch_add(1, Relaxed);
                    if let Some(request) = self.shared.firsts.get(taken) {
                        return Next::Send(*request, now);
                    }
                }
                match self.state.later.peek() {
                    Some(Reverse((at, _))) => Next::At(*at),
                    None if waits => Next::Answer,
                    None => Next::Over,
                }
            }
        }
    }

    /// When a first request of an open loop is due.
    fn at(&self, request: u32) -> u64 {
        let planned = self.drive.plan.requests.get(request as usize);
        planned.and_then(|planned| planned.at).map_or(0, ns)
    }

    /// Where a request goes, when that is known before.
    fn destination(&self, request: u32) -> Option<SocketAddr> {
        match &self.drive.target {
            Target::Gateway(_) => self.gateway,
            Target::Picker(_) => None,
            Target::Direct(pods) => pods.get(request as usize % pods.len().max(1)).copied(),
        }
    }

    /// Makes one body ahead; false when there is none to make.
    fn make_one(&mut self, now: u64) -> bool {
        let Some(request) = self.firsts.get(self.state.made.len()).copied() else { return false };
        if self.at(request) > now + AHEAD_NS || self.state.made_bytes > AHEAD_BYTES {
            return false;
        }
        let Some(planned) = self.drive.plan.requests.get(request as usize) else { return false };
        let body = (self.bodies)(planned);
        self.state.made_bytes += length(&body);
        self.state.made.push_back(body);
        if let (Some(_), Some(to)) = (planned.burst, self.destination(request)) {
            let promised = self.state.promised.entry(to).or_default();
            *promised += 1;
            if self.client.idle(to)
                + self.state.tasks.len().saturating_sub(self.state.flights.len())
                < *promised
            {
                let client = Rc::clone(&self.client);
                self.state.tasks.spawn_local(async move {
                    client.warm(to).await;
                    None
                });
            }
        }
        true
    }

    fn send(&mut self, request: u32, intended: u64) {
        let Some(planned) = self.drive.plan.requests.get(request as usize) else { return };
        let to = self.destination(request);
        let open = self.drive.pacing == Pacing::Open;
        let made = if open && planned.after.is_none() { self.state.made.pop_front() } else { None };
        let body = match made {
            Some(body) => {
                self.state.made_bytes -= length(&body);
                if let (Some(_), Some(to)) = (planned.burst, to)
                    && let Some(promised) = self.state.promised.get_mut(&to)
                {
                    *promised = promised.saturating_sub(1);
                }
                body
            }
            None => (self.bodies)(planned),
        };
        let mut out = self.client.outgoing(body, to);
        let direct = matches!(self.drive.target, Target::Direct(_));
        let begun = to.and_then(|to| self.client.take(to));
        let sent = self.clock.now();
        if let Some(connection) = &begun {
            connection.write_now(&mut out);
        }
        let exchange = Exchange {
            request,
            intended_ns: if open { intended } else { sent },
            sent_ns: sent,
            picked_ns: None,
            first_token_ns: None,
            last_token_ns: None,
            ended_ns: sent,
            pieces: 0,
            output_tokens: 0,
            prompt_tokens: None,
            cached_tokens: None,
            predicted_tokens: None,
            pod: to.filter(|_| direct).map(|to| self.client.name(&to.to_string())),
            ended: Ended::Incomplete,
        };
        let gaps = self.state.spare.pop().unwrap_or_default();
        let notes = Rc::new(RefCell::new(Notes { exchange, gaps }));
        let (client, theirs) = (Rc::clone(&self.client), Rc::clone(&notes));
        let abort = self.state.tasks.spawn_local(async move {
            client.exchange(&theirs, out, to, begun).await;
            Some(request)
        });
        self.state.flights.insert(request, Flight { notes, abort });
        let timeout = sent.saturating_add(ns(self.drive.timeout));
        self.state.timeouts.push_back((timeout, request));
        self.state.last_due = intended;
        self.state.last_sent = sent;
        self.shared.in_flight.fetch_add(1, Relaxed);
        self.shared.sent.fetch_add(1, Relaxed);
        self.drive.progress.sent.fetch_add(1, Relaxed);
    }

    /// A task has ended: a request's, or one that opened a connection.
    fn joined(&mut self, request: Option<u32>) {
        if let Some(flight) = request.and_then(|request| self.state.flights.remove(&request)) {
            self.landed(&flight);
        }
    }

    /// Gives up what takes too long.
    fn expire(&mut self, now: u64) {
        while let Some((_, request)) = self.state.timeouts.pop_front_if(|(at, _)| *at <= now) {
            if let Some(flight) = self.state.flights.remove(&request) {
                flight.abort.abort();
                let mut notes = flight.notes.borrow_mut();
                // One whose answer is complete waits for the endpoint picker only.
                if notes.exchange.ended != Ended::Complete {
                    notes.end(Ended::Failed(Failure::Timeout), now);
                }
                drop(notes);
                self.landed(&flight);
            }
        }
        // Those in front that have ended need no look at their time.
        while let Some((_, request)) = self.state.timeouts.front()
            && !self.state.flights.contains_key(request)
        {
            self.state.timeouts.pop_front();
        }
    }

    /// Takes what a request has brought, and lets the turns behind it join.
    fn landed(&mut self, flight: &Flight) {
        let mut notes = flight.notes.borrow_mut();
        let exchange = notes.exchange.clone();
        let progress = &self.drive.progress;
        if exchange.ended == Ended::Complete {
            for gap in &notes.gaps {
                self.state.gaps.saturating_record(*gap);
            }
            progress.complete.fetch_add(1, Relaxed);
            for turn in self.shared.turns.get(&exchange.request).into_iter().flatten() {
                let planned = self.drive.plan.requests.get(*turn as usize);
                let think =
                    planned.and_then(|planned| planned.after).map_or(0, |after| ns(after.think));
                let due = exchange.ended_ns.saturating_add(think).max(self.at(*turn));
                self.state.later.push(Reverse((due, *turn)));
            }
        } else {
            progress.failed.fetch_add(1, Relaxed);
        }
        notes.gaps.clear();
        self.state.spare.push(std::mem::take(&mut notes.gaps));
        self.state.exchanges.push(exchange);
        self.shared.in_flight.fetch_sub(1, Relaxed);
    }

    /// Cuts what is still in flight.
    fn cut(mut self) -> Brought {
        let now = self.clock.now();
        let left: Vec<Flight> = self.state.flights.drain().map(|(_, flight)| flight).collect();
        self.state.tasks.abort_all();
        for flight in &left {
            let mut notes = flight.notes.borrow_mut();
            if notes.exchange.ended == Ended::Incomplete {
                notes.end(Ended::Incomplete, now);
            }
            drop(notes);
            self.landed(flight);
        }
        let State { exchanges, gaps, last_sent, .. } = self.state;
        let ended = exchanges.iter().map(|exchange| exchange.ended_ns).max().unwrap_or_default();
        Brought { exchanges, gaps, last_sent, ended }
    }
}

fn length(body: &[Bytes]) -> usize {
    body.iter().map(Bytes::len).sum()
}

/// Nanoseconds of a time, at most as many as there are.
pub(super) fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
