//! Transcripts: messages in, replies and questions out.

mod dialect;
mod hermetic;
mod modes;
mod properties;
mod response;

use std::sync::Arc;

use bytes::Bytes;

use super::{Ask, Exchange, ExchangeConfig, Facts, Inbound, Replies, Routed, headers::HeaderEdits};
use crate::{epp::director::Refusal, proto::ext_proc::ProcessingRequest};

/// What a transcript brought.
#[derive(Debug, Default)]
struct Talk {
    /// The replies, one line each, as `dialect` writes them.
    said: Vec<String>,
    /// How many replies there were after each message.
    after: Vec<usize>,
    /// The whole requests that the picker was asked about.
    inbound: Vec<Inbound>,
    facts: Facts,
    finished: bool,
}

/// The picker of most transcripts.
fn to_pod_2(_: &Inbound) -> Result<Routed, Refusal> {
    Ok(Routed::to("192.168.1.2:8000"))
}

/// An exchange with the default configuration.
fn talk(messages: Vec<ProcessingRequest>) -> Talk {
    talk_with(&ExchangeConfig::default(), messages, to_pod_2)
}

/// An exchange with this picker.
fn routed(
    messages: Vec<ProcessingRequest>,
    picker: impl FnMut(&Inbound) -> Result<Routed, Refusal>,
) -> Talk {
    talk_with(&ExchangeConfig::default(), messages, picker)
}

fn talk_with(
    config: &ExchangeConfig,
    messages: Vec<ProcessingRequest>,
    mut picker: impl FnMut(&Inbound) -> Result<Routed, Refusal>,
) -> Talk {
    let mut exchange = Exchange::new(&Arc::new(config.clone()));
    let (mut talk, mut replies) = (Talk::default(), Replies::new());
    for message in messages {
        match exchange.receive(message, &mut replies) {
            Some(Ask::Route(inbound)) => {
                assert!(replies.is_empty(), "a reply before the answer");
                let answer = picker(&inbound);
                talk.inbound.push(inbound);
                exchange.routed(answer, &mut replies);
            }
            Some(Ask::ResponseHeaders(_)) => {
                exchange.response_headers(HeaderEdits::new(), &mut replies);
            }
            None => {}
        }
        while let Some(reply) = replies.pop() {
            talk.said.push(dialect::written(&reply));
        }
        talk.after.push(talk.said.len());
    }
    talk.finished = exchange.is_finished();
    talk.facts = exchange.finish().clone();
    talk
}

/// A body of this many bytes that no chunking can shuffle unseen.
fn long(bytes: usize) -> Bytes {
    (0..bytes).map(|at| b'a' + (at * 7 % 26) as u8).collect::<Vec<u8>>().into()
}

#[track_caller]
fn check(talk: &Talk, want: &[&str]) {
    assert!(talk.said == want, "said:\n{}\nwanted:\n{}", talk.said.join("\n"), want.join("\n"));
}
