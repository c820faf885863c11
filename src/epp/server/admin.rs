//! Pages for operators: `/metrics` for everybody, `/debug/…` for a listener of its own on loopback.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use prometheus::Registry;
use serde_json::{Value, json};

use crate::{
    epp::{
        datalayer::{Endpoint, Endpoints},
        server::health::Health,
    },
    support::admin::{Page, Routes},
};

/// `/metrics`, `/livez` and `/readyz`.
#[must_use]
pub fn metrics_routes(registry: Registry, health: Health) -> Routes {
    Routes::new()
        .metrics(registry)
        .readiness(move || if health.is_serving("readiness") { Ok(()) } else { Err("not serving") })
}

/// `/debug/endpoints`, `/debug/config`, and an explanation where the Go EPP has its profiler.
///
/// `config` is shown as it is: secrets must be gone already. Metrics older than `stale` are marked.
#[must_use]
pub fn debug_routes(endpoints: Arc<Endpoints>, config: &Value, stale: Duration) -> Routes {
    let config = Page::json(config);
    let mut routes = Routes::new()
        .page("/debug/endpoints", move |_| {
            let list: Vec<Value> =
                endpoints.list().iter().map(|endpoint| describe(endpoint, stale)).collect();
            Page::json(&json!({ "endpoints": list }))
        })
        .page("/debug/config", move |_| config.clone());
    for path in [
        "/debug/pprof",
        "/debug/pprof/",
        "/debug/pprof/allocs",
        "/debug/pprof/cmdline",
        "/debug/pprof/goroutine",
        "/debug/pprof/heap",
        "/debug/pprof/mutex",
        "/debug/pprof/profile",
        "/debug/pprof/symbol",
        "/debug/pprof/trace",
    ] {
        routes = routes.page(path, |_| {
            let text = "not built: pprof is Go's profiler; use perf or another of the system's";
            Page::text(StatusCode::NOT_FOUND, text)
        });
    }
    routes
}

fn describe(endpoint: &Endpoint, stale: Duration) -> Value {
    let info = endpoint.info();
    let metrics = endpoint.metrics();
    let age = metrics.updated.map(|updated| updated.elapsed());
    json!({
        "name": info.name.to_string(),
        "life": endpoint.id().0,
        "address": endpoint.address(),
        "metricsAddress": info.metrics_address.to_string(),
        "labels": info.labels,
        "metrics": {
            "ageSeconds": age.map(|age| age.as_secs_f64()),
            "stale": age.is_none_or(|age| age > stale),
            "waiting": metrics.waiting,
            "running": metrics.running,
            "kvUsage": metrics.kv_usage,
            "cacheBlockTokens": metrics.cache_block_tokens,
            "cacheBlocks": metrics.cache_blocks,
            "lora": {
                "active": metrics.lora.active,
                "waiting": metrics.lora.waiting,
                "maxActive": metrics.lora.max_active,
            },
            "custom": metrics.custom,
        },
    })
}
