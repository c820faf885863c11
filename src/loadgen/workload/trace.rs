//! Recorded traffic.
//!
//! | format | a line | what is known |
//! | --- | --- | --- |
//! | Mooncake | `{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, …]}` | which blocks of 512 tokens prompts have in common |
//! | plain | `{"at_ms": 12.5, "prompt_tokens": 800, "output_tokens": 50}` | times and lengths |
//! | Azure | CSV with the columns `TIMESTAMP,ContextTokens,GeneratedTokens` | times and lengths |
//!
//! What a file is, its first line says; it may be gzip-compressed. Where blocks are not known, prompts
//! have nothing in common. Times count from the first line; lines that come before it in time are taken
//! for simultaneous with it.
//!
//! # Failure
//!
//! The first wrong line ends the reading, with file, line and field. Lines, and what is kept of them, are
//! bounded.

pub mod command;
pub mod generate;

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    Part, Planned, Prompt,
    lengths::MAX_TOKENS,
    random::{Role, seed_of},
};

/// Tokens that a `hash_id` of a Mooncake file stands for.
pub const MOONCAKE_BLOCK: u32 = 512;
/// Requests that are read at most.
const MAX_REQUESTS: usize = 10_000_000;
/// Parts of all prompts at most: 16 bytes each.
const MAX_PARTS: usize = 64_000_000;
/// Bytes of a line at most.
const MAX_LINE: usize = 16 << 20;
/// Nanoseconds that may pass in a file: ten years.
const MAX_NANOS: f64 = 3.2e17;

/// What is read of a file, and how it is played.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceOptions {
    /// Factor of times, above 0: 0.5 is twice as fast.
    pub time_scale: f64,
    /// Where the window begins, in the file's time; it is the plan's beginning.
    pub from: Duration,
    /// Where it ends, exclusive; `None` = at the end of the file.
    pub to: Option<Duration>,
    /// Factor of all lengths, above 0; nothing becomes shorter than one token.
    pub scale: f64,
    /// What tokens are made from.
    pub seed: u64,
}

impl Default for TraceOptions {
    fn default() -> Self {
        Self { time_scale: 1.0, from: Duration::ZERO, to: None, scale: 1.0, seed: 0 }
    }
}

/// Formats of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFormat {
    /// Mooncake's JSON lines.
    Mooncake,
    /// JSON lines with times and lengths.
    Plain,
    /// Azure's CSV.
    Azure,
}

/// A trace that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// What the file was.
    pub format: TraceFormat,
    /// The requests of the window, by `at`; not empty.
    pub requests: Vec<Planned>,
}

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line is wrong.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong, with the field.
        reason: String,
    },
    /// The window has no request.
    #[error("{}: no request in the window; the file has {requests}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Requests of the file.
        requests: usize,
    },
    /// The options make no sense.
    #[error("a trace's {0} is a number above 0")]
    Option(&'static str),
}

/// What a line says.
struct Row {
    /// Nanoseconds since whenever.
    at: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    /// Empty: nothing in common with anybody.
    blocks: Vec<u64>,
}

impl Trace {
    /// Reads a file, plain or gzip-compressed.
    ///
    /// # Errors
    ///
    /// [`TraceError`].
    pub fn open(path: &Path, options: &TraceOptions) -> Result<Self, TraceError> {
        let file =
            File::open(path).map_err(|source| TraceError::Io { path: path.to_owned(), source })?;
        Self::read(path, file, options)
    }

    /// Reads a trace from anywhere; `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`TraceError`].
    pub fn read(
        name: &Path,
        source: impl Read,
        options: &TraceOptions,
    ) -> Result<Self, TraceError> {
        for (name, factor) in [("time scale", options.time_scale), ("scale", options.scale)] {
            if !(factor.is_finite() && factor > 0.0) {
                return Err(TraceError::Option(name));
            }
        }
        let failed = |source| TraceError::Io { path: name.to_owned(), source };
        let mut source = BufReader::new(source);
        let start = source.fill_buf().map_err(failed)?;
        if start.starts_with(&[0x1f, 0x8b]) {
            let unpacked = flate2::bufread::MultiGzDecoder::new(source);
            Reader::new(name, options).run(BufReader::new(unpacked))
        } else {
            Reader::new(name, options).run(source)
        }
    }
}

/// A trace while it is read.
struct Reader<'a> {
    name: &'a Path,
    options: &'a TraceOptions,
    format: Option<TraceFormat>,
    /// Positions of Azure's columns.
    columns: [usize; 3],
    /// Time of the first line, nanoseconds.
    first: Option<f64>,
    /// Dense numbers of the file's block ids.
    ids: HashMap<u64, u64>,
    /// Groups, by the first block.
    groups: HashMap<u64, u32>,
    rows: usize,
    parts: usize,
    requests: Vec<Planned>,
}

impl<'a> Reader<'a> {
    fn new(name: &'a Path, options: &'a TraceOptions) -> Self {
        Self {
            name,
            options,
            format: None,
            columns: [0; 3],
            first: None,
            ids: HashMap::new(),
            groups: HashMap::new(),
            rows: 0,
            parts: 0,
            requests: Vec::new(),
        }
    }

    fn run(mut self, mut source: impl BufRead) -> Result<Trace, TraceError> {
        let mut bytes = Vec::new();
        for line in 1.. {
            bytes.clear();
            let read = source
                .by_ref()
                .take(MAX_LINE as u64 + 1)
                .read_until(b'\n', &mut bytes)
                .map_err(|source| TraceError::Io { path: self.name.to_owned(), source })?;
            if read == 0 {
                break;
            }
            self.line(&bytes).map_err(|reason| TraceError::Line {
                path: self.name.to_owned(),
                line,
                reason,
            })?;
        }
        let Some(format) = self.format.filter(|_| !self.requests.is_empty()) else {
            return Err(TraceError::Empty { path: self.name.to_owned(), requests: self.rows });
        };
        self.requests.sort_by_key(|request| request.at);
        Ok(Trace { format, requests: self.requests })
    }

    fn line(&mut self, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() > MAX_LINE {
            return Err(format!("a line of more than {MAX_LINE} bytes"));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            return Ok(());
        }
        let row = match self.format {
            Some(TraceFormat::Azure) => azure(text, self.columns)?,
            Some(_) => self.json(text)?,
            None if text.starts_with('{') => self.json(text)?,
            None => {
                self.columns = header(text)?;
                self.format = Some(TraceFormat::Azure);
                return Ok(());
            }
        };
        self.rows += 1;
        self.take(&row)
    }

    fn json(&mut self, text: &str) -> Result<Row, String> {
        let mut fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let format = *self.format.get_or_insert(if fields.contains_key("timestamp") {
            TraceFormat::Mooncake
        } else {
            TraceFormat::Plain
        });
        let names = match format {
            TraceFormat::Mooncake => ["timestamp", "input_length", "output_length"],
            _ => ["at_ms", "prompt_tokens", "output_tokens"],
        };
        let at = field::<f64>(&mut fields, names[0])? * 1e6;
        if at.abs() > MAX_NANOS * 1e3 {
            return Err(format!("{}: out of range", names[0]));
        }
        let prompt_tokens = length(field(&mut fields, names[1])?, names[1])?;
        let output_tokens = length(field(&mut fields, names[2])?, names[2])?;
        let blocks = match format {
            TraceFormat::Mooncake => {
                let blocks: Vec<u64> = field(&mut fields, "hash_ids")?;
                let want = prompt_tokens.div_ceil(MOONCAKE_BLOCK) as usize;
                if blocks.len() != want {
                    return Err(format!(
                        "hash_ids: {} of them, where {prompt_tokens} tokens have {want} blocks of \
                         {MOONCAKE_BLOCK}",
                        blocks.len()
                    ));
                }
                blocks
            }
            _ => Vec::new(),
        };
        Ok(Row { at, prompt_tokens, output_tokens, blocks })
    }

    /// Makes a request of a row, if it is in the window.
    fn take(&mut self, row: &Row) -> Result<(), String> {
        let options = self.options;
        let nanos = (row.at - *self.first.get_or_insert(row.at)).max(0.0);
        if nanos > MAX_NANOS {
            return Err("more than ten years after the first line".to_owned());
        }
        let at = Duration::from_nanos(nanos.round() as u64);
        if at < options.from || options.to.is_some_and(|to| at >= to) {
            return Ok(());
        }
        let at = (at - options.from).as_secs_f64() * options.time_scale;
        let at = Duration::try_from_secs_f64(at)
            .map_err(|_| "with this time scale, it comes in no foreseeable time".to_owned())?;
        self.parts += row.blocks.len().max(1);
        if self.requests.len() >= MAX_REQUESTS || self.parts > MAX_PARTS {
            return Err(format!(
                "more than {MAX_REQUESTS} requests or {MAX_PARTS} blocks; choose a smaller window"
            ));
        }
        let group = self.groups.len();
        let (parts, group) = match row.blocks.first() {
            None => {
                let seed = seed_of(options.seed, Role::Unique, self.requests.len() as u64);
                let tokens = self.scaled(row.prompt_tokens).max(1);
                (vec![Part { seed, tokens }], self.requests.len())
            }
            Some(first) => {
                let group = *self.groups.entry(*first).or_insert(group as u32);
                (self.blocks(row), group as usize)
            }
        };
        self.requests.push(Planned {
            at: Some(at),
            burst: None,
            prompt: Prompt { parts: parts.into() },
            max_tokens: self.scaled(row.output_tokens).clamp(1, MAX_TOKENS),
            group: u32::try_from(group).unwrap_or(u32::MAX),
            after: None,
        });
        Ok(())
    }

    /// Parts of a prompt of blocks; the last one may be shorter. Ends are scaled, not lengths, so that
    /// what a scale rounds away does not add up.
    fn blocks(&mut self, row: &Row) -> Vec<Part> {
        let mut parts = Vec::with_capacity(row.blocks.len());
        let mut begin = 0;
        for (at, id) in row.blocks.iter().enumerate() {
            let end = row.prompt_tokens.min((at as u32 + 1).saturating_mul(MOONCAKE_BLOCK));
            let end = self.scaled(end);
            let next = self.ids.len() as u64;
            let id = *self.ids.entry(*id).or_insert(next);
            if end > begin {
                let seed = seed_of(self.options.seed, Role::Recorded, id);
                parts.push(Part { seed, tokens: end - begin });
                begin = end;
            }
        }
        if parts.is_empty() {
            let id = row.blocks.first().and_then(|id| self.ids.get(id)).copied().unwrap_or(0);
            let seed = seed_of(self.options.seed, Role::Recorded, id);
            parts.push(Part { seed, tokens: 1 });
        }
        parts
    }

    fn scaled(&self, tokens: u32) -> u32 {
        (f64::from(tokens) * self.options.scale).round() as u32
    }
}

/// Takes a field of a JSON line.
fn field<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    name: &'static str,
) -> Result<T, String> {
    let value = fields.remove(name).ok_or_else(|| format!("{name} is missing"))?;
    serde_json::from_value(value).map_err(|error| format!("{name}: {error}"))
}

/// A number of tokens. Answers of 0 tokens are in real files; they become 1 later.
fn length(tokens: u64, name: &str) -> Result<u32, String> {
    let least = u64::from(name != "output_length" && name != "output_tokens" && name != AZURE[2]);
    u32::try_from(tokens)
        .ok()
        .filter(|it| *it <= MAX_TOKENS && u64::from(*it) >= least)
        .ok_or_else(|| format!("{name}: {tokens} is not from {least} to {MAX_TOKENS}"))
}

/// Columns of an Azure file.
const AZURE: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// Positions of the columns.
fn header(text: &str) -> Result<[usize; 3], String> {
    let columns: Vec<&str> = text.split(',').map(str::trim).collect();
    let mut positions = [0; 3];
    for (position, name) in positions.iter_mut().zip(AZURE) {
        *position =
            columns.iter().position(|it| it.eq_ignore_ascii_case(name)).ok_or_else(|| {
                format!("neither a JSON object nor a CSV header with the column {name}")
            })?;
    }
    Ok(positions)
}

fn azure(text: &str, columns: [usize; 3]) -> Result<Row, String> {
    let cells: Vec<&str> = text.split(',').map(str::trim).collect();
    let cell = |at: usize| {
        let cell = cells.get(columns[at]).copied();
        cell.ok_or_else(|| format!("{} is missing", AZURE[at]))
    };
    let tokens = |at: usize| {
        let text = cell(at)?;
        let tokens = text.parse().map_err(|_| format!("{}: {text:?} is no number", AZURE[at]))?;
        length(tokens, AZURE[at])
    };
    let text = cell(0)?;
    let at = clock(text).ok_or_else(|| {
        format!("{}: {text:?} is no time such as 2023-11-16 18:15:46.68", AZURE[0])
    })?;
    Ok(Row { at, prompt_tokens: tokens(1)?, output_tokens: tokens(2)?, blocks: Vec::new() })
}

/// Nanoseconds, from some day on, of `2023-11-16 18:15:46.6805900`, or with a `T` in it and a zone behind
/// it, which is taken for the same in all lines.
fn clock(text: &str) -> Option<f64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let time = time.split(['+', '-', 'Z']).next()?.trim();
    let numbers = |text: &str, separator: char| -> Option<[u32; 3]> {
        let numbers: Vec<u32> =
            text.split(separator).map(str::parse).collect::<Result<_, _>>().ok()?;
        numbers.try_into().ok()
    };
    let (whole, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(whole, ':')?;
    let in_range = (1970..3000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60
        && fraction.bytes().all(|byte| byte.is_ascii_digit());
    if !in_range {
        return None;
    }
    // Years that begin with March, so that the leap day is the last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    // From about 2000, so that a float keeps microseconds.
    let since = f64::from(days) - 730_426.0;
    let seconds = since * 86_400.0 + f64::from(hour * 3_600 + minute * 60 + second);
    let fraction: f64 = format!("0.{fraction}").parse().ok()?;
    Some((seconds + fraction) * 1e9)
}

#[cfg(test)]
mod tests;
