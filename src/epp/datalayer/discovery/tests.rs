use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::Path, time::Duration};

use tokio::task::JoinSet;

use super::{file::parse, *};

const FILE: &str = "
endpoints:
- name: vllm-0
  namespace: llm
  address: \"10.0.0.1\"
  port: \"8000\"
  labels: {llm-d.ai/role: decode}
- {name: vllm-1, address: 10.0.0.2, port: '8001'}
";

fn info(namespace: &str, name: &str, address: &str, labels: &[(&str, &str)]) -> EndpointInfo {
    let address = address.parse().unwrap();
    EndpointInfo {
        name: EndpointName { namespace: namespace.to_owned(), name: name.to_owned() },
        address,
        metrics_address: address,
        labels: labels.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
    }
}

#[test]
fn a_file_is_read() {
    let want = vec![
        info("llm", "vllm-0", "10.0.0.1:8000", &[("llm-d.ai/role", "decode")]),
        info("default", "vllm-1", "10.0.0.2:8001", &[]),
    ];
    assert_eq!(parse(FILE), Ok(want.clone()));
    let json = r#"{"endpoints": [{"name": "vllm-1", "address": "10.0.0.2", "port": "8001"}]}"#;
    assert_eq!(parse(json).unwrap(), want[1..]);
    assert_eq!(parse("endpoints: []"), Ok(vec![]));
    let empty = "endpoints: [{name: vllm-1, namespace: '', address: 10.0.0.2, port: '8001'}]";
    assert_eq!(parse(empty).unwrap(), want[1..]);
}

#[test]
fn mistakes_are_named() {
    #[track_caller]
    fn check(text: &str, want: &[&str]) {
        let faults = parse(text).unwrap_err();
        for want in want {
            assert!(faults.contains(want), "{faults}");
        }
    }
    let entry = |fields: &str| format!("endpoints:\n- {{name: a, {fields}}}");
    check("", &["empty; a file without endpoints says `endpoints: []`"]);
    check(" \n", &["empty"]);
    check("endpoints:", &["endpoints: missing"]);
    check("endpoints: [", &["line 1"]);
    check("[]", &["expected a mapping at the top"]);
    check("endpoints: {a: b}", &["endpoints: expected a list"]);
    check("endpoint: []", &["endpoint: unknown field; did you mean `endpoints`?"]);
    check(
        &entry("address: 10.0.0.1, port: 8000"),
        &["line 2: endpoints[0].port: expected a string, got the number 8000; put it in quotes"],
    );
    for port in ["0", "65536", "-1", "http", ""] {
        let entry = entry(&format!("address: 10.0.0.1, port: '{port}'"));
        check(&entry, &["endpoints[0].port: ", "is no port"]);
    }
    for address in ["localhost", "10.0.0", "'::1'", "'10.0.0.1:80'"] {
        let entry = entry(&format!("address: {address}, port: '1'"));
        check(&entry, &["endpoints[0].address: ", "is no IPv4 address"]);
    }
    check("endpoints: [{}]", &["[0].name: missing", "[0].address: missing", "[0].port: missing"]);
    check(&entry("address: 10.0.0.1, port: '1', model: x"), &["[0].model: unknown field"]);
    check(
        &entry("address: 10.0.0.1, port: '1', labels: {a: 1}"),
        &["[0].labels.a: expected a str"],
    );
}

#[test]
fn a_static_endpoint_is_read() {
    #[track_caller]
    fn good(text: &str, want: &EndpointInfo) {
        assert_eq!(StaticList::parse(text).as_ref(), Ok(want));
    }
    #[track_caller]
    fn bad(text: &str, want: &str) {
        let error = StaticList::parse(text).unwrap_err();
        assert!(error.contains(want), "{text}: {error}");
    }
    good("a=127.0.0.1:8000", &info("default", "a", "127.0.0.1:8000", &[]));
    good("10.0.0.1:80=10.0.0.1:80", &info("default", "10.0.0.1:80", "10.0.0.1:80", &[]));
    good(
        "ns/b=[::1]:8001,llm-d.ai/role=decode, x = y=z ",
        &info("ns", "b", "[::1]:8001", &[("llm-d.ai/role", "decode"), ("x", "y=z")]),
    );
    for text in ["", "a", "10.0.0.1:80"] {
        bad(text, "must be NAME=IP:PORT");
    }
    for text in ["=1.2.3.4:1", "/a=1.2.3.4:1", "a/b/c=1.2.3.4:1"] {
        bad(text, "name is missing");
    }
    for text in ["a=host:1", "a=1.2.3.4", "a="] {
        bad(text, "no IP:PORT");
    }
    bad("a=1.2.3.4:0", "1 to 65535");
    for text in ["a=1.2.3.4:1,", "a=1.2.3.4:1,=x", "a=1.2.3.4:1,x"] {
        bad(text, "no LABEL=VALUE");
    }
    bad("a=1.2.3.4:1,x=1,x=2", "given twice");
}

#[test]
fn static_endpoints_have_names_of_their_own() {
    let parse = |texts: &[&str]| {
        StaticList::parse_all(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(parse(&[]), Ok(StaticList::default()));
    assert_eq!(parse(&["a=1.2.3.4:1", "ns/a=1.2.3.4:1"]).unwrap().0.len(), 2);
    let faults = parse(&["a=1.2.3.4:1", "b", "default/a=1.2.3.4:2"]).unwrap_err();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults[0].starts_with("\"b\": must be"), "{faults:?}");
    assert!(faults[1].contains("named default/a already"), "{faults:?}");
}

/// Names of the endpoints, with the numbers of their lives.
fn names(endpoints: &Endpoints) -> BTreeMap<String, u64> {
    let list = endpoints.list();
    list.iter().map(|endpoint| (endpoint.info().name.name.clone(), endpoint.id().0)).collect()
}

#[track_caller]
fn has(endpoints: &Endpoints, want: &[&str]) -> bool {
    names(endpoints).keys().map(String::as_str).eq(want.iter().copied())
}

#[test]
fn a_set_replaces_what_changed_and_nothing_else() {
    #[derive(Debug, Default)]
    struct Log(std::sync::Mutex<Vec<String>>);
    impl super::super::EndpointWatcher for Log {
        fn added(&self, endpoint: &Arc<super::super::Endpoint>) {
            self.0.lock().unwrap().push(format!("+{}", endpoint.info().name.name));
        }
        fn removed(&self, endpoint: &Arc<super::super::Endpoint>) {
            self.0.lock().unwrap().push(format!("-{}", endpoint.info().name.name));
        }
    }
    let endpoints = Endpoints::new();
    let log = Arc::new(Log::default());
    endpoints.watch(Arc::<Log>::clone(&log));
    let at = |name: &str, port: u16| info("default", name, &format!("10.0.0.1:{port}"), &[]);
    endpoints.set(vec![at("b", 1), at("a", 1), at("c", 9), at("c", 1)]);
    let first = names(&endpoints);
    assert!(has(&endpoints, &["a", "b", "c"]));
    assert_eq!(endpoints.list()[2].address(), "10.0.0.1:1", "the last of a name counts");
    endpoints.set(vec![at("c", 1), at("b", 2), at("d", 1)]);
    let second = names(&endpoints);
    assert_eq!(second["c"], first["c"], "its life goes on");
    assert_ne!(second["b"], first["b"]);
    assert!(has(&endpoints, &["b", "c", "d"]));
    let log = log.0.lock().unwrap().join(" ");
    assert_eq!(log, "+a +b +c -a -b +b +d");
}

/// A watched file in a process.
struct Running {
    endpoints: Arc<Endpoints>,
    loaded: Loaded,
    stats: Arc<FileStats>,
    stop: CancellationToken,
    task: JoinSet<Result<(), DiscoveryError>>,
}

fn start(path: &Path, watch: bool) -> Running {
    let (endpoints, loaded) = (Arc::new(Endpoints::new()), Loaded::default());
    let stop = CancellationToken::new();
    let file = FileDiscovery::new(path, watch);
    let stats = file.stats();
    let mut task = JoinSet::new();
    task.spawn(Box::new(file).run(Arc::clone(&endpoints), loaded.clone(), stop.clone()));
    Running { endpoints, loaded, stats, stop, task }
}

impl Running {
    async fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while !holds(self) {
            assert!(tokio::time::Instant::now() < deadline, "{what}: {:?}", names(&self.endpoints));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn stop(mut self) {
        self.stop.cancel();
        self.task.join_next().await.unwrap().unwrap().unwrap();
    }
}

fn list(names: &[&str]) -> String {
    let entry = |name: &&str| format!("{{name: {name}, address: 10.0.0.1, port: '80'}}");
    format!("endpoints: [{}]", names.iter().map(entry).collect::<Vec<_>>().join(", "))
}

#[tokio::test]
async fn a_watched_file_is_followed_and_a_broken_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("endpoints.yaml");
    fs::write(&path, list(&["a", "b"])).unwrap();
    let running = start(&path, true);
    running.loaded.wait().await;
    assert!(has(&running.endpoints, &["a", "b"]));

    // Written over.
    fs::write(&path, list(&["b", "c"])).unwrap();
    running.eventually("written", |r| has(&r.endpoints, &["b", "c"])).await;
    // As a writer leaves it halfway, and broken in other ways.
    for (at, broken) in ["", "endpoints:\n", "endpoints: [{name: x"].into_iter().enumerate() {
        fs::write(&path, broken).unwrap();
        let faults = at as u64 + 1;
        running.eventually("counted", |r| r.stats.faults() == faults).await;
        assert!(has(&running.endpoints, &["b", "c"]));
    }
    fs::remove_file(&path).unwrap();
    running.eventually("counted", |r| r.stats.faults() == 4).await;
    assert!(has(&running.endpoints, &["b", "c"]));
    // Renamed into place.
    fs::write(dir.path().join("new"), list(&["d"])).unwrap();
    fs::rename(dir.path().join("new"), &path).unwrap();
    running.eventually("renamed", |r| has(&r.endpoints, &["d"])).await;
    fs::write(&path, list(&[])).unwrap();
    running.eventually("emptied", |r| has(&r.endpoints, &[])).await;
    assert_eq!((running.stats.loads(), running.stats.faults()), (4, 4));
    running.stop().await;
}

#[tokio::test]
async fn a_config_map_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, content) in [("..1", list(&["a"])), ("..2", list(&["b"]))] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("endpoints.yaml"), content).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/endpoints.yaml", at("endpoints.yaml")).unwrap();
    let running = start(&at("endpoints.yaml"), true);
    running.loaded.wait().await;
    assert!(has(&running.endpoints, &["a"]));
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    running.eventually("swapped", |r| has(&r.endpoints, &["b"])).await;
    running.stop().await;
}

#[tokio::test]
async fn the_first_load_has_to_succeed() {
    #[track_caller]
    fn check(ended: Result<(), DiscoveryError>, want: &str) {
        let error = format!("{:#}", anyhow::Error::new(ended.unwrap_err()));
        assert!(error.contains(want), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("endpoints.yaml");
    let mut running = start(&path, true);
    check(running.task.join_next().await.unwrap().unwrap(), "endpoints.yaml: No such file");
    fs::write(&path, "endpoints: [{name: a, address: 10.0.0.1, port: 80}]").unwrap();
    let mut running = start(&path, true);
    check(running.task.join_next().await.unwrap().unwrap(), "endpoints[0].port");
    assert!(!running.loaded.is_set() && running.endpoints.list().is_empty());
    fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    let mut running = start(&path, true);
    check(running.task.join_next().await.unwrap().unwrap(), "longer than 1048576 bytes");
}

#[tokio::test(start_paused = true)]
async fn a_list_and_an_unwatched_file_stay() {
    let endpoints = Arc::new(Endpoints::new());
    let (loaded, stop) = (Loaded::default(), CancellationToken::new());
    let fixed = Box::new(StaticList(vec![info("default", "a", "10.0.0.1:1", &[])]));
    stop.cancel();
    fixed.run(Arc::clone(&endpoints), loaded.clone(), stop).await.unwrap();
    assert!(loaded.is_set() && has(&endpoints, &["a"]));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("endpoints.yaml");
    fs::write(&path, list(&["a"])).unwrap();
    let running = start(&path, false);
    running.loaded.wait().await;
    fs::write(&path, list(&["b"])).unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(has(&running.endpoints, &["a"]));
    assert_eq!(running.stats.loads(), 1);
    running.stop().await;
}
