#![no_main]

libfuzzer_sys::fuzz_target!(
    |data: &[u8]| kv_indexer::epp::datalayer::page::fuzz::scrape_is_total(data)
);
