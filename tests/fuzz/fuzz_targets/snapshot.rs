#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::ingest::snapshot::fuzz::is_total(data));
