//! An engine beside a test.

use kv_indexer::loadgen::engine::{Engine, EngineHandle, EngineOptions};

use crate::support::patience;

/// An engine on a runtime of its own.
pub(crate) struct Running {
    runtime: tokio::runtime::Runtime,
    engine: Option<EngineHandle>,
}

impl Running {
    pub(crate) fn start(options: EngineOptions) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let engine = Some(runtime.block_on(Engine::start(options)).unwrap());
        Self { runtime, engine }
    }

    pub(crate) fn stop(&mut self) {
        self.runtime.block_on(self.engine.take().unwrap().stop());
    }

    /// Ends it as a kill does.
    pub(crate) fn kill(&mut self) {
        self.runtime.block_on(self.engine.take().unwrap().kill());
    }

    /// Waits until everybody has subscribed.
    pub(crate) fn subscribed(&self) {
        let there = self.runtime.block_on(self.wait_for_subscribers(patience()));
        assert!(there, "nobody subscribes");
    }

    /// Waits until nothing runs.
    pub(crate) fn idle(&self) {
        assert!(self.runtime.block_on(self.wait_idle(patience())), "it never ends");
    }
}

impl std::ops::Deref for Running {
    type Target = EngineHandle;

    fn deref(&self) -> &EngineHandle {
        self.engine.as_ref().unwrap()
    }
}
