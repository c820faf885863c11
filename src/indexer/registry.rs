//! The side door through which `RegisterPod` and `UnregisterPod` reach ingest.

use std::fmt;

use crate::ingest::fleet::PodDeclaration;

/// Who owns the set of publishers.
///
/// # Contract
///
/// * Neither call waits for a network or for a subscription to come up, but both wait for the threads
///   of ingest, for seconds if those are busy: they are called where blocking is allowed.
/// * Registering an equal declaration again changes nothing; a different one for the same (pod,
///   rank) restarts its publisher.
/// * After [`unregister`](Self::unregister) returned, no later lookup sees the pod's blocks.
pub trait PodRegistry: Send + Sync + fmt::Debug {
    /// Adds or replaces a publisher. The declaration's fields have been checked.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    fn register(&self, declaration: PodDeclaration) -> Result<(), RegistryError>;

    /// Removes a publisher and its rows: those of `rank`, or all of the pod's. `false` when there
    /// is none.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Fixed`] and [`RegistryError::Unavailable`].
    fn unregister(&self, pod: &str, rank: Option<u32>) -> Result<bool, RegistryError>;
}

/// Why the registry refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// A field that only the registry can judge.
    #[error("{field}: {why}")]
    Invalid {
        /// Name of the field in `RegisterPodRequest`.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// As many rows as `maxPods` allows.
    #[error("{limit} pods are registered, the limit")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// The pod comes from the configuration or discovery, which owns it.
    #[error("pod: {pod} is declared by {source_name}, which owns it")]
    Fixed {
        /// The pod.
        pod: String,
        /// Who declared it.
        source_name: String,
    },
    /// Ingest is not running.
    #[error("{0}")]
    Unavailable(String),
}
