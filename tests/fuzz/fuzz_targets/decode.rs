#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::wire::fuzz::decode_is_total(data));
