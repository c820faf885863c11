//! Blocks of engines, looked for since the end of the step that stored them.
//!
//! Time runs from the batch's timestamp, which an engine takes when it publishes, at the end of a step,
//! until the first answer of `Score` that shows the batch's last block: so it is of two wall clocks and
//! needs engines on this machine. A prompt is put together from the events by parent hash; what does
//! not begin at the root, is long, or has an adapter, a salt or images is passed over.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Client, PROBE_TIMEOUT, PodHandle, block_size, call, confirmed_depth, prompt};
use crate::{
    loadgen::stack::EngineAddress,
    support::clock::unix_ns,
    wire::{BatchReader, BlockStored, Event, Frames, Limits, Scratch, Topic},
};

/// Longest prompt that is followed, tokens.
const MOST_TOKENS: usize = 2_048;
/// Prompts remembered per engine; beyond that all are forgotten.
const MOST_PROMPTS: usize = 4_096;
/// Time between two samples.
const EVERY: Duration = Duration::from_millis(250);
/// It looks this often whether it should stop, milliseconds.
const POLL_MS: i64 = 50;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Steps {
    /// From the end of the step until visible, microseconds.
    pub(super) us: Vec<f64>,
    /// What was not visible in time.
    pub(super) lost: u64,
}

/// A step whose last block is to be looked for.
#[derive(Debug)]
struct Step {
    pod: String,
    model: String,
    tokens: Vec<u32>,
    timestamp: f64,
}

/// Follows the engines until `stop`.
pub(super) async fn watch(
    mut listener: Listener,
    mut client: Client,
    stop: &CancellationToken,
    steps: &mut Steps,
) -> anyhow::Result<()> {
    if listener.engines.is_empty() {
        return Ok(());
    }
    // One that cannot be looked for now is passed over.
    let (found, mut samples) = mpsc::channel(1);
    let own = stop.clone();
    let (done, listened) = tokio::sync::oneshot::channel();
    thread::Builder::new().name("engine-steps".to_owned()).spawn(move || {
        // Nobody waits for it if something else failed.
        drop(done.send(listener.listen(&found, &own)));
    })?;
    let mut sizes = HashMap::new();
    while let Some(step) = samples.recv().await {
        let size = match sizes.get(&step.model) {
            Some(size) => *size,
            None => {
                let size = block_size(&mut client, &step.model).await?;
                sizes.insert(step.model.clone(), size);
                size
            }
        };
        let depth = (step.tokens.len() / size) as u32;
        if depth == 0 {
            continue;
        }
        let pod = PodHandle { name: step.pod, model: step.model, ..PodHandle::default() };
        let request = pod.score(vec![prompt(&step.tokens)]);
        let began = Instant::now();
        loop {
            let answer = call("Score", client.score(request.clone())).await?;
            let now = unix_ns();
            if answer.prompts.first().is_some_and(|scores| confirmed_depth(scores) >= depth) {
                steps.us.push(now as f64 / 1e3 - step.timestamp * 1e6);
                break;
            }
            if began.elapsed() >= PROBE_TIMEOUT || stop.is_cancelled() {
                steps.lost += u64::from(!stop.is_cancelled());
                break;
            }
        }
    }
    listened.await.context("the thread that listens to engines ended")??;
    Ok(())
}

/// A subscriber of engines.
pub(super) struct Listener {
    engines: Vec<(String, zmq::Socket, Prompts)>,
}

impl Listener {
    /// Subscribes to all that they publish from now on.
    ///
    /// # Errors
    ///
    /// An address that cannot be one.
    pub(super) fn connect(engines: &[EngineAddress]) -> anyhow::Result<Self> {
        let context = zmq::Context::new();
        let connect = |engine: &EngineAddress| {
            let socket = context.socket(zmq::SUB)?;
            socket.set_linger(0)?;
            socket.set_subscribe(b"")?;
            socket
                .connect(&engine.events)
                .with_context(|| format!("events of {} at {:?}", engine.name, engine.events))?;
            Ok((engine.name.clone(), socket, Prompts::default()))
        };
        Ok(Self { engines: engines.iter().map(connect).collect::<anyhow::Result<_>>()? })
    }

    /// Reads the engines' events and hands over samples.
    fn listen(
        &mut self,
        found: &mpsc::Sender<Step>,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut next = Instant::now();
        while !stop.is_cancelled() {
            let mut items: Vec<_> = self
                .engines
                .iter()
                .map(|(_, socket, _)| socket.as_poll_item(zmq::POLLIN))
                .collect();
            match zmq::poll(&mut items, POLL_MS) {
                Ok(_) | Err(zmq::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            for (name, socket, prompts) in &mut self.engines {
                while let Ok(frames) = socket.recv_multipart(zmq::DONTWAIT) {
                    let Some((model, timestamp, tokens)) = prompts.read(&frames) else { continue };
                    if Instant::now() >= next {
                        let step = Step { pod: name.clone(), model, tokens, timestamp };
                        if found.try_send(step).is_ok() {
                            next = Instant::now() + EVERY;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Prompts of one engine by the hash of their last block.
#[derive(Clone, Debug, Default)]
struct Prompts {
    by_hash: HashMap<u64, Vec<u32>>,
}

impl Prompts {
    /// Takes in a message; model, timestamp and prompt of the last store in it that was new. What is no
    /// message of an engine is passed over.
    fn read(&mut self, frames: &[Vec<u8>]) -> Option<(String, f64, Vec<u32>)> {
        let limits = Limits::default();
        let frames = Frames::split(frames).ok()?;
        let model = Topic::parse(frames.topic, usize::MAX).ok()?.model.into_owned();
        let mut reader = BatchReader::new(frames.payload, &limits).ok()?;
        let timestamp = reader.header().timestamp;
        let mut scratch = Scratch::default();
        let mut last = None;
        while let Some(event) = reader.next_event(&mut scratch) {
            match event {
                Ok(Event::Stored(store)) => last = self.store(&store).or(last),
                Ok(Event::Removed(removed)) => {
                    for hash in removed.block_hashes {
                        self.by_hash.remove(&hash.0);
                    }
                    // What was stored and removed in one step cannot be seen.
                    last = None;
                }
                Ok(Event::Cleared) => {
                    self.by_hash.clear();
                    last = None;
                }
                Err(_) => {}
            }
        }
        last.map(|tokens| (model, timestamp, tokens))
    }

    fn store(&mut self, store: &BlockStored<'_>) -> Option<Vec<u32>> {
        let size = store.block_size as usize;
        let whole = size > 0 && store.tokens.len() == store.block_hashes.len() * size;
        let plain = store.lora_name.is_none()
            && store.lora_id.is_none()
            && store.extra_keys.is_none()
            && store.cache_salt.is_none();
        if !whole || !plain || store.block_hashes.is_empty() {
            return None;
        }
        let mut tokens = match store.parent {
            Some(parent) => self.by_hash.get(&parent.0)?.clone(),
            None => Vec::new(),
        };
        if tokens.len() + store.tokens.len() > MOST_TOKENS {
            return None;
        }
        if self.by_hash.len() + store.block_hashes.len() > MOST_PROMPTS {
            self.by_hash.clear();
        }
        let mut is_new = false;
        for (hash, block) in store.block_hashes.iter().zip(store.tokens.chunks(size)) {
            tokens.extend(block);
            is_new = self.by_hash.insert(hash.0, tokens.clone()).is_none();
        }
        is_new.then_some(tokens)
    }
}
