//! The gRPC services over an index in which all pods hold one prompt.

use std::sync::Arc;

use kv_indexer::{
    index::{IndexConfig, runs::RunIndex},
    indexer::{
        ApiConfig,
        metrics::ScoreMetrics,
        registry::{PodRegistry, RegistryError},
        service::{Parts, Service},
        speculation::Speculations,
    },
    ingest::fleet::{Fleet, PodDeclaration},
    model::{CountMode, RowId, TierTable},
};
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
struct NoRegistry;

impl PodRegistry for NoRegistry {
    fn register(&self, _: PodDeclaration) -> Result<(), RegistryError> {
        Ok(())
    }

    fn unregister(&self, _: &str, _: Option<u32>) -> Result<bool, RegistryError> {
        Ok(false)
    }
}

/// A service whose index has `pods` pods that hold one prompt of `blocks` blocks, and the prompt.
pub(crate) fn filled(pods: u32, blocks: u32) -> (Service, Vec<u32>) {
    let tiers = Arc::new(TierTable::default());
    let index = RunIndex::new(IndexConfig { tiers: Arc::clone(&tiers), ..IndexConfig::default() });
    let fleet = Arc::new(Fleet::new(Arc::new(index)));
    let tokens = super::Random(7).tokens(blocks * super::BLOCK);
    for pod in 0..pods {
        let id = RowId { pod: format!("pod-{pod}").into(), rank: Some(0) };
        let model = Arc::from("model");
        let row = fleet.add(id, "tcp://a:1", &super::scheme(), &model, CountMode::Counted);
        let slot = row.expect("room for the pods").slot;
        super::store_prompt(&**fleet.index(), slot, &tokens, 1000 + u64::from(pod));
    }
    let mut config = ApiConfig::default();
    config.models.default = super::scheme();
    let speculations = Arc::new(Speculations::new(Arc::clone(fleet.index()), 1000));
    let service = Service::new(Parts {
        fleet,
        tiers,
        config: Arc::new(config),
        registry: Arc::new(NoRegistry),
        speculations,
        metrics: ScoreMetrics::register(&Registry::new(), false).expect("new names"),
        tokenizer: None,
        stop: CancellationToken::new(),
    });
    (service, tokens)
}
