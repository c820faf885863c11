#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_indexer::epp::ext_proc::fuzz::is_total(data));
