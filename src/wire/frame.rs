//! ZeroMQ frames: live messages, replies to a replay request, and what a topic names.
//!
//! | message | frames |
//! | --- | --- |
//! | live (SUB) | `[topic, sequence, payload]` |
//! | replay reply, vLLM up to 0.25, SGLang up to 0.5.21 | `[b"", sequence, payload]` |
//! | replay reply, later | `[b"", topic, sequence, payload]` |
//! | end of a replay | sequence `ff × 8` and an empty payload, in either form |
//!
//! The empty delimiter of a reply is there on a DEALER and taken away by a REQ socket, so replies
//! are read from their end.

use std::borrow::Cow;

use super::DecodeError;

/// The sequence that ends a replay (-1 in the engines). No publisher reaches it.
const END: u64 = u64::MAX;

/// Longest model name that a topic may carry, in bytes. File paths used as model names fit.
pub const MAX_MODEL_BYTES: usize = 1024;

/// The parts of one live message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames<'a> {
    /// Opaque; see [`Topic::parse`].
    pub topic: &'a [u8],
    /// The publisher's number of the message: from 0, one more each time.
    pub sequence: u64,
    /// The event batch. Not empty.
    pub payload: &'a [u8],
}

impl<'a> Frames<'a> {
    /// Splits a live message.
    ///
    /// # Errors
    ///
    /// If there are not three frames, the second is not 8 bytes or is the end marker of a replay,
    /// or the third is empty.
    pub fn split<F: AsRef<[u8]>>(frames: &'a [F]) -> Result<Self, DecodeError> {
        let [topic, sequence, payload] = frames else {
            return Err(DecodeError::FrameCount { got: frames.len(), want: "3" });
        };
        let sequence = number(sequence.as_ref())?;
        if sequence == END {
            return Err(DecodeError::EndMarker);
        }
        Ok(Self { topic: topic.as_ref(), sequence, payload: filled(payload.as_ref())? })
    }
}

/// One message of the answer to a replay request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayReply<'a> {
    /// A batch that the publisher still had.
    Batch {
        /// Its number, as on the live stream.
        sequence: u64,
        /// The event batch. Not empty.
        payload: &'a [u8],
    },
    /// Nothing more comes.
    End,
}

impl<'a> ReplayReply<'a> {
    /// Parses a reply as received on a DEALER socket, with or without its empty delimiter.
    ///
    /// # Errors
    ///
    /// If there are fewer than two or more than four frames, or four of which the first is not
    /// empty; if the sequence is not 8 bytes; if the payload is empty though the sequence is not
    /// the end marker, or the other way round.
    pub fn parse<F: AsRef<[u8]>>(frames: &'a [F]) -> Result<Self, DecodeError> {
        let (sequence, payload) = match frames {
            [sequence, payload] | [_, sequence, payload] => (sequence, payload),
            [delimiter, _, sequence, payload] if delimiter.as_ref().is_empty() => {
                (sequence, payload)
            }
            _ => {
                let want = "2 or 3 after an empty delimiter";
                return Err(DecodeError::FrameCount { got: frames.len(), want });
            }
        };
        let sequence = number(sequence.as_ref())?;
        let payload = payload.as_ref();
        match (sequence, payload.is_empty()) {
            (END, true) => Ok(Self::End),
            (END, false) => Err(DecodeError::EndMarker),
            _ => Ok(Self::Batch { sequence, payload: filled(payload)? }),
        }
    }
}

/// What a topic names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic<'a> {
    /// Pod id; may be empty.
    pub pod: Cow<'a, str>,
    /// Model; empty if the topic names none.
    pub model: Cow<'a, str>,
}

impl<'a> Topic<'a> {
    /// Splits `<prefix>@<pod>@<model>` as llm-d does, except that the model may contain `@` too.
    /// Any other topic is a pod id as a whole, and names no model. Bytes that are not UTF-8 are
    /// replaced, never refused.
    ///
    /// # Errors
    ///
    /// If the pod id has more than `max_pod_bytes` bytes or the model more than
    /// [`MAX_MODEL_BYTES`]; neither is copied then.
    pub fn parse(topic: &'a [u8], max_pod_bytes: usize) -> Result<Self, DecodeError> {
        let mut parts = topic.splitn(3, |&byte| byte == b'@');
        let (pod, model): (&[u8], &[u8]) = match (parts.next(), parts.next(), parts.next()) {
            (Some(_), Some(pod), Some(model)) => (pod, model),
            _ => (topic, b""),
        };
        if pod.len() > max_pod_bytes {
            return Err(DecodeError::PodIdSize { got: pod.len(), limit: max_pod_bytes });
        }
        if model.len() > MAX_MODEL_BYTES {
            return Err(DecodeError::ModelSize { got: model.len(), limit: MAX_MODEL_BYTES });
        }
        Ok(Self { pod: String::from_utf8_lossy(pod), model: String::from_utf8_lossy(model) })
    }
}

fn number(frame: &[u8]) -> Result<u64, DecodeError> {
    match frame.try_into() {
        Ok(bytes) => Ok(u64::from_be_bytes(bytes)),
        Err(_) => Err(DecodeError::Sequence { got: frame.len() }),
    }
}

fn filled(payload: &[u8]) -> Result<&[u8], DecodeError> {
    if payload.is_empty() { Err(DecodeError::EmptyPayload) } else { Ok(payload) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQ: &[u8] = &[0, 0, 0, 0, 0, 0, 1, 2];
    const FF: &[u8] = &[0xff; 8];

    #[track_caller]
    fn check_split(frames: &[&[u8]], want: Result<u64, &'static str>) {
        let got = Frames::split(frames).map(|f| f.sequence).map_err(|e| e.reason());
        assert_eq!(got, want, "{frames:?}");
    }

    #[test]
    fn live_messages_have_three_frames() {
        check_split(&[b"t", SEQ, b"p"], Ok(258));
        check_split(&[b"", SEQ, b"p"], Ok(258));
        check_split(&[b"\xff\xfe", SEQ, b"p"], Ok(258));
        check_split(&[], Err("frame_count"));
        check_split(&[SEQ, b"p"], Err("frame_count"));
        check_split(&[b"t", SEQ, b"p", b""], Err("frame_count"));
        check_split(&[b"t", &[0, 0, 1], b"p"], Err("sequence")); // C23
        check_split(&[b"t", &[0; 9], b"p"], Err("sequence"));
        check_split(&[b"t", FF, b""], Err("end_marker"));
        check_split(&[b"t", FF, b"p"], Err("end_marker"));
        check_split(&[b"t", SEQ, b""], Err("empty_payload"));
    }

    #[track_caller]
    fn check_reply(frames: &[&[u8]], want: Result<ReplayReply<'_>, &'static str>) {
        assert_eq!(ReplayReply::parse(frames).map_err(|e| e.reason()), want, "{frames:?}");
    }

    #[test]
    fn replies_are_read_from_their_end() {
        let batch = Ok(ReplayReply::Batch { sequence: 258, payload: b"p" });
        check_reply(&[b"", SEQ, b"p"], batch);
        check_reply(&[b"", b"topic", SEQ, b"p"], batch);
        check_reply(&[b"", b"", SEQ, b"p"], batch);
        check_reply(&[SEQ, b"p"], batch);
        check_reply(&[b"topic", SEQ, b"p"], batch);
        // A topic of 8 bytes is not taken for a sequence.
        check_reply(&[b"", b"12345678", SEQ, b"p"], batch);
        check_reply(&[b"", FF, b""], Ok(ReplayReply::End));
        check_reply(&[b"", b"", FF, b""], Ok(ReplayReply::End));
        check_reply(&[FF, b""], Ok(ReplayReply::End));
        check_reply(&[b"", FF, b"p"], Err("end_marker"));
        check_reply(&[b"", SEQ, b""], Err("empty_payload"));
        check_reply(&[b"", b"t", &[1], b"p"], Err("sequence"));
        check_reply(&[b"x", b"t", SEQ, b"p"], Err("frame_count"));
        check_reply(&[b"", b"", b"t", SEQ, b"p"], Err("frame_count"));
        check_reply(&[b""], Err("frame_count"));
        check_reply(&[], Err("frame_count"));
    }

    #[track_caller]
    fn check_topic(topic: &[u8], pod: &str, model: &str) {
        let got = Topic::parse(topic, 64).unwrap();
        assert_eq!((&*got.pod, &*got.model), (pod, model));
    }

    #[test]
    fn topics_name_pod_and_model() {
        check_topic(b"kv@pod-123@llama-2-7b", "pod-123", "llama-2-7b"); // C20
        check_topic(b"pod-123@llama", "pod-123@llama", ""); // C21
        check_topic(b"fallback", "fallback", ""); // C22
        check_topic(b"", "", "");
        check_topic(b"kv@10.0.0.1:8000@org/model@rev", "10.0.0.1:8000", "org/model@rev");
        check_topic(b"any@p@m", "p", "m");
        check_topic(b"kv@p@", "p", "");
        check_topic(b"kv@@m", "", "m");
        check_topic(b"\xff\xfe", "\u{fffd}\u{fffd}", "");
    }

    #[test]
    fn names_in_topics_are_bounded() {
        let reason = |topic: &[u8]| Topic::parse(topic, 8).map_err(|e| e.reason()).err();
        assert_eq!(reason(b"12345678"), None);
        assert_eq!(reason(b"123456789"), Some("pod_id_size"));
        assert_eq!(reason(b"kv@123456789@m"), Some("pod_id_size"));
        assert_eq!(reason(b"a-long-prefix@12345678@m"), None);
        let long = [b"kv@p@".as_slice(), &[b'm'; MAX_MODEL_BYTES + 1]].concat();
        assert_eq!(reason(&long), Some("model_size"));
    }
}
