//! A publisher of ours, as an engine has one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::bail;

use super::{Client, PATIENCE, PodHandle, followed};
use crate::{
    loadgen::{
        recording::Batch,
        replay::{PublisherOptions, sockets::Sockets},
    },
    support::clock::unix_ns,
    wire::encode::{self, BlockRemoved, BlockStored, Event, Form, Hash, Tokens},
};

/// Publishes in the name of a pod.
pub(super) struct Publisher {
    /// The pod. Its endpoint may be changed before the start.
    pub(super) pod: PodHandle,
    sockets: Sockets<Arc<Batch>>,
    sequence: u64,
}

/// A message that left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) sequence: u64,
    /// Just before the send.
    pub(super) at: Instant,
    pub(super) unix_ns: u64,
}

impl Publisher {
    /// Binds, with a replay socket.
    pub(super) fn bind(mut pod: PodHandle, at: &str) -> anyhow::Result<Self> {
        let options =
            PublisherOptions { replay: Some(at.to_owned()), ..PublisherOptions::default() };
        let sockets = Sockets::bind(at, options, Duration::ZERO)?;
        pod.endpoint = sockets.endpoint().to_owned();
        pod.replay = sockets.replay_endpoint().unwrap_or_default().to_owned();
        Ok(Self { pod, sockets, sequence: 0 })
    }

    /// Registers the pod, notes it in `pods` for its end, and waits until an empty message is applied: the
    /// stream is up after that.
    pub(super) async fn start(
        &mut self,
        client: &mut Client,
        pods: &mut Vec<PodHandle>,
    ) -> anyhow::Result<()> {
        pods.push(self.pod.clone());
        self.pod.register(client).await?;
        followed(&self.pod, || Ok(self.sockets.has_subscriber(None)?)).await?;
        let first = self.publish(Vec::new())?.sequence;
        let deadline = Instant::now() + PATIENCE;
        while !self.pod.wait(client, first, deadline).await?.reached {
            if Instant::now() >= deadline {
                bail!("the indexer does not apply what {} publishes", self.pod.name);
            }
        }
        Ok(())
    }

    /// Publishes one message.
    pub(super) fn publish(&mut self, events: Vec<Event>) -> anyhow::Result<Sent> {
        let sequence = self.sequence;
        self.sequence += 1;
        let (timestamp, rank) = (unix_ns() as f64 / 1e9, Some(self.pod.rank));
        let payload = encode::Batch { timestamp, events, rank }.encode(Form::Map)?;
        let topic = self.pod.topic();
        let batch = Arc::new(Batch { topic, sequence, payload, ..Batch::default() });
        let at = Instant::now();
        let unix_ns = self.sockets.send(batch, true)?;
        Ok(Sent { sequence, at, unix_ns })
    }
}

/// Says that a chain of blocks from the root is stored, one hash for each block.
pub(super) fn stored(hashes: &[u64], tokens: &[u32]) -> Event {
    Event::BlockStored(BlockStored {
        block_hashes: hashes.iter().copied().map(Hash::Unsigned).collect(),
        token_ids: Tokens::Plain(tokens.to_vec()),
        block_size: (tokens.len() / hashes.len().max(1)) as i64,
        medium: Some("GPU".to_owned()),
        ..BlockStored::default()
    })
}

/// Says that blocks are gone.
pub(super) fn removed(hashes: &[u64]) -> Event {
    Event::BlockRemoved(BlockRemoved {
        block_hashes: hashes.iter().copied().map(Hash::Unsigned).collect(),
        medium: Some("GPU".to_owned()),
        ..BlockRemoved::default()
    })
}
