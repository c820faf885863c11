//! Recorded event streams: what a subscriber of a real engine received, one message a line.
//!
//! A line is a JSON object: `rank` (data-parallel rank of the publisher), `topic`, `seq`,
//! `payload_b64` (the msgpack batch, standard base64) and, optionally, `t` (wall clock of arrival in
//! seconds). Lines of one rank are in order of arrival; ranks may interleave. A file may be
//! gzip-compressed; its content decides, not its name.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

/// A recorded file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// One stream per rank, by rank.
    pub ranks: Vec<Arc<RankStream>>,
}

/// What one publisher sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankStream {
    /// Data-parallel rank.
    pub rank: u32,
    /// Messages in order of arrival. Sequences fall where the engine was restarted.
    pub batches: Vec<Batch>,
}

/// One message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// First frame.
    pub topic: String,
    /// Second frame, as a number.
    pub sequence: u64,
    /// Third frame: the msgpack batch.
    pub payload: Vec<u8>,
    /// Wall clock of arrival, seconds since the Unix epoch, if it was recorded.
    pub arrived: Option<f64>,
}

/// Why a file is not a recording.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordingError {
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line cannot be read or is not a message.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is no message in the file.
    #[error("{}: no message in it", .0.display())]
    Empty(PathBuf),
}

#[derive(Deserialize)]
struct Line {
    rank: u32,
    topic: String,
    seq: u64,
    payload_b64: String,
    t: Option<f64>,
}

impl Recording {
    /// Reads a file, plain or gzip-compressed.
    ///
    /// # Errors
    ///
    /// [`RecordingError`].
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let file = File::open(path)
            .map_err(|source| RecordingError::Io { path: path.to_owned(), source })?;
        Self::read(path, file)
    }

    /// Reads a recording from anywhere; `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`RecordingError`].
    pub fn read(name: &Path, source: impl Read) -> Result<Self, RecordingError> {
        let mut source = BufReader::new(source);
        let start = source
            .fill_buf()
            .map_err(|source| RecordingError::Io { path: name.to_owned(), source })?;
        if start.starts_with(&[0x1f, 0x8b]) {
            Self::parse(name, BufReader::new(flate2::bufread::MultiGzDecoder::new(source)))
        } else {
            Self::parse(name, source)
        }
    }

    fn parse(name: &Path, source: impl BufRead) -> Result<Self, RecordingError> {
        let mut ranks: BTreeMap<u32, Vec<Batch>> = BTreeMap::new();
        for (at, text) in source.lines().enumerate() {
            let failed = |reason: String| RecordingError::Line {
                path: name.to_owned(),
                line: at + 1,
                reason,
            };
            let text = text.map_err(|error| failed(error.to_string()))?;
            if text.trim().is_empty() {
                continue;
            }
            let line: Line =
                serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
            let payload = STANDARD
                .decode(&line.payload_b64)
                .map_err(|error| failed(format!("payload_b64: {error}")))?;
            ranks.entry(line.rank).or_default().push(Batch {
                topic: line.topic,
                sequence: line.seq,
                payload,
                arrived: line.t,
            });
        }
        if ranks.is_empty() {
            return Err(RecordingError::Empty(name.to_owned()));
        }
        let ranks = ranks.into_iter().map(|(rank, batches)| Arc::new(RankStream { rank, batches }));
        Ok(Self { ranks: ranks.collect() })
    }
}

impl Batch {
    /// When it was sent, in seconds: the recorded arrival, else the timestamp with which the payload
    /// begins. `None` if it has neither.
    #[must_use]
    pub fn time(&self) -> Option<f64> {
        self.arrived.or_else(|| payload_timestamp(&self.payload))
    }
}

/// The first element of a msgpack array, if it is a float.
fn payload_timestamp(payload: &[u8]) -> Option<f64> {
    let rest = match payload {
        [0x90..=0x9f, rest @ ..] | [0xdc, _, _, rest @ ..] => rest,
        _ => return None,
    };
    let bytes = rest.strip_prefix(&[0xcb])?.first_chunk::<8>()?;
    Some(f64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LINES: &str = concat!(
        r#"{"rank":1,"topic":"kv","seq":7,"payload_b64":"k8tB2VT8QAAAAJDA"}"#,
        "\n\n",
        r#"{"rank":0,"topic":"","seq":0,"payload_b64":"","t":1.5}"#,
        "\n",
        r#"{"rank":1,"topic":"kv","seq":0,"payload_b64":"kA=="}"#,
    );

    fn read(bytes: &[u8]) -> Result<Recording, String> {
        Recording::read(Path::new("x.jsonl"), bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn ranks_are_separated_and_keep_their_order() {
        let recording = read(LINES.as_bytes()).unwrap();
        let seen: Vec<_> = recording
            .ranks
            .iter()
            .map(|r| (r.rank, r.batches.iter().map(|b| b.sequence).collect::<Vec<_>>()))
            .collect();
        assert_eq!(seen, [(0, vec![0]), (1, vec![7, 0])]);
        assert_eq!(recording.ranks[0].batches[0].time(), Some(1.5));
        assert_eq!(recording.ranks[1].batches[0].time(), Some(1_700_000_000.0));
        assert_eq!(recording.ranks[1].batches[1].time(), None);
    }

    #[test]
    fn gzip_is_recognized_by_content() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gz.write_all(LINES.as_bytes()).unwrap();
        assert_eq!(read(&gz.finish().unwrap()), read(LINES.as_bytes()));
    }

    #[test]
    fn errors_name_file_and_line() {
        assert_eq!(read(b"\n"), Err("x.jsonl: no message in it".to_owned()));
        let error = read(b"\n{\"rank\":0}").unwrap_err();
        assert!(error.starts_with("x.jsonl:2: missing field"), "{error}");
        let error = read(br#"{"rank":0,"topic":"","seq":0,"payload_b64":"*"}"#).unwrap_err();
        assert!(error.starts_with("x.jsonl:1: payload_b64: "), "{error}");
        let error = Recording::open(Path::new("/nonexistent/x.jsonl")).unwrap_err().to_string();
        assert_eq!(error, "cannot read /nonexistent/x.jsonl");
        let mut cut = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        cut.write_all(LINES.as_bytes()).unwrap();
        let cut = cut.finish().unwrap();
        assert!(read(&cut[..cut.len() - 12]).unwrap_err().starts_with("x.jsonl:"));
    }
}
