#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::epp::request::fuzz::body_is_total(data));
