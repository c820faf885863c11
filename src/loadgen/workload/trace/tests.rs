use std::collections::HashSet;

use clap::Parser as _;

use super::{
    generate::{Generate, Generated},
    *,
};
use crate::loadgen::workload::{Lengths, hits::lru_hits, ideal_hits};

#[derive(clap::Parser)]
struct Command {
    #[command(subcommand)]
    command: command::TraceCommand,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/traces").join(name)
}

fn read(text: &str, options: &TraceOptions) -> Result<Trace, TraceError> {
    Trace::read(Path::new("trace.jsonl"), text.as_bytes(), options)
}

fn millis(trace: &Trace) -> Vec<u128> {
    trace.requests.iter().map(|request| request.at.unwrap().as_millis()).collect()
}

const MOONCAKE: &str = r#"
{"timestamp": 1000, "input_length": 1100, "output_length": 52, "hash_ids": [7, 8, 9]}
{"timestamp": 3000, "input_length": 1024, "output_length": 26, "hash_ids": [7, 8]}
{"timestamp": 2000, "input_length": 600, "output_length": 0, "hash_ids": [70, 71], "type": "text"}
"#;

#[test]
fn mooncake_blocks_are_parts() {
    let trace = read(MOONCAKE, &TraceOptions::default()).unwrap();
    assert_eq!(trace.format, TraceFormat::Mooncake);
    assert_eq!(millis(&trace), [0, 1000, 2000]);
    let tokens: Vec<Vec<u32>> = trace
        .requests
        .iter()
        .map(|request| request.prompt.parts.iter().map(|part| part.tokens).collect())
        .collect();
    assert_eq!(tokens, [vec![512, 512, 76], vec![512, 88], vec![512, 512]]);
    let [first, other, second] = &trace.requests[..] else { panic!("three") };
    assert_eq!(first.prompt.parts[..2], second.prompt.parts[..]);
    assert_ne!(first.prompt.parts[0], other.prompt.parts[0]);
    assert_eq!([first, other, second].map(|it| it.group), [0, 1, 0]);
    assert_eq!([first, other, second].map(|it| it.max_tokens), [52, 1, 26]);
    assert_eq!(ideal_hits(trace.requests.iter(), 512).hit_tokens, 512);
    assert_eq!(ideal_hits(trace.requests.iter(), 16).hit_tokens, 1008);
}

#[test]
fn azure_and_plain_lines_have_nothing_in_common() {
    let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\
                 2023-11-16 23:59:59.9000000,4808,10\r\n2023-11-17 00:00:00.4,3180,8\r\n";
    let trace = read(azure, &TraceOptions::default()).unwrap();
    assert_eq!((trace.format, millis(&trace)), (TraceFormat::Azure, vec![0, 500]));
    assert_eq!(trace.requests[0].prompt.tokens(), 4808);
    assert_eq!(trace.requests[1].max_tokens, 8);
    let newer = "ContextTokens,GeneratedTokens,TIMESTAMP\n1,2,2024-02-28 23:59:59+00:00\n\
                 1,2,2024-03-01 00:00:00.009930+00:00\n";
    assert_eq!(millis(&read(newer, &TraceOptions::default()).unwrap()), [0, 86_401_009]);
    let plain = "{\"at_ms\": 0.5, \"prompt_tokens\": 800, \"output_tokens\": 50}\n\
                 {\"at_ms\": 10.5, \"prompt_tokens\": 800, \"output_tokens\": 50}\n";
    let trace = read(plain, &TraceOptions::default()).unwrap();
    assert_eq!((trace.format, millis(&trace)), (TraceFormat::Plain, vec![0, 10]));
    assert_eq!(ideal_hits(trace.requests.iter(), 16).hit_tokens, 0);
}

#[test]
fn windows_and_scales() {
    let of = |options: &TraceOptions| read(MOONCAKE, options).unwrap();
    let half = of(&TraceOptions { time_scale: 0.5, ..TraceOptions::default() });
    assert_eq!(millis(&half), [0, 500, 1000]);
    let window = TraceOptions {
        from: Duration::from_millis(500),
        to: Some(Duration::from_secs(2)),
        time_scale: 2.0,
        ..TraceOptions::default()
    };
    assert_eq!(millis(&of(&window)), [1000]);
    let small = of(&TraceOptions { scale: 0.1, ..TraceOptions::default() });
    let tokens: Vec<u64> = small.requests.iter().map(|it| it.prompt.tokens()).collect();
    assert_eq!(tokens, [110, 60, 102]);
    assert_eq!(ideal_hits(small.requests.iter(), 17).hit_tokens, 85);
    let tiny = of(&TraceOptions { scale: 1e-6, ..TraceOptions::default() });
    assert!(tiny.requests.iter().all(|it| it.prompt.tokens() == 1 && it.max_tokens == 1));
    let empty = TraceOptions { from: Duration::from_secs(60), ..TraceOptions::default() };
    let error = read(MOONCAKE, &empty).unwrap_err().to_string();
    assert_eq!(error, "trace.jsonl: no request in the window; the file has 3");
    for time_scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let options = TraceOptions { time_scale, ..TraceOptions::default() };
        assert!(matches!(read(MOONCAKE, &options), Err(TraceError::Option("time scale"))));
    }
    let late = TraceOptions { time_scale: 1e300, ..TraceOptions::default() };
    assert!(read(MOONCAKE, &late).unwrap_err().to_string().contains("no foreseeable time"));
}

#[test]
fn errors_name_file_line_and_field() {
    #[track_caller]
    fn check(text: &str, want: &str) {
        let error = read(text, &TraceOptions::default()).unwrap_err().to_string();
        assert!(error.contains(want), "{text}: {error}");
    }
    let line = r#"{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}"#;
    check(
        &format!("{line}\n{}", line.replace("600", "1600")),
        "trace.jsonl:2: hash_ids: 2 of them",
    );
    check(&line.replace("600", "\"x\""), "trace.jsonl:1: input_length: invalid type");
    check(&line.replace("600", "-5"), "input_length: invalid value");
    check(&line.replace("600", "0"), "input_length: 0 is not from 1");
    check(&line.replace("600", "99999999999"), "input_length: 99999999999 is not");
    check(&line.replace("output_length", "output"), "output_length is missing");
    check(&line.replace("[1, 2]", "[1, \"a\"]"), "hash_ids: invalid type");
    check(&line[..40], "trace.jsonl:1: EOF");
    check("{}", "at_ms is missing");
    check("hello", "neither a JSON object nor a CSV header with the column TIMESTAMP");
    check("", "no request in the window; the file has 0");
    let csv = |row: &str| format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{row}");
    check(&csv("yesterday,1,2"), "trace.jsonl:2: TIMESTAMP: \"yesterday\" is no time");
    check(&csv("2023-13-16 18:15:46,1,2"), "TIMESTAMP: ");
    check(&csv("2023-11-16 18:15:46,a,2"), "ContextTokens: \"a\" is no number");
    check(&csv("2023-11-16 18:15:46,1"), "GeneratedTokens is missing");
    let missing = Trace::open(Path::new("/nonexistent"), &TraceOptions::default()).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read /nonexistent");
    let binary = Trace::read(Path::new("x"), &[0xff, 0xfe][..], &TraceOptions::default());
    assert!(binary.unwrap_err().to_string().starts_with("x:1: invalid utf-8"));
}

fn generated(generate: &Generate) -> (Generated, Trace, String) {
    let mut file = Vec::new();
    let made = generate.write(&mut file).unwrap();
    let text = String::from_utf8(file).unwrap();
    let trace = read(&text, &TraceOptions::default()).unwrap();
    (made, trace, text)
}

#[test]
fn a_generated_trace_has_the_stated_share_and_burstiness() {
    for (cache_ratio, cv) in [(0.0, 1.0), (0.3, 2.0), (0.59, 0.5), (0.9, 1.0)] {
        let generate = Generate {
            arrivals: format!("gamma:rate=20,cv={cv}").parse().unwrap(),
            duration: Duration::from_secs(100),
            cache_ratio,
            input: "lognormal(8000,6000,min=100,max=100000)".parse().unwrap(),
            output: Lengths::Fixed(100),
            seed: 7,
        };
        let (made, trace, text) = generated(&generate);
        let hits = ideal_hits(trace.requests.iter(), 512);
        assert_eq!(hits.hit_tokens, made.hit_tokens, "as the reader counts");
        assert_eq!(hits.prompt_tokens, made.prompt_tokens);
        assert!((hits.ratio() - cache_ratio).abs() < 0.02, "{cache_ratio}: {}", hits.ratio());
        assert_eq!(generated(&generate).2, text);
        assert!((1_700..2_300).contains(&made.requests), "{}", made.requests);
        let small = lru_hits(trace.requests.iter(), 512, 50);
        assert!(small.hit_tokens <= hits.hit_tokens);
    }
}

#[test]
fn the_committed_trace_is_read() {
    let path = fixture("mooncake_small.jsonl");
    let mut made = Vec::new();
    let line =
        "trace generate --arrivals gamma:rate=4,cv=2 --duration 60s --cache-ratio 0.59 --seed 42";
    command::run(&Command::parse_from(line.split(' ')).command, &mut made).unwrap();
    assert!(std::fs::read(&path).unwrap() == made, "{} is another one", path.display());
    let trace = Trace::open(&path, &TraceOptions::default()).unwrap();
    assert_eq!(trace.format, TraceFormat::Mooncake);
    assert!(trace.requests.len() > 100, "{}", trace.requests.len());
    let ratio = ideal_hits(trace.requests.iter(), 512).ratio();
    assert!((ratio - 0.59).abs() < 0.02, "{ratio}");
    let groups: HashSet<u32> = trace.requests.iter().map(|request| request.group).collect();
    assert!(groups.len() > 5 && groups.len() < trace.requests.len());
}

#[test]
fn an_analysis_says_what_is_in_a_trace() {
    let path = fixture("mooncake_small.jsonl");
    let path = path.to_str().unwrap();
    let line = ["trace", "analyze", path, "--block-size", "512", "--blocks", "500", "--to", "30s"];
    let mut out = Vec::new();
    command::run(&Command::parse_from(line).command, &mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    for part in ["Mooncake", "requests ", "dispersion ", "blocks of  512: ", "% with 500\n"] {
        assert!(out.contains(part), "{out}");
    }
}
