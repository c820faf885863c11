//! A process that says where it listens, and ends with us.
//!
//! # Model
//!
//! A child announces what others need to know on its standard output, a line each, and takes the end of
//! its standard input for the wish to stop: we hold the other end, so that no child outlives us, however
//! we end. It has a process group of its own: Ctrl-C is for us to handle.
//!
//! # Failure
//!
//! One that ends early says why on its standard error; the last lines of it are part of our errors.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{self, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::support::sync::lock;

/// Lines of standard output that are kept, from the first; later ones are read and forgotten.
const LINES_OUT: usize = 4_096;
/// Lines of standard error that are kept, the last ones.
const LINES_ERR: usize = 50;
/// Bytes of a line at most.
const LINE_BYTES: u64 = 64 << 10;
/// How often we look for what a child has said, and whether it is there.
const LOOK: Duration = Duration::from_millis(2);
/// How long a child may take to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// What it has said.
#[derive(Debug, Default)]
struct Said {
    out: Vec<String>,
    err: VecDeque<String>,
}

/// A running process. Dropping it ends it, and waits up to three seconds for that.
#[derive(Debug)]
pub struct Child {
    name: &'static str,
    process: process::Child,
    said: Arc<Mutex<Said>>,
    /// Those that read what it says.
    readers: Vec<JoinHandle<()>>,
    /// It has had its time to end.
    waited: bool,
}

impl Child {
    /// Starts a program; `name` is what it is called in errors.
    ///
    /// # Errors
    ///
    /// A program that cannot be run, by path.
    pub fn start<A: AsRef<OsStr>>(
        name: &'static str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let mut process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {name}: {}", program.display()))?;
        let said = Arc::<Mutex<Said>>::default();
        let (out, err) = (process.stdout.take(), process.stderr.take());
        let mut child = Self { name, process, said, readers: Vec::new(), waited: false };
        let keep = |said: &mut Said, line| {
            if said.out.len() < LINES_OUT {
                said.out.push(line);
            }
        };
        child.listen(out, keep)?;
        let keep = |said: &mut Said, line| {
            if said.err.len() == LINES_ERR {
                said.err.pop_front();
            }
            said.err.push_back(line);
        };
        child.listen(err, keep)?;
        Ok(child)
    }

    /// Reads a stream to its end, on a thread of its own, so that the child never waits for us.
    fn listen(
        &mut self,
        stream: Option<impl Read + Send + 'static>,
        keep: impl Fn(&mut Said, String) + Send + 'static,
    ) -> Result<()> {
        let Some(stream) = stream else { return Ok(()) };
        let said = Arc::clone(&self.said);
        let read = move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            loop {
                line.clear();
                match stream.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {
                        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                        keep(&mut lock(&said), text);
                    }
                }
            }
        };
        let thread = thread::Builder::new().name(format!("{}-said", self.name));
        self.readers.push(thread.spawn(read).context("starting a thread")?);
        Ok(())
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What follows `prefix` in a line of its standard output, parsed; waits until it is there.
    ///
    /// # Errors
    ///
    /// A child that ends without, or does not say it in time, with its last words.
    pub async fn announced<T: std::str::FromStr>(
        &mut self,
        prefix: &str,
        patience: Duration,
    ) -> Result<T> {
        let found = |lines: &[String]| {
            let mut texts = lines.iter().filter_map(|line| line.strip_prefix(prefix));
            texts.find_map(|text| text.split_whitespace().next()?.parse().ok())
        };
        self.heard(prefix, patience, found).await
    }

    /// Waits until `found` makes something of the lines of its standard output; `what` is named in
    /// errors.
    ///
    /// # Errors
    ///
    /// As [`announced`](Self::announced).
    pub async fn heard<T>(
        &mut self,
        what: &str,
        patience: Duration,
        found: impl Fn(&[String]) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            // Asked before, since a child that has ended may still have said it.
            let last_words = self.last_words().await;
            if let Some(value) = found(&lock(&self.said).out) {
                return Ok(value);
            }
            if let Some(last_words) = last_words {
                bail!(last_words);
            }
            if Instant::now() >= deadline {
                bail!("{} did not say {what:?} within {patience:?}{}", self.name, self.quote());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Why it ended by itself, as far as it has been heard; `None` while it runs.
    pub fn fault(&mut self) -> Option<String> {
        if !self.has_ended() {
            return None;
        }
        let status = match self.process.try_wait() {
            Ok(Some(status)) => status.to_string(),
            _ => "no status".to_owned(),
        };
        Some(format!("{} ended: {status}{}", self.name, self.quote()))
    }

    /// As [`fault`](Self::fault), but hears it out, for a second at most.
    pub async fn last_words(&mut self) -> Option<String> {
        const HEARING: Duration = Duration::from_secs(1);
        if !self.has_ended() {
            return None;
        }
        let deadline = Instant::now() + HEARING;
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
        self.fault()
    }

    fn has_ended(&mut self) -> bool {
        // What cannot be asked any more is gone.
        self.process.try_wait().is_ok_and(|status| status.is_some())
    }

    /// The last lines of standard error, below a colon.
    #[must_use]
    pub fn quote(&self) -> String {
        let said = lock(&self.said);
        said.err.iter().fold(String::new(), |text, line| text + "\n  " + line)
    }

    /// Waits until it has ended, after [`ask_to_end`](Self::ask_to_end); at most `patience`, and at most three
    /// seconds. One that is there after that is killed when it is dropped.
    pub async fn ended(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience.min(GRACE);
        while !self.has_ended() && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
        self.waited = true;
    }

    /// Asks it to end, without waiting.
    pub fn ask_to_end(&mut self) {
        drop(self.process.stdin.take());
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let deadline = Instant::now() + GRACE;
        self.ask_to_end();
        while !self.waited && !self.has_ended() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        if !self.has_ended() {
            // One that is gone after all needs no killing.
            self.process.kill().ok();
            self.process.wait().ok();
        }
    }
}
