//! The indexer under the events of a fleet and scores at once: 64 publishers × 1 000 batches/s of 1–4 blocks beside
//! 2 000 scores/s, and how much more it takes without losing anything.
//!
//! ```text
//! cargo bench --bench load -- [--seconds 60] [--publishers 64] [--rate 1000] [--scores 2000] [--steps 1.5,2,3]
//! ```
//!
//! Three processes: the real `kv-indexer`; `load publish`, which has every batch encoded before it begins
//! and no replay sockets, so that what is lost is lost; and this one, which asks and looks. The CPU of each is
//! reported apart. The first line of figures is the load asked for; then each step multiplies its rate,
//! a sixth as long. A step is lossless if no pod saw a gap, everything sent is applied two seconds after its
//! end, and the publishers kept the pace.
//!
//! Each publisher stores and removes chains of 1–4 blocks in turn, 8 000 held at a time; its first batches are a
//! prompt of 32 blocks that every pod keeps, which is what scores ask for. Latency counts from when a call was due.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark may stop at the first fault"
)]

use std::{
    io::{BufRead as _, BufReader, Lines, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hdrhistogram::Histogram;
use kv_indexer::{
    proto::kvindexer::{
        ListPodsRequest, PodState, PodStatus, Prompt, RegisterPodRequest, ScoreDetail,
        ScoreRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
    },
    wire::encode::{Batch, BlockRemoved, BlockStored, Event, Form, Hash, Tokens},
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

const BLOCK: usize = 16;
const SHARED_BLOCKS: usize = 32;
/// Chains that a publisher holds.
const HELD: usize = 3_200;
/// Clock ticks of /proc a second.
const TICKS: f64 = 100.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "publish") {
        return publish(arguments[1].parse().unwrap());
    }
    let quick = arguments.iter().any(|argument| argument == "--test");
    let value = |name: &str, otherwise: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).cloned().unwrap_or_else(|| otherwise.to_owned())
    };
    let seconds: f64 = value("--seconds", if quick { "1" } else { "60" }).parse().unwrap();
    let publishers: usize = value("--publishers", if quick { "4" } else { "64" }).parse().unwrap();
    let rate: f64 = value("--rate", if quick { "100" } else { "1000" }).parse().unwrap();
    let scores: f64 = value("--scores", if quick { "100" } else { "2000" }).parse().unwrap();
    let steps = value("--steps", if quick { "" } else { "1.5,2,2.5,3,4" });
    let steps: Vec<f64> = steps
        .split(',')
        .filter(|step| !step.is_empty())
        .map(|step| step.parse().unwrap())
        .collect();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(measure(seconds, publishers, rate, scores, &steps));
}

async fn measure(seconds: f64, publishers: usize, rate: f64, scores: f64, steps: &[f64]) {
    let mut indexer = Indexer::start();
    let mut client = indexer.client().await;
    let mut fleet = Fleet::start(publishers);
    for (number, endpoint) in fleet.endpoints.iter().enumerate() {
        let request = RegisterPodRequest {
            pod: format!("p{number}"),
            endpoint: endpoint.clone(),
            model: "m".to_owned(),
            dp_rank: Some(0),
            ..RegisterPodRequest::default()
        };
        client.register_pod(request).await.unwrap();
    }
    fleet.tell("begin");
    fleet.heard();
    println!(
        "{publishers} publishers, {rate} batches/s each of 1-4 blocks, {scores} scores/s of \
         {SHARED_BLOCKS} blocks held by all"
    );
    println!(
        "{:>9} {:>9} {:>9} {:>7} {:>6} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8} {:>8} lossless",
        "batches/s",
        "sent/s",
        "blocks/s",
        "scores",
        "failed",
        "p50 us",
        "p99 us",
        "max us",
        "index",
        "publish",
        "ask",
        "RSS MiB",
        "drain ms",
    );
    let mut best: f64 = 0.0;
    for (at, factor) in std::iter::once(&1.0).chain(steps).enumerate() {
        let time =
            Duration::from_secs_f64(if at == 0 { seconds } else { (seconds / 6.0).max(1.0) });
        let lossless =
            step(&mut indexer, &mut client, &mut fleet, rate * factor, scores, time).await;
        if !lossless {
            break;
        }
        best = best.max(rate * factor * publishers as f64);
    }
    println!("highest lossless rate: {best:.0} batches/s");
    fleet.child.kill().unwrap();
    fleet.child.wait().unwrap();
    indexer.child.kill().unwrap();
    indexer.child.wait().unwrap();
}

async fn step(
    indexer: &mut Indexer,
    client: &mut KvIndexerClient<Channel>,
    fleet: &mut Fleet,
    rate: f64,
    scores: f64,
    time: Duration,
) -> bool {
    let me = std::process::id();
    let ids = [indexer.child.id(), fleet.child.id(), me];
    let gaps_before = gaps(&rows(client).await);
    let cpu_before = ids.map(cpu_seconds);
    fleet.tell(&format!("run {rate} {}", time.as_secs_f64()));
    let began = Instant::now();
    let asked = ask(client, scores, time, indexer.child.id()).await;
    let told = fleet.heard();
    let took = began.elapsed().as_secs_f64();
    let cpu_after = ids.map(cpu_seconds);
    let told: Vec<f64> = told.split(' ').map(|number| number.parse().unwrap()).collect();
    let [sent, blocks, last @ ..] = &told[..] else { panic!("{told:?}") };
    let ended = Instant::now();
    let patience = Duration::from_secs(2);
    let (rows, drained) = loop {
        let rows = rows(client).await;
        let all = rows.iter().all(|row| {
            let number: usize = row.pod[1..].parse().unwrap();
            row.applied_sequence == Some(last[number] as u64)
        });
        if all || ended.elapsed() > patience {
            break (rows, all.then(|| ended.elapsed()));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let publishers = last.len() as f64;
    let seconds = time.as_secs_f64();
    let wanted = rate * publishers * seconds;
    let lost = gaps(&rows) - gaps_before;
    let live = rows.iter().all(|row| row.state() == PodState::Live);
    let lossless = lost == 0 && live && drained.is_some() && *sent >= 0.99 * wanted;
    let us = |quantile: f64| asked.latency.value_at_quantile(quantile);
    let share = |at: usize| (cpu_after[at] - cpu_before[at]) / took;
    println!(
        "{:>9.0} {:>9.0} {:>9.0} {:>7} {:>6} {:>8} {:>8} {:>8} {:>7.2} {:>7.2} {:>7.2} {:>8.0} {:>8} {}",
        rate * publishers,
        sent / seconds,
        blocks / seconds,
        asked.latency.len(),
        asked.failed,
        us(0.5),
        us(0.99),
        asked.latency.max(),
        share(0),
        share(1),
        share(2),
        asked.most_rss_mib,
        drained.map_or("-".to_owned(), |time| time.as_millis().to_string()),
        if lossless { "yes".to_owned() } else { format!("no ({lost} gaps)") },
    );
    let rss: Vec<String> = asked.rss_mib.iter().map(|mib| format!("{mib:.0}")).collect();
    println!("  RSS by time, MiB: {}", rss.join(" "));
    lossless
}

struct Asked {
    latency: Histogram<u64>,
    failed: u64,
    most_rss_mib: f64,
    /// Ten of them.
    rss_mib: Vec<f64>,
}

/// Asks at a constant rate, whatever the answers take.
async fn ask(client: &KvIndexerClient<Channel>, rate: f64, time: Duration, indexer: u32) -> Asked {
    let mut asked = Asked {
        latency: Histogram::new(3).unwrap(),
        failed: 0,
        most_rss_mib: 0.0,
        rss_mib: Vec::new(),
    };
    let tokens: Vec<u8> = shared_tokens().iter().flat_map(|token| token.to_le_bytes()).collect();
    let prompt = Prompt { input: Some(Input::TokenIdsLe(tokens)), ..Prompt::default() };
    let request = ScoreRequest {
        model: "m".to_owned(),
        prompts: vec![prompt],
        detail: ScoreDetail::Compact.into(),
        ..ScoreRequest::default()
    };
    let mut calls = JoinSet::new();
    let began = Instant::now();
    let note = |asked: &mut Asked, answer: Result<Option<Duration>, _>| match answer {
        Ok::<_, tokio::task::JoinError>(Some(took)) => {
            asked.latency.record(took.as_micros() as u64).unwrap();
        }
        _ => asked.failed += 1,
    };
    for number in 0.. {
        let due = Duration::from_secs_f64(f64::from(number) / rate);
        if due >= time {
            break;
        }
        let left = (began + due).saturating_duration_since(Instant::now());
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
        let (mut client, request) = (client.clone(), request.clone());
        calls.spawn(async move {
            let answer = client.score(request).await.ok()?;
            let held = answer.get_ref().prompts[0].compact.as_ref()?;
            // An answer that lacks what every pod holds is a failed one.
            let whole = held.depths.iter().all(|&depth| depth == SHARED_BLOCKS as u32);
            (whole && !held.depths.is_empty()).then(|| began.elapsed().saturating_sub(due))
        });
        while let Some(answer) = calls.try_join_next() {
            note(&mut asked, answer);
        }
        if due.as_secs_f64() >= time.as_secs_f64() * asked.rss_mib.len() as f64 / 10.0 {
            let rss = rss_mib(indexer);
            asked.rss_mib.push(rss);
            asked.most_rss_mib = asked.most_rss_mib.max(rss);
        }
    }
    while let Some(answer) = calls.join_next().await {
        note(&mut asked, answer);
    }
    asked
}

async fn rows(client: &mut KvIndexerClient<Channel>) -> Vec<PodStatus> {
    client.list_pods(ListPodsRequest {}).await.unwrap().into_inner().pods
}

fn gaps(rows: &[PodStatus]) -> u64 {
    rows.iter().map(|row| row.gaps).sum()
}

struct Indexer {
    child: Child,
    grpc: SocketAddr,
    // Where it goes on writing to.
    _out: Lines<BufReader<ChildStdout>>,
}

impl Indexer {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kv-indexer"))
            .args(["--grpc-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
            .args(["--log-level", "error"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let grpc = loop {
            let line = out.next().unwrap().unwrap();
            if let Some((_, rest)) = line.split_once("grpc listening on ") {
                break rest.split_whitespace().next().unwrap().parse().unwrap();
            }
        };
        Self { child, grpc, _out: out }
    }

    async fn client(&self) -> KvIndexerClient<Channel> {
        KvIndexerClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }
}

/// The process that publishes.
struct Fleet {
    child: Child,
    endpoints: Vec<String>,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

impl Fleet {
    fn start(publishers: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["publish", &publishers.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let mut from = BufReader::new(child.stdout.take().unwrap()).lines();
        let endpoints = (0..publishers).map(|_| from.next().unwrap().unwrap()).collect();
        Self { child, endpoints, to, from }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.to, "{what}").unwrap();
    }

    fn heard(&mut self) -> String {
        self.from.next().unwrap().unwrap()
    }
}

/// Prompt that every pod holds.
fn shared_tokens() -> Vec<u32> {
    (0..(SHARED_BLOCKS * BLOCK) as u32).collect()
}

struct Publisher {
    socket: zmq::Socket,
    topic: String,
    sequence: u64,
    /// Payloads and their blocks: a cycle, in which every block that is stored is removed later.
    cycle: Vec<(Vec<u8>, u32)>,
    at: usize,
}

fn encoded(events: Vec<Event>) -> Vec<u8> {
    Batch { timestamp: 1.0, events, rank: Some(0) }.encode(Form::Map).unwrap()
}

fn stored(hashes: Vec<Hash>, parent: Option<Hash>, tokens: Vec<u32>) -> Event {
    Event::BlockStored(BlockStored {
        block_hashes: hashes,
        parent_block_hash: parent,
        token_ids: Tokens::Plain(tokens),
        block_size: BLOCK as i64,
        medium: Some("GPU".to_owned()),
        ..BlockStored::default()
    })
}

impl Publisher {
    fn new(context: &zmq::Context, number: usize) -> Self {
        let socket = context.socket(zmq::XPUB).unwrap();
        // vLLM's default.
        socket.set_sndhwm(100_000).unwrap();
        socket.bind("tcp://127.0.0.1:*").unwrap();
        let mut random = fastrand::Rng::with_seed(number as u64);
        let chains: Vec<(Vec<Hash>, Vec<u32>)> = (0..2 * HELD)
            .map(|_| {
                let blocks = random.usize(1..=4);
                let hashes = (0..blocks).map(|_| Hash::Unsigned(random.u64(..))).collect();
                let tokens = (0..blocks * BLOCK).map(|_| random.u32(..150_000)).collect();
                (hashes, tokens)
            })
            .collect();
        let mut cycle = Vec::new();
        for at in 0..chains.len() {
            let (hashes, tokens) = &chains[at];
            let event = stored(hashes.clone(), None, tokens.clone());
            cycle.push((encoded(vec![event]), hashes.len() as u32));
            let (gone, _) = &chains[(at + HELD) % chains.len()];
            let event = Event::BlockRemoved(BlockRemoved {
                block_hashes: gone.clone(),
                medium: Some("GPU".to_owned()),
                ..BlockRemoved::default()
            });
            cycle.push((encoded(vec![event]), gone.len() as u32));
        }
        let topic = format!("kv@p{number}@m");
        Self { socket, topic, sequence: 0, cycle, at: 0 }
    }

    fn send(&mut self, payload: &[u8]) {
        let number = self.sequence.to_be_bytes();
        self.sequence += 1;
        self.socket.send_multipart([self.topic.as_bytes(), &number, payload], 0).unwrap();
    }

    /// Waits for the subscriber and stores the prompt that all hold.
    fn begin(&mut self) {
        assert_eq!(self.socket.recv_bytes(0).unwrap().first(), Some(&1), "a subscription");
        let tokens = shared_tokens();
        for block in 0..SHARED_BLOCKS as u64 {
            let tokens = &tokens[block as usize * BLOCK..][..BLOCK];
            let parent = block.checked_sub(1).map(Hash::Unsigned);
            let event = stored(vec![Hash::Unsigned(block)], parent, tokens.to_vec());
            self.send(&encoded(vec![event]));
        }
    }

    /// The next batch of the cycle, as of now; its blocks.
    fn step(&mut self, now: &[u8; 8], scratch: &mut Vec<u8>) -> u32 {
        let (payload, blocks) = &self.cycle[self.at];
        let blocks = *blocks;
        scratch.clone_from(payload);
        // An array header of one byte, the marker of a 64-bit float, the float.
        scratch[2..10].copy_from_slice(now);
        self.at = (self.at + 1) % self.cycle.len();
        self.send(scratch);
        blocks
    }
}

/// `load publish`: prints endpoints, then does what standard input says.
fn publish(count: usize) {
    let context = zmq::Context::new();
    let mut publishers: Vec<Publisher> =
        (0..count).map(|number| Publisher::new(&context, number)).collect();
    for publisher in &publishers {
        println!("{}", publisher.socket.get_last_endpoint().unwrap().unwrap());
    }
    let mut scratch = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["begin"] => {
                publishers.iter_mut().for_each(Publisher::begin);
                println!("begun");
            }
            ["run", rate, seconds] => {
                let (rate, seconds): (f64, f64) = (rate.parse().unwrap(), seconds.parse().unwrap());
                let all = rate * count as f64;
                let (began, mut sent, mut blocks) = (Instant::now(), 0_u64, 0_u64);
                loop {
                    let passed = began.elapsed().as_secs_f64();
                    if passed >= seconds {
                        break;
                    }
                    let due = (passed * all) as u64;
                    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                    let now = since.as_secs_f64().to_be_bytes();
                    // No more than a few milliseconds' worth without a look at the clock.
                    let end = due.min(sent + 512);
                    while sent < end {
                        let at = sent as usize % count;
                        blocks += u64::from(publishers[at].step(&now, &mut scratch));
                        sent += 1;
                    }
                    if sent >= due {
                        thread::sleep(Duration::from_micros(500));
                    }
                }
                let last =
                    publishers.iter().map(|publisher| format!(" {}", publisher.sequence - 1));
                println!("{sent} {blocks}{}", last.collect::<String>());
            }
            _ => panic!("{line:?}"),
        }
    }
}

/// Processor time of a process so far.
fn cpu_seconds(id: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    // The name before may hold anything.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / TICKS
}

fn rss_mib(id: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}
