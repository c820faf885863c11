use std::sync::{
    atomic::{AtomicUsize, Ordering::Relaxed},
    mpsc,
};

use super::*;

const LONG: Duration = Duration::from_secs(20);

fn pool(threads: usize, queue: usize, budget: Duration) -> Arc<Pool> {
    let config = PoolConfig { threads, queue, budget };
    Arc::new(Pool::start(config, &Registry::new(), "pool_test").unwrap())
}

/// Occupies one thread for jobs of that size until the sender is dropped.
async fn occupy(pool: &Arc<Pool>, bytes: usize) -> mpsc::Sender<()> {
    let (hold, held) = mpsc::channel::<()>();
    let (begun, begins) = oneshot::channel();
    let pool = Arc::clone(pool);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let job = move || {
            begun.send(()).unwrap();
            held.recv().unwrap_err();
            Ok(())
        };
        pool.run_sized(bytes, job).await
    });
    begins.await.unwrap();
    tasks.detach_all();
    hold
}

#[tokio::test]
async fn results_errors_and_panics_reach_the_caller() {
    let pool = pool(1, 8, LONG);
    assert_eq!(pool.run(|| Ok(1)).await, Ok(1));
    let error = TokenizeError::Invalid("no".into());
    assert_eq!(pool.run::<u8>(|| Err(TokenizeError::Invalid("no".into()))).await, Err(error));
    let panicked = pool.run::<u8>(|| panic!("a fault in a tokenizer")).await;
    assert!(matches!(panicked, Err(TokenizeError::Unavailable(_))), "{panicked:?}");
    let name = || Ok(thread::current().name().unwrap().to_owned());
    assert_eq!(pool.run(name).await.unwrap(), "tokenize-0");
    assert_eq!(pool.run_sized(SMALL_BYTES, name).await.unwrap(), "tokenize-0");
    assert_eq!(pool.run_sized(SMALL_BYTES + 1, name).await.unwrap(), "tokenize-large-0");
    let steps = pool.run_in_steps(|| Ok(Step::Large(1)), move |one| Ok((one, name()?))).await;
    assert_eq!(steps.unwrap(), (1, "tokenize-large-0".to_owned()));
    let steps = pool.run_in_steps(|| Ok(Step::<_, ()>::Done(2)), |()| Ok(3)).await;
    assert_eq!(steps, Ok(2));
}

#[tokio::test]
async fn a_full_queue_is_busy_and_small_jobs_do_not_wait_for_large_ones() {
    let pool = pool(1, 1, LONG);
    let hold = occupy(&pool, usize::MAX).await;
    assert_eq!(pool.run(|| Ok(1)).await, Ok(1));
    let waiting = pool.run_sized(usize::MAX, || Ok(2));
    tokio::pin!(waiting);
    assert!(poll_once(&mut waiting).await.is_none());
    assert_eq!(pool.run_sized(usize::MAX, || Ok(3)).await, Err(TokenizeError::Busy));
    assert_eq!(pool.run(|| Ok(4)).await, Ok(4));
    drop(hold);
    assert_eq!(waiting.await, Ok(2));
}

/// The result of a future if it has one at once.
async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    tokio::select! {
        biased;
        output = future => Some(output),
        () = std::future::ready(()) => None,
    }
}

#[tokio::test]
async fn who_is_late_gets_none_and_what_was_not_begun_is_not() {
    let begun = Arc::new(AtomicUsize::new(0));
    let count = || {
        let begun = Arc::clone(&begun);
        move || {
            begun.fetch_add(1, Relaxed);
            Ok(())
        }
    };
    let patient = pool(1, 8, LONG);
    let hold = occupy(&patient, 0).await;
    {
        let gone = patient.run(count());
        tokio::pin!(gone);
        assert!(poll_once(&mut gone).await.is_none());
    }
    drop(hold);
    patient.run(|| Ok(())).await.unwrap();
    assert_eq!(begun.load(Relaxed), 0, "its caller had gone");

    let pool = pool(1, 8, Duration::from_millis(5));
    let (begins, has_begun) = mpsc::channel();
    let (ends, has_ended) = mpsc::channel();
    let hold = loop {
        let (hold, held) = mpsc::channel::<()>();
        let (begins, ends) = (begins.clone(), ends.clone());
        let slow = move || {
            begins.send(()).unwrap();
            held.recv().unwrap_err();
            ends.send(()).unwrap();
            Ok(())
        };
        assert_eq!(pool.run(slow).await, Err(TokenizeError::Late));
        // On a busy machine the time may be over before a thread has woken.
        if has_begun.try_recv().is_ok() {
            break hold;
        }
    };
    assert_eq!(pool.run(count()).await, Err(TokenizeError::Late));
    drop(hold);
    has_ended.recv_timeout(LONG).expect("a job that is begun runs to its end");
    drop(pool);
    assert_eq!(begun.load(Relaxed), 0, "it was late before it could begin");
}

#[tokio::test]
async fn dropping_ends_the_threads_and_jobs_that_wait() {
    let pool = pool(2, 8, LONG);
    let both = (occupy(&pool, 0).await, occupy(&pool, 0).await);
    let waiting = Arc::new(());
    let held = Arc::clone(&waiting);
    {
        let never = pool.run(move || Ok(Arc::strong_count(&held)));
        tokio::pin!(never);
        assert!(poll_once(&mut never).await.is_none());
    }
    drop(both);
    let pool = until_last(pool).await;
    drop(pool);
    assert_eq!(Arc::strong_count(&waiting), 1);
}

/// The pool itself, once those who occupied it are done.
async fn until_last(mut pool: Arc<Pool>) -> Pool {
    loop {
        match Arc::try_unwrap(pool) {
            Ok(last) => return last,
            Err(shared) => pool = shared,
        }
        tokio::task::yield_now().await;
    }
}

#[test]
fn several_pools_share_their_metrics() {
    let registry = Registry::new();
    let start = || Pool::start(PoolConfig::default(), &registry, "pool_metrics").unwrap();
    let (first, second) = (start(), start());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        first.run(|| Ok(())).await.unwrap();
        second.run(|| Ok(())).await.unwrap();
    });
    let full =
        Pool::start(PoolConfig { queue: 0, ..PoolConfig::default() }, &registry, "pool_metrics");
    assert_eq!(runtime.block_on(full.unwrap().run(|| Ok(()))), Err(TokenizeError::Busy));
    let text = crate::support::metrics::encode(&registry).unwrap();
    for line in [
        "pool_metrics_tokenize_seconds_count 2",
        "pool_metrics_tokenize_queue 0",
        "pool_metrics_tokenize_refused_total{reason=\"queue_full\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn threads_are_at_least_one_of_each_kind() {
    let pool = pool(0, 1, LONG);
    assert_eq!((pool.small.threads.len(), pool.large.threads.len()), (1, 1));
    assert!(PoolConfig::default().threads >= 2);
}
