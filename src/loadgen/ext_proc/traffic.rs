//! The bodies and messages that are sent: built once, shared by all streams.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;

use super::messages::{self, response_body};
use crate::proto::ext_proc::ProcessingRequest;

/// Bodies per group; exchanges take them in turn.
const VARIANTS: usize = 4;
/// Words of a prompt: what tokens look like matters to nobody here, what repeats does.
const WORDS: [&str; 16] = [
    "routing", "prefix", "cache", "tokens", "the", "of", "block", "fleet", "serves", "a", "prompt",
    "answer", "with", "engine", "stream", "and",
];

/// The end of every body.
const TAIL: &str = r#""}],"max_tokens":8,"temperature":0}"#;

/// What the pod answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseShape {
    /// Nothing: the exchange is over with the routing answer.
    None,
    /// One JSON body with usage.
    Unary,
    /// A stream of so many events, and usage.
    Sse(usize),
}

impl FromStr for ResponseShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "unary" => Ok(Self::Unary),
            _ => text
                .strip_prefix("sse:")
                .and_then(|chunks| chunks.parse().ok())
                .map(Self::Sse)
                .ok_or_else(|| "none, unary, or sse: and a number of chunks".to_owned()),
        }
    }
}

impl fmt::Display for ResponseShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Unary => f.write_str("unary"),
            Self::Sse(chunks) => write!(f, "sse:{chunks}"),
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompts<'a> {
    /// Model that the requests name.
    pub(super) model: &'a str,
    /// Size of a body; of the last turn's, if there are turns. At least the envelope's.
    pub(super) bytes: usize,
    /// Prompts with a beginning in common, or conversations at a time.
    pub(super) groups: usize,
    /// Turns of a conversation; `None`: single messages.
    pub(super) turns: Option<usize>,
}

/// All that exchanges have in common.
#[derive(Debug)]
pub(super) struct Traffic {
    bodies: Vec<Bytes>,
    /// The bodies are turns, which come in their order, whichever stream sends them.
    next: Option<AtomicUsize>,
    /// Messages of the response phase, in order.
    pub(super) response: Vec<ProcessingRequest>,
}

impl Traffic {
    /// Bodies that ask for these prompts.
    #[must_use]
    pub(super) fn new(prompts: &Prompts<'_>, response: ResponseShape) -> Self {
        let groups = prompts.groups.max(1);
        let bodies: Vec<Bytes> = match prompts.turns {
            None => (0..groups * VARIANTS)
                .map(|n| Bytes::from(body(prompts, n / VARIANTS, n % VARIANTS)))
                .collect(),
            // A second text for every conversation, so that none is known when it begins anew.
            Some(turns) => (0..2 * turns * groups)
                .map(|n| {
                    Bytes::from(turn(
                        prompts,
                        turns,
                        n % groups + n / (turns * groups) * groups,
                        n / groups % turns,
                    ))
                })
                .collect(),
        };
        let next = prompts.turns.map(|_| AtomicUsize::new(0));
        Self { bodies, next, response: response_messages(response, prompts.model) }
    }

    /// The body of an exchange.
    #[must_use]
    pub(super) fn body(&self, serial: u64) -> Bytes {
        let at = match &self.next {
            None => usize::try_from(serial % self.bodies.len() as u64).unwrap_or_default(),
            Some(next) => next.fetch_add(1, Ordering::Relaxed) % self.bodies.len(),
        };
        self.bodies[at].clone()
    }
}

/// A chat completion whose message shares its first three quarters within the group.
fn body(prompts: &Prompts<'_>, group: usize, variant: usize) -> String {
    let head = format!(r#"{{"model":"{}","messages":[{{"role":"user","content":""#, prompts.model);
    let text = prompts.bytes.saturating_sub(head.len() + TAIL.len());
    let mut random = fastrand::Rng::with_seed(group as u64);
    let mut content = format!("group {group}: ");
    let mut diverged = false;
    while content.len() < text {
        if !diverged && content.len() >= text / 4 * 3 {
            diverged = true;
            random = fastrand::Rng::with_seed(((group as u64) << 32) | (variant as u64 + 1));
        }
        push_word(&mut content, &mut random);
    }
    content.truncate(text);
    format!("{head}{content}{TAIL}")
}

/// A chat completion at the given turn, from 0, of a conversation of `turns`: a question, and before it
/// all earlier ones with their answers.
fn turn(prompts: &Prompts<'_>, turns: usize, conversation: usize, turn: usize) -> String {
    let mut random = fastrand::Rng::with_seed(conversation as u64);
    let mut body = format!(r#"{{"model":"{}","messages":["#, prompts.model);
    let part = prompts.bytes / (2 * turns);
    for n in 0..=2 * turn {
        let role = if n % 2 == 0 { "user" } else { "assistant" };
        let begin = body.len();
        body.push_str(&format!(r#"{{"role":"{role}","content":"{conversation}: "#));
        while body.len() - begin + 4 < part {
            push_word(&mut body, &mut random);
        }
        body.push_str(if n == 2 * turn { TAIL } else { "\"}," });
    }
    body
}

fn push_word(text: &mut String, random: &mut fastrand::Rng) {
    text.push_str(WORDS[random.usize(..WORDS.len())]);
    text.push(' ');
}

fn response_messages(shape: ResponseShape, model: &str) -> Vec<ProcessingRequest> {
    const USAGE: &str = r#""usage":{"prompt_tokens":512,"completion_tokens":8,"total_tokens":520,"prompt_tokens_details":{"cached_tokens":384}}"#;
    let head = |content_type| messages::response_headers(200, content_type);
    match shape {
        ResponseShape::None => Vec::new(),
        ResponseShape::Unary => vec![
            head("application/json"),
            response_body(
                format!(
                    r#"{{"id":"cmpl-1","model":"{model}","choices":[{{"index":0,"text":" ok"}}],{USAGE}}}"#
                ),
                false,
            ),
            response_body("", true),
        ],
        ResponseShape::Sse(chunks) => {
            let event = |n| {
                format!(
                    "data: {{\"id\":\"cmpl-1\",\"model\":\"{model}\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{n}\"}}}}]}}\n\n"
                )
            };
            let mut messages = vec![head("text/event-stream")];
            messages.extend((0..chunks).map(|n| response_body(event(n), false)));
            messages.push(response_body(
                format!("data: {{\"choices\":[],{USAGE}}}\n\ndata: [DONE]\n\n"),
                false,
            ));
            messages.push(response_body("", true));
            messages
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn prompts(bytes: usize, groups: usize, turns: Option<usize>) -> Prompts<'static> {
        Prompts { model: "bench-model", bytes, groups, turns }
    }

    fn shared(a: &[u8], b: &[u8]) -> usize {
        a.iter().zip(b).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn bodies_are_requests_of_the_size_that_was_asked_for() {
        for size in [256, 2048, 32_768] {
            let traffic = Traffic::new(&prompts(size, 3, None), ResponseShape::None);
            for serial in 0..12 {
                let body = traffic.body(serial);
                let parsed: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!((body.len(), &parsed["model"]), (size, &Value::from("bench-model")));
            }
        }
    }

    #[test]
    fn three_quarters_of_a_prompt_are_its_groups() {
        let asked = prompts(4096, 1, None);
        let one = body(&asked, 0, 0);
        let within = shared(one.as_bytes(), body(&asked, 0, 1).as_bytes());
        assert!((2900..3400).contains(&within), "{within}");
        assert!(shared(one.as_bytes(), body(&asked, 1, 0).as_bytes()) < 100);
    }

    #[test]
    fn conversations_grow_by_a_turn() {
        let traffic = Traffic::new(&prompts(8192, 2, Some(4)), ResponseShape::None);
        let bodies: Vec<_> = (0..16).map(|_| traffic.body(7)).collect();
        let messages = |body: &Bytes| {
            let body: Value = serde_json::from_slice(body).unwrap();
            body["messages"].as_array().unwrap().len()
        };
        assert_eq!(bodies[..8].iter().map(messages).collect::<Vec<_>>(), [1, 1, 3, 3, 5, 5, 7, 7]);
        assert!((7000..8400).contains(&bodies[7].len()), "{}", bodies[7].len());
        // Up to the end of the last message, a turn is the beginning of the next.
        assert!(shared(&bodies[4], &bodies[6]) > bodies[4].len() - TAIL.len());
        assert!(shared(&bodies[6], &bodies[7]) < 80, "conversations differ");
        assert!(shared(&bodies[0], &bodies[8]) < 80, "and differ when they begin anew");
        assert_eq!(traffic.body(0), bodies[0]);
    }

    #[test]
    fn response_shapes_read_as_they_are_written() {
        for text in ["none", "unary", "sse:20"] {
            assert_eq!(text.parse::<ResponseShape>().unwrap().to_string(), text);
        }
        assert!("sse:x".parse::<ResponseShape>().is_err());
        assert_eq!(Traffic::new(&prompts(9, 1, None), ResponseShape::Sse(20)).response.len(), 23);
    }
}
