//! Committed vectors. A change that breaks one splits every fleet that computes keys on its own.
//!
//! `V*` and `X*` are llm-d's, computed by its Go code and by an independent program; `H*` and the
//! fingerprints were computed with Python's `xxhash` from the definitions in ARCHITECTURE.md.

use std::ops::RangeInclusive;

use proptest::prelude::*;

use super::*;
use crate::model::RequestKey;

/// Extras of block 0 and block 1.
type Extras<'a> = [&'a [&'a str]; 2];

const NONE: Extras<'_> = [&[], &[]];

#[track_caller]
fn check(
    algorithm: Algorithm,
    (block_size, seed, model, lora): (u32, &str, &str, &str),
    tokens: &[u32],
    extras: Extras<'_>,
    root: u64,
    keys: &[u64],
) {
    let scheme = Scheme::new(algorithm, seed, block_size);
    let mut key = scheme.root(model, lora);
    assert_eq!(key.0, root, "root");
    let mut scratch = Vec::new();
    let mut got = Vec::new();
    for (block, tokens) in tokens.chunks_exact(block_size as usize).enumerate() {
        let extras = extras.get(block).copied().unwrap_or_default();
        let extras: Vec<&[u8]> = extras.iter().map(|extra| extra.as_bytes()).collect();
        key = scheme.next(key, tokens, &extras, &mut scratch);
        got.push(key.0);
    }
    assert_eq!(got, keys);
    if extras == NONE {
        let prompt = Prompt { model, lora, tokens, ..Prompt::default() };
        let same: Vec<u64> = prompt.keys(&scheme).unwrap().iter().map(|key| key.0).collect();
        assert_eq!(same, keys, "as a prompt");
    }
}

fn range(tokens: RangeInclusive<u32>) -> Vec<u32> {
    tokens.collect()
}

const TEST: (u32, &str, &str, &str) = (4, "", "test-model", "");
const LLAMA: (u32, &str, &str, &str) = (16, "42", "meta-llama/Llama-3.1-8B-Instruct", "");
const WIDTHS: [u32; 8] = [0, 23, 24, 255, 256, 65_535, 65_536, 4_294_967_295];

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn cbor_fnv_is_llmds() {
    use Algorithm::CborFnv as A;
    let init = 17_515_353_698_173_365_712;
    // V1: the tail is dropped.
    check(A, TEST, &range(1..=9), NONE, init, &[12_915_946_116_324_560_722, 16_245_044_729_138_844_785]);
    // V2
    check(A, (16, "", "m", ""), &range(0..=31), NONE, 11_374_735_546_233_341_228, &[7_711_063_176_051_622_293, 3_714_816_549_193_055_456]);
    // V3
    check(A, LLAMA, &range(1..=16), NONE, 14_719_020_265_107_256_041, &[8_775_620_590_023_426_189]);
    // V4: multimodal on block 1.
    check(A, TEST, &range(1..=8), [&[], &["abc"]], init, &[12_915_946_116_324_560_722, 7_238_067_531_735_250_062]);
    // V5: a cache salt.
    check(A, TEST, &range(1..=8), [&["s3cr3t"], &[]], init, &[6_893_380_783_987_189_644, 4_198_452_908_166_007_908]);
    // V6: every width of a CBOR integer.
    check(A, TEST, &WIDTHS, NONE, init, &[10_268_117_531_063_637_406, 14_903_289_548_042_751_799]);
    // V7: the parent alone decides, model and seed do not.
    let scheme = Scheme::new(A, "any", 4);
    let key = scheme.next(RequestKey(1), &[1, 2, 3, 4], &[], &mut Vec::new());
    assert_eq!(key, RequestKey(10_766_384_128_962_375_587));
    let key = scheme.next(RequestKey(1), &[1, 2, 3, 4], &[b"abc"], &mut Vec::new());
    assert_eq!(key, RequestKey(93_444_501_289_905_252));
    // V8
    check(A, (1, "", "", ""), &[7], NONE, 155_877_178_866_718_358, &[9_607_384_143_422_006_294]);
}

#[test]
#[rustfmt::skip]
fn xxh64_is_llmds() {
    use Algorithm::Xxh64 as A;
    let init = 658_786_475_292_698_776;
    // X1
    check(A, TEST, &range(1..=9), NONE, init, &[8_433_318_296_068_090_153, 13_396_831_690_803_705_894]);
    // X2
    check(A, (16, "", "m", ""), &range(0..=31), NONE, 14_487_164_469_406_636_363, &[5_987_431_614_981_040_774, 14_913_693_294_291_408_311]);
    // X3
    check(A, LLAMA, &range(1..=16), NONE, 7_426_253_528_093_841_760, &[11_711_585_542_751_291_856]);
    // X4
    check(A, TEST, &range(1..=8), [&[], &["abc"]], init, &[8_433_318_296_068_090_153, 17_870_168_987_398_621_281]);
    // X5
    check(A, TEST, &WIDTHS, NONE, init, &[13_609_497_810_408_884_704, 9_329_208_635_258_085_435]);
    // A salt, a parent of 1, and the smallest block.
    check(A, TEST, &range(1..=8), [&["s3cr3t"], &[]], init, &[14_492_289_195_728_585_250, 921_383_793_466_355_394]);
    let key = Scheme::new(A, "", 4).next(RequestKey(1), &[1, 2, 3, 4], &[], &mut Vec::new());
    assert_eq!(key, RequestKey(5_541_433_612_083_475_108));
    let scheme = Scheme::new(A, "", 1);
    assert_eq!(scheme.next(scheme.root("", ""), &[7], &[], &mut Vec::new()).0, 8_320_978_201_987_557_144);
}

#[test]
#[rustfmt::skip]
fn xxh3_is_as_defined() {
    use Algorithm::Xxh3 as A;
    let init = 11_980_170_304_370_677_183;
    // H1
    check(A, TEST, &range(1..=9), NONE, init, &[4_821_240_282_919_742_180, 848_723_880_924_345_266]);
    // H2
    check(A, (16, "", "m", ""), &range(0..=31), NONE, 4_882_359_163_686_655_639, &[6_457_618_452_276_751_185, 13_227_600_691_705_906_968]);
    // H3: an adapter beside the model.
    check(A, (16, "42", "meta-llama/Llama-3.1-8B-Instruct", "sql"), &range(1..=16), NONE, 15_203_007_629_410_943_530, &[1_930_281_108_992_459_706]);
    // H4
    check(A, TEST, &range(1..=8), [&[], &["abc"]], init, &[4_821_240_282_919_742_180, 9_101_102_803_346_601_380]);
    // H5: a multimodal hash before the salt.
    check(A, TEST, &range(1..=8), [&["img", "s3cr3t"], &[]], init, &[17_335_526_109_236_549_637, 17_291_466_405_687_967_077]);
    // H6
    check(A, TEST, &WIDTHS, NONE, init, &[8_838_864_473_590_095_674, 5_188_425_745_413_699_160]);
    // H7: beyond XXH3's short inputs.
    check(A, (64, "", "m", ""), &range(0..=127), NONE, 4_882_359_163_686_655_639, &[12_146_397_022_672_054_730, 9_953_606_595_926_172_423]);
}

#[test]
fn fingerprints() {
    let check = |algorithm, size, seed: &str, want: u64| {
        assert_eq!(Scheme::new(algorithm, seed, size).fingerprint(), want);
    };
    check(Algorithm::Xxh3, 16, "", 15_681_029_235_468_845_830);
    check(Algorithm::CborFnv, 16, "42", 5_875_415_646_251_710_943);
    check(Algorithm::Xxh64, 64, "seed", 6_084_731_203_789_735_863);
}

#[test]
fn in_llmds_algorithms_an_adapter_replaces_the_model() {
    for algorithm in [Algorithm::Xxh64, Algorithm::CborFnv] {
        let scheme = Scheme::new(algorithm, "", 16);
        assert_eq!(scheme.root("base", "sql"), scheme.root("sql", ""));
    }
    let ours = Scheme::new(Algorithm::Xxh3, "", 16);
    assert_ne!(ours.root("base", "sql"), ours.root("sql", ""));
    assert_ne!(ours.root("base", "sql"), ours.root("bases", "ql"));
}

#[test]
fn fewer_tokens_than_a_block_have_no_keys() {
    let scheme = Scheme::new(Algorithm::Xxh3, "", 16);
    let prompt = Prompt { tokens: &[1; 15], ..Prompt::default() };
    assert_eq!(prompt.keys(&scheme), Ok(Vec::new()));
}

#[test]
fn items_beyond_the_prompt_are_refused() {
    let scheme = Scheme::new(Algorithm::Xxh3, "", 4);
    let item = |offset, length| MultimodalItem { hash: "a".to_owned(), offset, length };
    let keys = |items: &[MultimodalItem]| {
        Prompt { tokens: &[1; 8], multimodal: items, ..Prompt::default() }.keys(&scheme)
    };
    assert!(keys(&[item(0, 8)]).is_ok());
    let refused = keys(&[item(0, 8), item(7, 2)]).unwrap_err();
    assert_eq!(refused.to_string(), "multimodal item 1 covers tokens 7..9, the prompt has 8");
    assert!(keys(&[item(u32::MAX, u32::MAX)]).is_err(), "no overflow");
}

#[test]
fn work_on_items_is_bounded() {
    let scheme = Scheme::new(Algorithm::Xxh3, "", 4);
    let tokens: Vec<u32> = (0..40_000).collect();
    let all = |hash: String| MultimodalItem { hash, offset: 0, length: 40_000 };
    let keys = |items: &[MultimodalItem]| {
        Prompt { tokens: &tokens, multimodal: items, ..Prompt::default() }.keys(&scheme)
    };
    let nested = |count: usize| (0..count).map(|at| all(at.to_string())).collect::<Vec<_>>();
    assert!(keys(&nested(14)).is_ok());
    let refused = keys(&nested(4096)).unwrap_err();
    let want = "multimodal items touch 180000 blocks in sum, the limit of this prompt is 178304";
    assert_eq!(refused.to_string(), want);
    // One long hash costs like many short ones.
    assert!(keys(&[all("x".repeat(1000))]).is_ok());
    let long = keys(&[all("x".repeat(10_000))]);
    assert!(matches!(long, Err(PromptError::TooManyOverlaps { .. })), "{long:?}");
    // Side by side, and beyond the last full block, there may be any number.
    let small = |offset| MultimodalItem { hash: "a".to_owned(), offset, length: 1 };
    assert!(keys(&(0..40_000).map(small).collect::<Vec<_>>()).is_ok());
}

proptest! {
    /// The keys of a prompt with items are those of the definition, block by block.
    #[test]
    fn items_taint_every_block_that_they_overlap(
        items in prop::collection::vec((0u32..3, 0u32..40, 0u32..20), 0..6),
        salt in "[a-z]{0,3}",
    ) {
        let tokens: Vec<u32> = (0..48).collect();
        let scheme = Scheme::new(Algorithm::Xxh3, "s", 4);
        let multimodal: Vec<MultimodalItem> = items
            .iter()
            .map(|&(name, offset, length)| MultimodalItem {
                hash: format!("item-{name}"),
                offset,
                length: length.min(48 - offset),
            })
            .collect();
        let prompt = Prompt {
            model: "m",
            lora: "",
            tokens: &tokens,
            cache_salt: &salt,
            multimodal: &multimodal,
        };
        let mut sorted: Vec<_> = multimodal.iter().collect();
        sorted.sort_by_key(|item| item.offset);
        let mut key = scheme.root("m", "");
        let mut want = Vec::new();
        for block in 0..12u32 {
            let (from, to) = (block * 4, block * 4 + 4);
            let mut extras: Vec<&[u8]> = Vec::new();
            for item in &sorted {
                let overlaps = (item.offset..item.offset + item.length).any(|t| (from..to).contains(&t));
                if overlaps && !extras.contains(&item.hash.as_bytes()) {
                    extras.push(item.hash.as_bytes());
                }
            }
            if block == 0 && !salt.is_empty() {
                extras.push(salt.as_bytes());
            }
            let tokens = &tokens[from as usize..to as usize];
            key = scheme.next(key, tokens, &extras, &mut Vec::new());
            want.push(key);
        }
        prop_assert_eq!(prompt.keys(&scheme).unwrap(), want);
    }
}
