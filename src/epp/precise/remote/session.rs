//! One connection after the other: rows, answers, speculative entries.
//!
//! # Failure
//!
//! Whatever is wrong with a connection ends it, and the next one begins anew: with the rows, then the
//! stream. Nothing here ends the task but its stop.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    epp::precise::{
        IndexError, SpeculationId,
        remote::{
            Shared,
            link::{self, Pending},
            metrics::Speculated,
            speculation::{Add, Change, Command, Ledger, millis},
            table::Rows,
        },
    },
    proto::kvindexer::{self as pb, kv_indexer_client::KvIndexerClient},
};

/// For calls that are not in anybody's way: lists, entries, the beginning of streams.
const CALL: Duration = Duration::from_secs(5);

/// A question without an answer for this long, long after its asker went away, shows that the stream
/// has got stuck.
const STUCK: Duration = Duration::from_secs(2);

/// Between two lists at least: whole tables of thousand pods are not cheap.
const LIST_PAUSE: Duration = Duration::from_millis(50);

/// Between two lists at most: numbers of blocks and aliases are not watched.
const LIST_AGAIN: Duration = Duration::from_secs(10);

/// Between two looks at what may be overdue.
const LOOK: Duration = Duration::from_millis(500);

/// Calls about speculative entries under way at most.
const CALLS: usize = 32;

/// Largest message that is read, bytes: a list of some 100 000 rows.
const MAX_MESSAGE: usize = 32 << 20;

/// The first wait after a connection ended, and the last. With a question every 250 ms, that an open
/// breaker lets through, scores are back within a second of the service.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A fault whose text keeps changing is told no more often.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// A connection that lasted this long was a good one.
const LASTED: Duration = Duration::from_secs(1);

type Client = KvIndexerClient<Channel>;

/// Why a connection ended.
#[derive(Debug)]
enum End {
    /// It could not be made.
    Unreachable(String),
    /// It broke.
    Lost(String),
    /// What came means nothing.
    Garbage(String),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Lost(format!("{:?}: {}", status.code(), status.message()))
    }
}

/// Keeps a connection until `stop`.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) -> anyhow::Result<()> {
    let mut wait = BACKOFF.0;
    // When it was last said that there is no connection.
    let mut said: Option<Instant> = None;
    loop {
        let began = Instant::now();
        let end = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            end = session(&shared) => Some(end),
        };
        // Whoever waits for an answer hears that none will come.
        let was_linked = shared.link.swap(None).is_some();
        let Some(end) = end else { return Ok(()) };
        let why = match end {
            End::Unreachable(why) => {
                shared.metrics.not_connected();
                why
            }
            End::Lost(why) => why,
            End::Garbage(what) => {
                let error = IndexError::Garbage(what);
                shared.metrics.failed(&error);
                error.to_string()
            }
        };
        let known = shared.problem.swap(Some(Arc::new(why.clone())));
        if was_linked {
            tracing::warn!(indexer = %shared.target, why, "The connection to the indexer ended.");
        } else if known.is_none_or(|known| *known != why)
            && said.is_none_or(|said| said.elapsed() >= SAY_AGAIN)
        {
            said = Some(Instant::now());
            tracing::warn!(indexer = %shared.target, why, "No connection to the indexer.");
        }
        wait = if was_linked && began.elapsed() >= LASTED {
            BACKOFF.0
        } else {
            (2 * wait).min(BACKOFF.1)
        };
        // Replicas must not all come at once.
        let jittered = wait.mul_f64(0.5 + fastrand::f64() / 2.0);
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = sleep(jittered) => {}
        }
    }
}

/// One connection, from its beginning to its end.
async fn session(shared: &Shared) -> End {
    let channel = match shared.target.channel().await {
        Ok(channel) => channel,
        Err(error) => return End::Unreachable(format!("{error:#}")),
    };
    let client = KvIndexerClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let (link, ends) = link::link();
    let begin = async {
        list(shared, &client).await?;
        let answers = client.clone().score_stream(ends.questions).await?.into_inner();
        let changes = client.clone().watch_pods(pb::WatchPodsRequest {}).await?.into_inner();
        Ok((answers, changes))
    };
    let (answers, changes) = match timeout(CALL, begin).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(end)) => return end,
        Err(_) => return End::Lost(format!("not a word within {CALL:?}")),
    };
    let link = Arc::new(link);
    shared.link.store(Some(Arc::clone(&link)));
    shared.problem.store(None);
    let _up = shared.metrics.connected();
    tracing::info!(indexer = %shared.target, "Connected to the indexer.");
    let ledger = Ledger::new(Arc::clone(&link.open));
    let pending = ends.pending;
    let end = tokio::select! {
        // Said by who found it.
        () = link.broken.cancelled() => End::Lost("an answer was nonsense".to_owned()),
        end = take_answers(shared, &pending, answers) => end,
        end = follow_rows(shared, &client, changes) => end,
        end = speculate(shared, &client, ledger, ends.commands) => end,
        () = stuck(&pending) => End::Lost(format!("no answer within {STUCK:?}")),
    };
    // The transport may keep its part of the stream for some time.
    pending.clear();
    end
}

/// Reads the rows.
async fn list(shared: &Shared, client: &Client) -> Result<(), End> {
    let answer = timeout(CALL, client.clone().list_pods(pb::ListPodsRequest {})).await;
    let answer = answer.map_err(|_| End::Lost(format!("no list of pods within {CALL:?}")))??;
    let rows = Rows::new(answer.into_inner())
        .map_err(|what| End::Garbage(format!("list of pods: {what}")))?;
    shared.rows.store(Some(Arc::new(rows)));
    Ok(())
}

async fn take_answers(
    shared: &Shared,
    pending: &Pending,
    mut answers: Streaming<pb::ScoreResponse>,
) -> End {
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                let id = answer.request_id;
                if !pending.answer(answer, &shared.metrics) {
                    return End::Garbage(format!("request_id: nobody asked {id}"));
                }
            }
            Ok(None) => return End::Lost("the indexer ended the stream".to_owned()),
            Err(status) => return status.into(),
        }
    }
}

/// Keeps states and rows true.
async fn follow_rows(
    shared: &Shared,
    client: &Client,
    mut changes: Streaming<pb::PodStatus>,
) -> End {
    let mut listed = tokio::time::Instant::now();
    let mut again = false;
    loop {
        let due = listed + if again { LIST_PAUSE } else { LIST_AGAIN };
        tokio::select! {
            change = changes.message() => match change {
                Ok(Some(status)) => {
                    let known = shared.rows.load().as_ref().is_some_and(|rows| rows.told(&status));
                    again |= !known;
                }
                Ok(None) => return End::Lost("the indexer ended the watch".to_owned()),
                Err(status) => return status.into(),
            },
            () = shared.list_again.notified() => again = true,
            () = sleep_until(due) => {
                if let Err(end) = list(shared, client).await {
                    return end;
                }
                (listed, again) = (tokio::time::Instant::now(), false);
            }
        }
    }
}

/// Returns when a question has had no answer for too long.
async fn stuck(pending: &Pending) {
    loop {
        sleep(LOOK).await;
        if pending.oldest().is_some_and(|asked| asked.elapsed() >= STUCK) {
            return;
        }
    }
}

/// What a call about an entry brought.
enum Called {
    Added(SpeculationId, Option<u64>),
    Changed(bool),
}

/// Works off the commands, some at a time.
async fn speculate(
    shared: &Shared,
    client: &Client,
    mut ledger: Ledger,
    mut commands: mpsc::Receiver<Command>,
) -> End {
    let mut calls: JoinSet<Called> = JoinSet::new();
    let mut look = tokio::time::interval(LOOK);
    loop {
        let change = tokio::select! {
            Some(called) = calls.join_next() => match called {
                Ok(Called::Added(id, handle)) => {
                    count(shared, handle.is_some());
                    match handle {
                        Some(handle) => ledger.taken(id, handle, Instant::now()),
                        None => {
                            ledger.refused(id);
                            None
                        }
                    }
                }
                Ok(Called::Changed(done)) => {
                    count(shared, done);
                    None
                }
                Err(error) => return End::Lost(error.to_string()),
            },
            command = commands.recv(), if calls.len() < CALLS => match command {
                Some(Command::Add(add)) => {
                    ledger.asked(add.id, add.until);
                    calls.spawn(call_add(client.clone(), add));
                    None
                }
                Some(Command::Extend { id, until }) => ledger.extend(id, until, Instant::now()),
                Some(Command::TakeBack { id }) => ledger.take_back(id),
                None => return End::Lost("nobody is left who asks".to_owned()),
            },
            _ = look.tick() => {
                ledger.expire(Instant::now());
                None
            }
        };
        if let Some(change) = change {
            calls.spawn(call_change(client.clone(), change));
        }
    }
}

fn count(shared: &Shared, done: bool) {
    shared.metrics.speculated(if done { Speculated::Done } else { Speculated::Failed });
}

async fn call_add(mut client: Client, add: Add) -> Called {
    let Add { id, query, pod, rank, until } = add;
    let request = pb::SpeculateRequest {
        request: Some(super::request(0, &query, Duration::ZERO)),
        pod: pod.as_ref().into(),
        dp_rank: rank,
        ttl_ms: millis(until, Instant::now()),
    };
    let answer = timeout(CALL, client.speculate(request)).await;
    let handle = answer.ok().and_then(Result::ok).map(|answer| answer.into_inner().handle);
    Called::Added(id, handle.filter(|&handle| handle != 0))
}

async fn call_change(mut client: Client, change: Change) -> Called {
    Called::Changed(matches!(timeout(CALL, client.unspeculate(change)).await, Ok(Ok(_))))
}
