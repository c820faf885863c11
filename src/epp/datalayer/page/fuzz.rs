//! Properties of the page reader over arbitrary bytes, shared by the fuzz target in `tests/fuzz` and
//! by the replay of its corpus on a stable compiler. For tests only: a broken property panics.

use super::{Found, Names, Scanner};
use crate::epp::datalayer::{
    Metrics,
    engines::{Engine, Extraction, PageReader, builtin},
};

/// Reads a page whole and in chunks, with every built-in engine, and compares. The first byte says
/// where the chunks end.
///
/// # Panics
///
/// If the chunks matter, or a value is out of its range.
pub fn scrape_is_total(data: &[u8]) {
    let (step, page) = data.split_first().map_or((1, data), |(step, page)| (*step, page));
    let step = usize::from(step).max(1);
    let names = Names::new(["a", "a_b", "vllm:num_requests_waiting"]);
    assert_eq!(finds(&names, page, page.len().max(1)), finds(&names, page, step));
    for config in builtin() {
        let engine = std::sync::Arc::new(Engine::new(&config));
        let mut reader = PageReader::new(engine);
        let whole = read(&mut reader, page, page.len().max(1));
        let complaint = reader.complaint();
        assert!(!complaint.is_empty());
        assert_eq!(whole, read(&mut reader, page, step), "{}", config.name);
        let (extraction, metrics) = whole;
        assert!((0.0..=1.0).contains(&metrics.kv_usage));
        assert!(metrics.custom.is_empty() && metrics.updated.is_none());
        if extraction.found == 0 {
            assert_eq!(metrics, Metrics::default());
        }
    }
}

fn finds(names: &Names, page: &[u8], step: usize) -> Vec<String> {
    let mut finds = Vec::new();
    let mut scanner = Scanner::default();
    let mut note = |found: Found<'_>| finds.push(format!("{found:?}"));
    for chunk in page.chunks(step) {
        scanner.feed(names, chunk, &mut note);
    }
    scanner.finish(names, &mut note);
    finds
}

fn read(reader: &mut PageReader, page: &[u8], step: usize) -> (Extraction, Metrics) {
    let mut metrics = Metrics::default();
    reader.begin();
    for chunk in page.chunks(step) {
        reader.feed(chunk);
    }
    (reader.finish(&mut metrics), metrics)
}
