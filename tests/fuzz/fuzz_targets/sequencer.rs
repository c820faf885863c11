#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::ingest::sequencer::fuzz::is_total(data));
