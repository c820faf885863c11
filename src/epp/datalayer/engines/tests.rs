use super::*;

/// A page as vLLM 0.10 and later write it, cut down to what matters here.
const VLLM: &str = r#"# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta/llama"} 3.0
vllm:num_requests_running{engine="1",model_name="meta/llama"} 9.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta/llama"} 2.0
vllm:num_requests_waiting{engine="1",model_name="meta/llama"} 8.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="meta/llama",reason="capacity"} 77.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta/llama"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="27487",num_cpu_blocks="None"} 1.0
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.7e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="b, a,b",waiting_lora_adapters="c"} 1.70000001e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="older",waiting_lora_adapters=""} 1.6e+09
"#;

fn reader(engine: &str) -> PageReader {
    let config = builtin().into_iter().find(|config| config.name == engine).unwrap();
    PageReader::new(Arc::new(Engine::new(&config)))
}

fn read(reader: &mut PageReader, page: &str, metrics: &mut Metrics) -> (u32, u32) {
    reader.begin();
    for chunk in page.as_bytes().chunks(41) {
        reader.feed(chunk);
    }
    let Extraction { found, faults } = reader.finish(metrics);
    (found, faults)
}

#[test]
fn a_page_of_vllm_is_understood() {
    let mut metrics = Metrics::default();
    let mut reader = reader("vllm");
    assert_eq!(read(&mut reader, VLLM, &mut metrics), (5, 0));
    let want = Metrics {
        waiting: 2,
        running: 3,
        kv_usage: 0.25,
        lora: LoraMetrics {
            active: vec!["a".to_owned(), "b".to_owned()],
            waiting: vec!["c".to_owned()],
            max_active: 4,
        },
        cache_block_tokens: 16,
        cache_blocks: 27_487,
        ..Metrics::default()
    };
    assert_eq!(metrics, want);

    // What a page lacks keeps its value, and nothing else of the last page stays.
    let page = "vllm:num_requests_waiting 7\n";
    assert_eq!(read(&mut reader, page, &mut metrics), (1, 3));
    assert_eq!(metrics, Metrics { waiting: 7, ..want.clone() });
    let complaint = reader.complaint();
    assert!(complaint.contains("vllm:kv_cache_usage_perc is not there"), "{complaint}");
    assert!(!complaint.contains("gpu_cache") && !complaint.contains("lora"), "{complaint}");
    assert_eq!(read(&mut reader, "", &mut metrics), (0, 4));
    assert_eq!(read(&mut reader, "<html>502 Bad Gateway</html>", &mut metrics), (0, 4));
    assert_eq!(metrics, Metrics { waiting: 7, ..want });
}

#[test]
fn the_older_name_of_kv_usage_is_read_where_it_is_alone() {
    #[track_caller]
    fn check(page: &str, want: f64, counts: (u32, u32)) {
        let mut metrics = Metrics::default();
        let rest = "vllm:num_requests_waiting 0\nvllm:num_requests_running 0\n\
                    vllm:cache_config_info{block_size=\"16\"} 1\n";
        assert_eq!(read(&mut reader("vllm"), &format!("{rest}{page}"), &mut metrics), counts);
        assert_eq!(metrics.kv_usage, want, "{page}");
    }
    check("vllm:gpu_cache_usage_perc 0.5", 0.5, (4, 0));
    check("vllm:kv_cache_usage_perc 0.25\nvllm:gpu_cache_usage_perc 0.5", 0.25, (5, 0));
    check("vllm:gpu_cache_usage_perc 0.5\nvllm:kv_cache_usage_perc 0.25", 0.25, (5, 0));
    check("", 0.0, (3, 1));
    check("vllm:gpu_cache_usage_perc NaN", 0.0, (3, 2));
}

#[test]
fn the_other_engines_are_understood() {
    #[track_caller]
    fn check(engine: &str, page: &str, want: (u64, u64, f64, u64, u64), found: u32) {
        let mut metrics = Metrics::default();
        assert_eq!(read(&mut reader(engine), page, &mut metrics), (found, 0), "{engine}");
        let m = &metrics;
        let got = (m.waiting, m.running, m.kv_usage, m.cache_block_tokens, m.cache_blocks);
        assert_eq!(got, want, "{engine}");
    }
    check(
        "sglang",
        r#"sglang:num_running_reqs{model_name="m",tp_rank="0"} 4.0
sglang:num_queue_reqs{model_name="m"} 5.0
sglang:token_usage{model_name="m"} 0.28
sglang:cache_config_info{page_size="64",num_pages="1000"} 1.0
"#,
        (5, 4, 0.28, 64, 1000),
        4,
    );
    check(
        "trtllm-serve",
        "trtllm_num_requests_waiting 1\ntrtllm_num_requests_running 2\n\
         trtllm_kv_cache_utilization 0.5\ntrtllm_kv_cache_tokens_per_block 32\n\
         trtllm_kv_cache_max_blocks 700\n",
        (1, 2, 0.5, 32, 700),
        5,
    );
    check(
        "triton-tensorrt-llm",
        r#"nv_trt_llm_request_metrics{model="m",request_type="waiting",version="1"} 1
nv_trt_llm_request_metrics{model="m",request_type="context",version="1"} 9
nv_trt_llm_request_metrics{model="m",request_type="scheduled",version="1"} 2
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="m"} 0.75
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="m"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="m"} 1
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="m"} 4000
"#,
        (1, 2, 0.75, 64, 4000),
        5,
    );
    check(
        "triton",
        "nv_inference_pending_request_count{model=\"m\"} 3\nnv_inference_exec_count 8\n",
        (3, 8, 0.0, 0, 0),
        2,
    );
}

#[test]
fn of_several_series_the_latest_counts() {
    #[track_caller]
    fn check(page: &str, want: Option<u64>) {
        let config = EngineConfig {
            name: "e".to_owned(),
            queued: MetricSpec::parse("q{a=x}").unwrap(),
            ..EngineConfig::default()
        };
        let mut reader = PageReader::new(Arc::new(Engine::new(&config)));
        let mut metrics = Metrics { waiting: 99, ..Metrics::default() };
        let found = read(&mut reader, page, &mut metrics).0;
        assert_eq!((found == 1).then_some(metrics.waiting), want, "{page}");
    }
    check("q{a=\"x\"} 1\nq{a=\"x\"} 2", Some(1));
    check("q{a=\"x\"} 1 5\nq{a=\"x\"} 2 6\nq{a=\"x\"} 3 4", Some(2));
    check("q{a=\"x\"} 1\nq{a=\"x\"} 2 1", Some(2));
    check("q{a=\"y\"} 1\nq{b=\"x\"} 1\nq{b=\"1\",a=\"x\"} 2", Some(2));
    check("q{a=\"x\"} 1 -5", None);
    check("q{a=\"y\"} 1\nq 1", None);
    check("q{a=\"x\"} 2.9", Some(2));
    check("q{a=\"x\"} -3", Some(0));
    check("q{a=\"x\"} 1e300", Some(u64::MAX));
    check("q{a=\"x\"} +Inf", None);
    check("# TYPE q counter\nq{a=\"x\"} 1", Some(1));
    check("# TYPE q summary\nq{a=\"x\"} 1", None);
    check("q{a=\"x} 1\nq{a=\"x\"} 4", Some(4));
}

#[test]
fn wrong_values_are_faults_and_change_nothing() {
    #[track_caller]
    fn check(page: &str, counts: (u32, u32), complaint: &str) {
        let mut reader = reader("vllm");
        let rest = "vllm:num_requests_running 0\nvllm:kv_cache_usage_perc 1.5\n";
        let before = Metrics { waiting: 4, cache_blocks: 3, ..Metrics::default() };
        let mut metrics = before.clone();
        assert_eq!(read(&mut reader, &format!("{rest}{page}"), &mut metrics), counts, "{page}");
        assert_eq!(metrics, Metrics { kv_usage: 1.0, ..before });
        assert!(reader.complaint().contains(complaint), "{}", reader.complaint());
    }
    let info = "vllm:cache_config_info{num_gpu_blocks=\"3\"} 1\n";
    check(&format!("{info}vllm:num_requests_waiting NaN"), (3, 1), "waiting is not finite");
    check(&format!("{info}vllm:num_requests_waiting x"), (3, 1), "waiting is malformed");
    check(
        "vllm:num_requests_waiting 4\nvllm:cache_config_info{num_gpu_blocks=\"None\"} 1\n",
        (4, 1),
        "a label is no number",
    );
    check(
        &format!(
            "{info}vllm:num_requests_waiting 4\nvllm:lora_requests_info{{max_lora=\"x\"}} 1\n"
        ),
        (5, 1),
        "a label is no number",
    );
}

#[test]
fn custom_metrics_are_kept_by_key() {
    let spec = |text: &str| MetricSpec::parse(text).unwrap().unwrap();
    let config = EngineConfig {
        name: "e".to_owned(),
        custom: vec![("k1".to_owned(), spec("c{a=1}")), ("k2".to_owned(), spec("c{a=2}"))],
        ..EngineConfig::default()
    };
    let mut reader = PageReader::new(Arc::new(Engine::new(&config)));
    let mut metrics = Metrics::default();
    let page = "c{a=\"1\"} -1.5\nc{a=\"2\"} 2\n";
    assert_eq!(read(&mut reader, page, &mut metrics), (2, 0));
    let custom: Vec<(&str, f64)> = metrics.custom.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    assert_eq!(custom, [("k1", -1.5), ("k2", 2.0)]);
    assert_eq!(read(&mut reader, "c{a=\"1\"} 3\n", &mut metrics), (1, 1));
    assert_eq!((metrics.custom["k1"], metrics.custom["k2"]), (3.0, 2.0));
}

#[test]
fn specifications_are_read_as_in_go() {
    #[track_caller]
    fn good(text: &str, name: &str, labels: &[(&str, &str)]) {
        let spec = MetricSpec::parse(text).unwrap().unwrap();
        let own: Vec<_> = labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        assert_eq!((spec.name.as_str(), &spec.labels), (name, &own), "{text}");
        assert_eq!(MetricSpec::parse(&spec.to_string()), Ok(Some(spec)), "printed and read");
    }
    assert_eq!(MetricSpec::parse(""), Ok(None));
    good("my_metric", "my_metric", &[]);
    good("a:b", "a:b", &[]);
    good("my_metric{}", "my_metric", &[]);
    good("m{label1=value1}", "m", &[("label1", "value1")]);
    good("m{label1=\"value1\"}", "m", &[("label1", "value1")]);
    good("m{l=\"\"}", "m", &[("l", "")]);
    good("m{l=\"a b\"}", "m", &[("l", "a b")]);
    good("  m  {  a  =  1  ,  b  =  \"2\"  }  ", "m", &[("a", "1"), ("b", "2")]);
    for wrong in [
        " ", "1m", "m m", "m{", "m}", "m{a=1", "m{a}", "m{a=}", "m{=1}", "m{1a=1}", "m{a=\"1}",
        "m{a=1,}", "m{a=1}x", "m{a:b=1}", "m{a=1 2}", "{a=1}", "m-x",
    ] {
        assert!(MetricSpec::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn the_prefix_cache_is_counted_from_page_to_page() {
    let mut reader = reader("vllm");
    let mut metrics = Metrics::default();
    let mut page = |lines: &str, want: (u64, u64)| {
        read(&mut reader, &format!("{VLLM}{lines}\n"), &mut metrics);
        assert_eq!((metrics.prefix_queries, metrics.prefix_hits), want, "{lines}");
    };
    let of = |queries: &[f64], hits: f64| {
        let mut text = format!("vllm:prefix_cache_hits_total{{engine=\"0\"}} {hits}\n");
        for (engine, queries) in queries.iter().enumerate() {
            let line =
                format!("vllm:prefix_cache_queries_total{{engine=\"{engine}\"}} {queries}\n");
            text.push_str(&line);
            text.push_str(&line.replace("_total", "_created"));
        }
        text
    };
    page(&of(&[1000.0], 500.0), (0, 0));
    page(&of(&[1100.0], 516.0), (100, 16));
    page("", (100, 16));
    page(&of(&[1150.0], 516.0), (150, 16));
    // The engine has started over.
    page(&of(&[30.0], 10.0), (180, 26));
    page(&of(&[30.0], f64::NAN), (180, 26));
    page(&of(&[30.0], 12.0), (180, 28));
    // Ranks are added up.
    page(&of(&[40.0, 5.0], 12.0), (195, 28));
    page(&of(&[41.0, 15.0], 12.0), (206, 28));
    // Of two names the new one counts; the old one alone is as good.
    let old = |tokens: u32| format!("vllm:gpu_prefix_cache_queries_total {tokens}\n");
    page(&format!("{}{}", old(7000), of(&[41.0, 15.0], 12.0)), (206, 28));
    page(&format!("{}{}", of(&[41.0, 16.0], 12.0), old(7007)), (207, 28));
    page(&old(7010), (210, 28));
    // No engine has to have one, and one that has is no fault.
    let mut reader = self::reader("vllm");
    assert_eq!(read(&mut reader, &format!("{VLLM}{}", of(&[1.0], 1.0)), &mut metrics), (7, 0));
}
