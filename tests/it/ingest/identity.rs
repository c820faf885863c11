//! Who is who: topics, declared names, ranks, and pods that move.

use kv_indexer::{proto::kvindexer::PodState, wire::encode::Form};

use super::{
    engine::{Engine, payload},
    rig::Rig,
};

/// C20 to C22: what a topic names, where nothing is declared.
#[test]
fn topics_name_pods_and_models() {
    let mut rig = Rig::start("kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', topicFilter: ''}");
    let endpoint = super::bind::endpoint(&rig);
    for topic in ["kv@pod-123@llama-2-7b", "pod-9@llama", "fallback", "x@p@org/m@rev"] {
        let mut engine = Engine::connect(&endpoint, topic);
        engine.subscribed();
        engine.send("store 1 of 1-16");
        rig.until(&topic_pod(topic), "heard", |row| row.seen_sequence == Some(0));
    }
    let models: Vec<_> = rig.pods().into_iter().map(|row| (row.pod, row.model)).collect();
    let named = |pod: &str, model: &str| (pod.to_owned(), model.to_owned());
    assert_eq!(
        models,
        [
            named("pod-123", "llama-2-7b"),
            named("pod-9@llama", ""),
            named("fallback", ""),
            named("p", "org/m@rev"),
        ]
    );
    rig.finish();
}

fn topic_pod(topic: &str) -> String {
    match topic.splitn(3, '@').collect::<Vec<_>>()[..] {
        [_, pod, _] => pod.to_owned(),
        _ => topic.to_owned(),
    }
}

/// C94: the declaration names the pod, whatever the topic says.
#[test]
fn equal_topics_from_two_endpoints_are_two_pods() {
    let mut rig = Rig::start("");
    let mut engines = [Engine::bind("kv@same@m"), Engine::bind("kv@same@m")];
    rig.register("10.0.0.1:8000", &engines[0], None);
    rig.register("10.0.0.2:8000", &engines[1], None);
    engines[0].send("store 1-2 of 1-32");
    engines[1].send("store 1 of 1-16");
    rig.expect("m", "1-32", "10.0.0.1:8000#0=2 10.0.0.2:8000#0=1");
    // A declared model goes before the topic's.
    let mut third = Engine::bind("kv@same@m");
    rig.register_as(&third, None, |request| {
        (request.pod, request.model) = ("c".to_owned(), "other".to_owned());
    });
    third.send("store 1 of 1-16");
    rig.expect("other", "1-32", "c#0=1");
    rig.finish();
}

#[test]
fn ranks_are_declared_or_learnt_or_absent() {
    let mut rig = Rig::start("");
    let mut declared = Engine::bind("kv@x@m").with_rank(Some(0));
    rig.register_as(&declared, None, |request| {
        (request.pod, request.dp_rank) = ("declared".to_owned(), Some(5));
    });
    declared.send("store 1 of 1-16");
    let mut learnt = Engine::bind("kv@x@m").with_rank(Some(2));
    rig.register("learnt", &learnt, None);
    learnt.send("store 1 of 1-16");
    let mut absent = Engine::bind("kv@x@m").with_rank(None);
    rig.register("absent", &absent, None);
    absent.send("store 1 of 1-16");
    rig.expect("m", "1-16", "absent=1 declared#5=1 learnt#2=1");
    // Two elements and three of one publisher are one row.
    absent.rank = Some(0);
    let last = absent.send("store 2 of 17-32 after 1");
    rig.applied("absent", last);
    assert_eq!(rig.depths("m", "1-32"), "absent=2 declared#5=1 learnt#2=1");
    assert_eq!(rig.rows(), ["absent", "declared#5", "learnt#2"]);
    rig.finish();
}

#[test]
fn several_ranks_on_one_socket() {
    let mut rig = Rig::start("");
    let engine = Engine::bind("kv@x@m");
    rig.register("a", &engine, None);
    // Every rank counts for itself; they interleave.
    for sequence in 0..3_u64 {
        for rank in [3, 0, 7] {
            let blocks = u64::from(rank) + 1;
            let text = match sequence {
                0 => format!("store 1-{blocks} of 1-{}", blocks * 16),
                1 => "store 1 of 1-16".to_owned(),
                _ => "remove 1".to_owned(),
            };
            let payload = payload(&text, Some(rank), Form::Map);
            engine.raw(&[b"kv@x@m", &sequence.to_be_bytes(), &payload]);
        }
    }
    rig.expect("m", "1-128", "a#0=1 a#3=4 a#7=8");
    assert!(rig.pods().iter().all(|row| row.state() == PodState::Live), "{:#?}", rig.pods());
    for rank in [0, 3, 7] {
        let series = format!("kv_pod_connected{{pod=\"a\",rank=\"{rank}\"}}");
        assert_eq!(rig.metric(&series), 1.0, "{series}");
    }
    rig.unregister("a").unwrap();
    assert_eq!(rig.rows(), Vec::<String>::new());
    rig.finish();
}

/// Ranks keep apart even while no model is known.
#[test]
fn several_ranks_before_the_model_is_known() {
    let mut rig = Rig::start("");
    let engine = Engine::bind("none");
    rig.register("a", &engine, None);
    for rank in [0, 1] {
        let payload = payload("store 1 of 1-16", Some(rank), Form::Map);
        engine.raw(&[b"none", &0_u64.to_be_bytes(), &payload]);
    }
    for rank in [0, 1] {
        let payload = payload("store 2 of 17-32 after 1", Some(rank), Form::Map);
        engine.raw(&[b"kv@x@m", &1_u64.to_be_bytes(), &payload]);
    }
    rig.expect("m", "1-32", "a#0=2 a#1=2");
    rig.finish();
}

/// C95, and a row's place in compact answers never shows its former owner.
#[test]
fn a_pod_that_moves_begins_anew() {
    let mut rig = Rig::start("");
    let mut old = Engine::bind("kv@x@m");
    rig.register("a", &old, None);
    old.send("store 1-4 of 1-64");
    rig.expect("m", "1-64", "a#0=4");
    let slot = rig.pod("a").slot;
    // An equal registration changes nothing.
    rig.try_register(kv_indexer::proto::kvindexer::RegisterPodRequest {
        pod: "a".to_owned(),
        endpoint: old.endpoint.clone(),
        ..Default::default()
    })
    .unwrap();
    assert_eq!(rig.depths("m", "1-64"), "a#0=4");
    let mut new = Engine::bind("kv@x@m");
    rig.register("a", &new, None);
    assert_eq!(rig.depths("m", "1-64"), "", "the old blocks went with the old endpoint");
    old.send("store 5 of 65-80 after 4");
    new.send("store 1 of 1-16");
    rig.expect("m", "1-80", "a#0=1");
    assert_eq!(rig.pod("a").endpoint, new.endpoint);

    rig.unregister("a").unwrap();
    assert_eq!(rig.depths("m", "1-80"), "", "nothing is left when it returns");
    assert_eq!(rig.unregister("a").unwrap_err().code(), tonic::Code::NotFound);
    let mut next = Engine::bind("kv@x@m");
    rig.register("b", &next, None);
    assert_eq!(rig.pod("b").slot, slot, "the slot is used again");
    assert_eq!(rig.depths("m", "1-80"), "");
    next.send("store 1-2 of 1-32");
    new.send("store 2 of 17-32 after 1");
    rig.expect("m", "1-80", "b#0=2");
    rig.finish();
}

/// The final row of a pod takes the place of the provisional one, so a full house is no obstacle.
#[test]
fn as_many_rows_as_allowed_can_all_be_settled() {
    let mut rig = Rig::start("kvEventsConfig: {maxPods: 2}");
    let mut engines = [Engine::bind("kv@x@m"), Engine::bind("kv@x@m")];
    rig.register("a", &engines[0], None);
    rig.register("b", &engines[1], None);
    for engine in &mut engines {
        engine.send("store 1 of 1-16");
    }
    rig.expect("m", "1-16", "a#0=1 b#0=1");
    let third = Engine::bind("kv@x@m");
    let refused = rig.try_register(kv_indexer::proto::kvindexer::RegisterPodRequest {
        pod: "c".to_owned(),
        endpoint: third.endpoint.clone(),
        ..Default::default()
    });
    assert_eq!(refused.unwrap_err().code(), tonic::Code::ResourceExhausted);
    rig.unregister("a").unwrap();
    rig.register("c", &third, None);
    rig.finish();
}

/// Engines come and go while their connections break: libzmq's thread must not be caught waiting
/// for a monitor that nobody reads any more.
#[test]
fn coming_and_going_deafens_nobody() {
    let mut rig = Rig::start("");
    let mut steady = Engine::bind("kv@x@m");
    rig.register("steady", &steady, None);
    for round in 0..40 {
        let mut engines: Vec<_> = (0..3).map(|_| Engine::bind("kv@x@m")).collect();
        let pods: Vec<_> = (0..3).map(|at| format!("brief-{round}-{at}")).collect();
        for (pod, engine) in pods.iter().zip(&mut engines) {
            rig.register(pod, engine, None);
            engine.send("store 1 of 1-16");
            rig.applied(pod, 0);
        }
        if round % 2 == 0 {
            for pod in &pods {
                rig.unregister(pod).unwrap();
            }
            drop(engines);
        } else {
            // Each connection breaks in the moment in which it is given up.
            for (pod, engine) in pods.iter().zip(engines) {
                let ended = std::thread::spawn(move || drop(engine));
                rig.unregister(pod).unwrap();
                ended.join().unwrap();
            }
        }
    }
    steady.send("store 1 of 1-16");
    rig.expect("m", "1-16", "steady#0=1");
    rig.finish();
}

/// More pods than one ZeroMQ context has sockets for.
#[test]
fn hundreds_of_pods() {
    let mut rig =
        Rig::start("kvEventsConfig: {maxPods: 1000, reconnectMs: 1000, heartbeatMs: 3600000}");
    let mut engine = Engine::bind("kv@x@m");
    let replay = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for pod in 0..420 {
        let request = kv_indexer::proto::kvindexer::RegisterPodRequest {
            pod: format!("p{pod}"),
            endpoint: engine.endpoint.clone(),
            replay_endpoint: format!("tcp://{replay}"),
            ..Default::default()
        };
        rig.try_register(request).unwrap();
    }
    crate::support::eventually("every pod hears", || {
        // Again and again: a subscription that is not there yet misses what is published.
        engine.send("store 1 of 1-16");
        match rig.depths("m", "1-16").split_whitespace().count() {
            420 => Ok(()),
            other => Err(other.to_string()),
        }
    });
    rig.finish();
}

/// A row without rank that turns out to be one that another publisher is already.
#[test]
fn two_publishers_are_not_one_row() {
    let (mut first, mut second) = (Engine::bind("kv@a@m"), Engine::bind("kv@a@m"));
    let mut rig = Rig::start(&format!(
        "readyTimeoutMs: 0\npods: [{{id: a, rank: 0, endpoint: '{}'}}, {{id: a, endpoint: '{}'}}]",
        first.endpoint, second.endpoint,
    ));
    first.subscribed();
    second.subscribed();
    first.send("store 1 of 1-16");
    rig.expect("m", "1-16", "a#0=1");
    second.send("store 2 of 101-116");
    crate::support::eventually("the second one says so", || {
        let rows: Vec<_> = rig.pods().into_iter().filter(|row| row.dp_rank.is_none()).collect();
        match &rows[..] {
            [row] if row.reason.contains("another publisher is a#0") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    rig.expect("m", "1-16", "a#0=1");
    rig.expect("m", "101-116", "");
}
