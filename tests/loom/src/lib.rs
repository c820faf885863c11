//! Models of the index's synchronisation, run in the orders that the memory model allows: in all
//! that loom finds, or, where these are too many, in those with few preemptions (`race_within`).
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --manifest-path tests/loom/Cargo.toml
//! ```
//!
//! The version word (`seqlock.rs`) and the hash table (`heads.rs`) are the engine's own files,
//! compiled with loom's atomics. What `storage.rs` does with them is modelled: `reuse` has the
//! life of a run's number and of its storage, `creation` how a key comes into being once. Who
//! changes those protocols changes the model too.
//!
//! A model that cannot fail says nothing. So each has negative controls, which have to fail with
//! the model's own message: either the same model on the engine's source with one thing broken
//! (`build.rs`), or the model with one step left out.
//!
//! Loom looks for other orders from the one in which it starts, and remembers one access per
//! object: a thread's load hides the load of another one from the store that follows (loom 0.7.3;
//! several controls did not fail for it). `race` therefore starts with each thread in turn.

#[cfg(not(loom))]
compile_error!("models are built with RUSTFLAGS=\"--cfg loom\"");

/// What `heads.rs` needs of the crate.
mod model {
    #[derive(Clone, Copy)]
    pub(crate) struct RequestKey(pub(crate) u64);
}

#[cfg_attr(not(test), expect(dead_code, reason = "models are tests"))]
#[path = "../../../src/index/runs/seqlock.rs"]
mod seqlock;

#[expect(dead_code, reason = "no model hashes keys")]
#[path = "../../../src/index/runs/heads.rs"]
mod heads;

include!(concat!(env!("OUT_DIR"), "/broken.rs"));

#[cfg(test)]
mod creation;
#[cfg(test)]
mod reuse;
#[cfg(test)]
mod tables;
#[cfg(test)]
mod versions;

/// What one thread of a model does.
#[cfg(test)]
type Side<S, R> = Box<dyn Fn(&S) -> R + Send + Sync>;

/// Runs the sides against each other on what `new` makes, and then `check` on what they return.
/// Nothing may panic before: objects of loom do not survive their model.
#[cfg(test)]
fn race<S, R, const N: usize>(
    new: impl Fn() -> S + Send + Sync + 'static,
    sides: [Side<S, R>; N],
    check: impl Fn(&S, [R; N]) + Send + Sync + 'static,
) where
    S: Send + Sync + 'static,
    R: Send + 'static,
{
    race_within(None, new, sides, check);
}

/// Like [`race`], with so many preemptions at most where all orders are too many.
#[cfg(test)]
fn race_within<S, R, const N: usize>(
    preemptions: Option<usize>,
    new: impl Fn() -> S + Send + Sync + 'static,
    sides: [Side<S, R>; N],
    check: impl Fn(&S, [R; N]) + Send + Sync + 'static,
) where
    S: Send + Sync + 'static,
    R: Send + 'static,
{
    let model = std::sync::Arc::new((new, sides, check));
    for first in 0..N {
        let model = std::sync::Arc::clone(&model);
        let mut loom = loom::model::Builder::new();
        loom.preemption_bound = preemptions;
        loom.check(move || {
            let shared = loom::sync::Arc::new((model.0)());
            let mut threads: [_; N] = std::array::from_fn(|side| {
                let (shared, model) = (loom::sync::Arc::clone(&shared), model.clone());
                (side != first).then(|| loom::thread::spawn(move || model.1[side](&shared)))
            });
            let mut own = Some(model.1[first](&shared));
            let results = std::array::from_fn(|side| match threads[side].take() {
                Some(thread) => thread.join().unwrap(),
                None => own.take().unwrap(),
            });
            (model.2)(&shared, results);
        });
    }
}

/// Declares negative controls: each model has to fail with its message.
#[cfg(test)]
macro_rules! fails {
    ($($name:ident: $model:expr => $message:literal;)*) => {$(
        #[test]
        #[should_panic(expected = $message)]
        fn $name() {
            $model;
        }
    )*};
}
#[cfg(test)]
use fails;
