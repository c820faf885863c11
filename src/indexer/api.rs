//! Settings of the gRPC API. The defaults are documented in `config/kv-indexer.yaml`.

use std::time::Duration;

use crate::hash::Models;

/// Limits and names of the score API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Bytes of one gRPC message.
    pub max_message_bytes: usize,
    /// Tokens of one prompt.
    pub max_tokens: usize,
    /// Prompts of one request.
    pub max_prompts: usize,
    /// Multimodal items of one prompt.
    pub max_multimodal: usize,
    /// Pods that one request may ask for.
    pub max_pods_asked: usize,
    /// Bytes of a pod id.
    pub max_pod_id_bytes: usize,
    /// Calls in flight per connection.
    pub max_concurrent_calls: u32,
    /// Speculative entries at most, over all pods. Their blocks, counted once for each row, are
    /// limited to 128 times as many.
    pub max_speculations: usize,
    /// Longest life of a speculative entry.
    pub max_speculation_ttl: Duration,
    /// Connections at most. One address may have as many as are left over.
    pub max_connections: usize,
    /// A connection without a call for this long is closed.
    pub idle_timeout: Duration,
    /// Bytes of unfinished requests, unanswered requests of streams and untaken answers. One address
    /// may have as many as are left over. At least two messages.
    pub max_pending_bytes: usize,
    /// How long a message may take from its first byte to its last.
    pub message_timeout: Duration,
    /// Names of models.
    pub models: Models,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            max_message_bytes: 16 << 20,
            max_tokens: 2 << 20,
            max_prompts: 1024,
            max_multimodal: 4096,
            max_pods_asked: 4096,
            max_pod_id_bytes: 512,
            max_concurrent_calls: 256,
            max_speculations: 65_536,
            max_speculation_ttl: Duration::from_secs(600),
            max_connections: 4096,
            idle_timeout: Duration::from_secs(600),
            max_pending_bytes: 512 << 20,
            message_timeout: Duration::from_secs(30),
            models: Models::default(),
        }
    }
}
