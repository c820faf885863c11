//! llm-d's Benchmark Report v0.2.1.

use serde_json::Value;

use super::Report;

/// One document for each scenario.
#[must_use]
pub fn documents(report: &Report) -> Vec<Value> {
    let _ = report;
    Vec::new()
}
