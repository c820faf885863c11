#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::indexer::service::fuzz::request_is_total(data));
