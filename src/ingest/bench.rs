//! One lane without threads and sockets, for the benches: bytes in, visible blocks out.

use std::{sync::Arc, time::Instant};

use crate::{
    hash::Scheme,
    index::BlockIndex,
    ingest::{
        IngestConfig,
        apply::{Applier, Shared},
        fleet::{Fleet, PodDeclaration, Row},
        metrics::IngestMetrics,
    },
    model::{CountMode, RowId},
};

/// See the module's documentation.
#[derive(Debug)]
pub struct Lane {
    applier: Applier,
    fleet: Arc<Fleet>,
    row: Arc<Row>,
    now: Instant,
}

/// Batches for which a lane looks at the clock once.
const TURN: u64 = 64;

impl Lane {
    /// A lane with one pod of one model.
    ///
    /// # Panics
    ///
    /// When the index has no room for one pod.
    #[must_use]
    #[expect(clippy::expect_used, reason = "a bench has nobody to tell")]
    pub fn new(index: Arc<dyn BlockIndex>, config: &IngestConfig) -> Self {
        let fleet = Arc::new(Fleet::new(index));
        let id = RowId { pod: Arc::from("pod"), rank: None };
        let scheme = Arc::new(Scheme::new(crate::hash::Algorithm::default(), "", 16));
        let row = fleet
            .add(id, "", &scheme, &Arc::from("model"), CountMode::Counted)
            .expect("room for one pod");
        let metrics =
            IngestMetrics::register(&prometheus::Registry::new()).expect("a new registry");
        let shared = Arc::new(Shared {
            fleet: Arc::clone(&fleet),
            tiers: Arc::default(),
            metrics,
            limits: config.limits.clone(),
            orphan_timeout: config.orphan_timeout,
            loss: config.loss.clone(),
        });
        let applier = Applier::new(&shared, &row, &PodDeclaration::default());
        Self { applier, fleet, row, now: Instant::now() }
    }

    /// Applies one batch, as a lane thread does.
    pub fn batch(&mut self, sequence: u64, payload: &[u8]) {
        if sequence.is_multiple_of(TURN) {
            self.now = Instant::now();
        }
        self.applier.batch(sequence, payload, self.now);
    }

    /// Engine blocks held.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.fleet.index().pod_usage(self.row.slot).blocks
    }
}
