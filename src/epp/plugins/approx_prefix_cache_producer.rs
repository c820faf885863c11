//! `approx-prefix-cache-producer`: guesses what an endpoint has cached from what it was sent.
//!
//! # Formula
//!
//! ```text
//! block = max(autoTune and reported > 0 ? reported : blockSizeTokens, 64)   tokens
//! h₀    = H(H(model), H(cache_salt));  hᵢ = H(H(tokens of block i), hᵢ₋₁)   the last one may be short
//! match = leading blocks that the endpoint was sent, and that still fit into its cache
//! ```
//!
//! "Reported" is `cache_block_tokens` of the first candidate. Tokens are real ones where they are
//! known; otherwise four bytes of tools and text are one, so that a block of 64 tokens is 256 bytes of
//! text, hashed where they lie. Pictures count as an estimate of their tokens. At most `maxPrefixTokensToMatch` tokens of each prompt of a request
//! count, or `maxPrefixBlocksToMatch` blocks if that is 0, or all if both are. The last endpoint
//! routed to is the one that has a block longest: `lruCapacityPerServer` blocks, or as many as the
//! engine reported when the endpoint was first routed to (`autoTune`).
//!
//! # Differences to the Go EPP
//!
//! * Blocks are remembered before the answer goes out, not some time after it, so that the next
//!   request already follows.
//! * Matches count leading blocks only. With prompts remembered last block first, as since
//!   llm-d-router #2661, Go's count of all blocks is the same number.
//! * State of a removed endpoint goes at once, not within two minutes, and an endpoint that comes
//!   back under its name starts with none.

use std::sync::Arc;

use crate::{
    epp::{
        datalayer::Endpoint,
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{
            Building, Registration, Stability,
            prefix::{BYTES_PER_TOKEN, DEFAULT_CAPACITY, Limit, MAX_CAPACITY, Matcher, Sizing},
        },
        request::InferenceRequest,
        scheduling::{
            BoxFuture, Cycle, DataKey, DataProducer, Flight, Plugin, PreRequest, Produced,
            SchedulingResult,
        },
    },
    support::fields::Fields,
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// The type's name, and that of the producer which others take by default.
pub(super) const TYPE: &str = "approx-prefix-cache-producer";

const DEFAULT_BLOCK: usize = 16;
/// Smaller blocks would take too much memory (llm-d-router #1158).
const LEAST_BLOCK: usize = 64;
const DEFAULT_MAX_TOKENS: usize = 131_072;
const DEFAULT_MAX_BLOCKS: usize = 2048;
/// Largest block and longest prompt that can be configured, tokens.
const MAX_TOKENS: u64 = 1 << 30;

/// See the [module](self).
#[derive(Debug)]
pub struct ApproxPrefixCacheProducer {
    matcher: Matcher,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let sizing = read(params);
    match Matcher::new(building, TYPE, sizing) {
        Ok(matcher) => Some(Arc::new(ApproxPrefixCacheProducer { matcher })),
        Err(error) => {
            params.fault("", error.to_string());
            None
        }
    }
}

fn read(params: &Fields<'_>) -> Sizing {
    let auto_tune = params.boolean("autoTune").unwrap_or(true);
    let deprecated: Option<usize> = params.integer("blockSize", 0..=MAX_TOKENS);
    let deprecated = deprecated.filter(|&tokens| tokens > 0);
    if deprecated.is_some() {
        params.warn("blockSize", "is deprecated; use `blockSizeTokens`");
    }
    let mut block = params.integer("blockSizeTokens", 0..=MAX_TOKENS).unwrap_or(DEFAULT_BLOCK);
    if block == DEFAULT_BLOCK {
        block = deprecated.unwrap_or(block);
    } else if deprecated.is_some() {
        params.warn("blockSize", "has no effect beside `blockSizeTokens`");
    } else if block == 0 && !auto_tune {
        params.fault("blockSizeTokens", "must be greater than 0 when autoTune is off");
    }
    if params.has("blockSizeTokens") && block < LEAST_BLOCK {
        params.warn("blockSizeTokens", format!("blocks are of at least {LEAST_BLOCK} tokens"));
    }
    let max_tokens =
        params.integer("maxPrefixTokensToMatch", 0..=MAX_TOKENS).unwrap_or(DEFAULT_MAX_TOKENS);
    let max_blocks =
        params.integer("maxPrefixBlocksToMatch", 0..=MAX_TOKENS).unwrap_or(DEFAULT_MAX_BLOCKS);
    if (1..block.max(LEAST_BLOCK)).contains(&max_tokens) {
        params.warn("maxPrefixTokensToMatch", "is less than a block: nothing will ever match");
    }
    if max_tokens > 0 && params.has("maxPrefixBlocksToMatch") {
        let text = format!(
            "has no effect unless maxPrefixTokensToMatch is 0: {max_tokens} tokens are the limit"
        );
        params.warn("maxPrefixBlocksToMatch", text);
    }
    let limit = match (max_tokens, max_blocks) {
        (0, 0) => Limit::None,
        (0, blocks) => Limit::Blocks(blocks),
        (tokens, _) => Limit::Bytes(tokens * BYTES_PER_TOKEN),
    };
    let capacity = params.integer("lruCapacityPerServer", 0..=MAX_CAPACITY as u64);
    Sizing {
        auto_tune,
        block_bytes: block * BYTES_PER_TOKEN,
        least_block_bytes: LEAST_BLOCK * BYTES_PER_TOKEN,
        limit,
        tokens: true,
        capacity: capacity.filter(|&capacity| capacity > 0).unwrap_or(DEFAULT_CAPACITY),
    }
}

impl Plugin for ApproxPrefixCacheProducer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        Some(self)
    }

    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }

    /// Real tokens, if anybody has them.
    fn may_consume(&self) -> Vec<DataKey> {
        vec![DataKey::Tokens]
    }

    fn endpoint_removed(&self, endpoint: &Endpoint) {
        self.matcher.remove(endpoint);
    }
}

impl DataProducer for ApproxPrefixCacheProducer {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        vec![DataKey::Prefix(Arc::clone(name))]
    }

    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        endpoints: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        self.matcher.produce(request, endpoints, produced);
        None
    }
}

impl PreRequest for ApproxPrefixCacheProducer {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        self.matcher.pre_request(cycle, result);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{
        epp::{
            datalayer::Metrics,
            plugins::prefix::testing::{Bench, Run, info, request, text},
            request::PromptForm,
            scheduling::PrefixMatches,
        },
        support::metrics::encode,
    };

    fn plugin(bench: &Bench, parameters: &str) -> Arc<dyn Plugin> {
        bench.build(REGISTRATION.factory, parameters).unwrap()
    }

    /// The matches of a request, which is routed if `picks` say whereto.
    fn ask(
        bench: &Bench,
        plugin: &dyn Plugin,
        name: &str,
        request: InferenceRequest,
        picks: &[(&str, usize)],
    ) -> PrefixMatches {
        let mut run = Run::new(&bench.endpoints, request);
        run.produce(plugin);
        if !picks.is_empty() {
            assert!(run.route(plugin, picks).is_none());
        }
        run.produced.prefix(name).cloned().unwrap()
    }

    /// A text of so many blocks of 64 tokens, each of one letter.
    fn blocks(letters: &str) -> String {
        letters.chars().map(|letter| letter.to_string().repeat(256)).collect()
    }

    #[test]
    fn the_endpoints_routed_to_match() {
        let bench = Bench::new("approx-routed", 3);
        let plugin = plugin(&bench, "{}");
        let ask = |letters: &str, picks: &[(&str, usize)]| {
            ask(&bench, &*plugin, "approx-routed", text(&blocks(letters)), picks)
        };
        let first = ask("ab", &[("default", 0), ("prefill", 2), ("other", 1)]);
        assert_eq!(first, PrefixMatches { total: 2, block: 64, matched: vec![0, 0, 0] });
        // Diverges at the second block.
        assert_eq!(ask("ac", &[]).matched, [1, 0, 1]);
        // Grows.
        let grown = ask("abcd", &[]);
        assert_eq!((grown.total, grown.matched), (4, vec![2, 0, 2]));
        assert_eq!(ask("xb", &[]).matched, [0, 0, 0]);

        bench.endpoints.remove(&info(0).name);
        let gone = Run::new(&bench.endpoints, text("")).endpoints;
        assert_eq!(gone.len(), 2);
    }

    #[test]
    fn a_removed_endpoint_is_forgotten() {
        let bench = Bench::new("approx-removed", 2);
        let plugin = plugin(&bench, "{}");
        let ask = |picks: &[(&str, usize)]| {
            ask(&bench, &*plugin, "approx-removed", text(&blocks("ab")), picks)
        };
        ask(&[("default", 0)]);
        assert_eq!(ask(&[]).matched, [2, 0]);
        let old = Arc::clone(&bench.endpoints.list()[0]);
        let size = "prefix_indexer_size{plugin_name=\"approx-removed\",\
                    plugin_type=\"approx-prefix-cache-producer\"}";
        assert!(encode(&bench.registry).unwrap().contains(&format!("{size} 2")));
        bench.endpoints.remove(&old.info().name);
        plugin.endpoint_removed(&old);
        assert!(encode(&bench.registry).unwrap().contains(&format!("{size} 0")));
        bench.endpoints.upsert(info(0));
        assert_eq!(ask(&[]).matched, [0, 0], "a new life");
    }

    #[test]
    fn blocks_are_sized_as_in_the_go_epp() {
        #[track_caller]
        fn check(parameters: &str, reported: u64, letters: &str, total: u32, block: u32) {
            let bench = Bench::new("approx-sizes", 1);
            let plugin = plugin(&bench, parameters);
            let metrics = Metrics {
                cache_block_tokens: reported,
                updated: Some(Instant::now()),
                ..Metrics::default()
            };
            bench.endpoints.list()[0].set_metrics(metrics);
            let got = ask(&bench, &*plugin, "approx-sizes", text(letters), &[]);
            assert_eq!((got.total, got.block), (total, block), "{parameters} {reported}");
        }
        let text = "x".repeat(4096);
        check("{}", 0, &text, 16, 64);
        // Raised to 64.
        check("{}", 16, &text, 16, 64);
        check("{autoTune: false, blockSizeTokens: 16}", 128, &text, 16, 64);
        check("{blockSizeTokens: 1}", 0, &text, 16, 64);
        check("{autoTune: false, blockSizeTokens: 100}", 0, &text, 11, 100);
        // The engine's goes before the configured one.
        check("{blockSizeTokens: 256}", 128, &text, 8, 128);
        check("{blockSizeTokens: 256}", 0, &text, 4, 256);
        check("{blockSize: 128}", 0, &text, 8, 128);
        check("{blockSize: 128, blockSizeTokens: 256}", 0, &text, 4, 256);
        // The last block may be short.
        check("{}", 0, "x", 1, 64);
        check("{}", 0, &text[..257], 2, 64);
        check("{}", 0, "", 0, 64);
        // Limits.
        check("{maxPrefixTokensToMatch: 191}", 0, &text, 2, 64);
        check("{maxPrefixTokensToMatch: 128, maxPrefixBlocksToMatch: 3}", 0, &text, 2, 64);
        check("{maxPrefixTokensToMatch: 0, maxPrefixBlocksToMatch: 3}", 0, &text, 3, 64);
        check("{maxPrefixTokensToMatch: 0, maxPrefixBlocksToMatch: 0}", 0, &text, 16, 64);
        check("{maxPrefixTokensToMatch: 1}", 0, &text, 0, 64);
    }

    #[test]
    fn the_engine_says_how_much_it_holds() {
        #[track_caller]
        fn check(parameters: &str, reported: u64, matched: u32) {
            let bench = Bench::new("approx-capacity", 1);
            let plugin = plugin(&bench, parameters);
            let metrics = Metrics { cache_blocks: reported, ..Metrics::default() };
            bench.endpoints.list()[0].set_metrics(metrics);
            let ask = |picks: &[(&str, usize)]| {
                ask(&bench, &*plugin, "approx-capacity", text(&blocks("abcdef")), picks)
            };
            ask(&[("default", 0)]);
            assert_eq!(ask(&[]).matched, [matched], "{parameters} {reported}");
        }
        check("{}", 0, 6);
        check("{}", 4, 4);
        check("{lruCapacityPerServer: 3}", 4, 4);
        check("{lruCapacityPerServer: 3}", 0, 3);
        check("{lruCapacityPerServer: 3, autoTune: false}", 4, 3);
    }

    #[test]
    fn prompts_of_one_request_are_matched_apart() {
        let bench = Bench::new("approx-prompts", 1);
        let plugin = plugin(&bench, "{}");
        let ask = |prompts: &[&str], picks: &[(&str, usize)]| {
            let list: Vec<String> = prompts.iter().map(|letters| blocks(letters)).collect();
            let request = request(PromptForm::Texts, &format!("{list:?}"));
            ask(&bench, &*plugin, "approx-prompts", request, picks)
        };
        assert_eq!(ask(&["ab", "xyz"], &[("default", 0)]).total, 5);
        assert_eq!(ask(&["xyw", "abc", "q"], &[]).matched, [4]);
        let one = text(&blocks("abx"));
        assert_eq!(self::ask(&bench, &*plugin, "approx-prompts", one, &[]).matched, [2]);
    }

    #[test]
    fn real_tokens_go_before_text() {
        let bench = Bench::new("approx-tokens", 1);
        let plugin = plugin(&bench, "{}");
        let tokens: Vec<u32> = (0..200).collect();
        let mut run = Run::new(&bench.endpoints, text("a text"));
        run.produced.tokens = Some(crate::epp::scheduling::testing::exact_tokens(&tokens));
        run.produce(&*plugin);
        assert_eq!(run.produced.prefix("approx-tokens").unwrap().total, 4);
        run.route(&*plugin, &[("default", 0)]);
        // The same tokens in the body.
        for (form, prompt) in [
            (PromptForm::Tokens, format!("{tokens:?}")),
            (PromptForm::TokenLists, format!("[{tokens:?}]")),
        ] {
            let got = ask(&bench, &*plugin, "approx-tokens", request(form, &prompt), &[]);
            assert_eq!((got.total, got.matched), (4, vec![4]), "{form:?}");
        }
    }

    #[test]
    fn tools_salts_and_models_are_part_of_the_prefix() {
        let bench = Bench::new("approx-roots", 1);
        let plugin = plugin(&bench, "{}");
        let ask = |change: &dyn Fn(&mut InferenceRequest), picks: &[(&str, usize)]| {
            let mut request = text(&blocks("ab"));
            change(&mut request);
            ask(&bench, &*plugin, "approx-roots", request, picks).matched[0]
        };
        ask(&|_| (), &[("default", 0)]);
        assert_eq!(ask(&|_| (), &[]), 2);
        assert_eq!(ask(&|request| request.target_model = Arc::from("other"), &[]), 0);
        assert_eq!(ask(&|request| request.parsed.cache_salt = Some("s".to_owned()), &[]), 0);
        assert_eq!(ask(&|request| request.parsed.tools = Some(0..9), &[]), 0);
        // The model that serves counts, not the one that was asked for.
        assert_eq!(ask(&|request| request.parsed.model = "other".to_owned(), &[]), 2);
    }

    #[test]
    fn hits_are_counted_under_both_names() {
        let bench = Bench::new("approx-metrics", 2);
        let plugin = plugin(&bench, "{}");
        for pod in [0, 0, 1] {
            ask(&bench, &*plugin, "approx-metrics", text(&blocks("ab")), &[("default", pod)]);
        }
        let labels = "plugin_name=\"approx-metrics\",plugin_type=\"approx-prefix-cache-producer\"";
        let text = encode(&bench.registry).unwrap();
        for line in [
            format!("llm_d_epp_prefix_indexer_size{{{labels}}} 4\n"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_bucket{{{labels},le=\"0\"}} 2\n"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_sum{{{labels}}} 1\n"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_count{{{labels}}} 3\n"),
            format!("llm_d_epp_prefix_indexer_hit_bytes_sum{{{labels}}} 512\n"),
            "# TYPE inference_extension_prefix_indexer_size gauge\n".to_owned(),
            "# TYPE inference_extension_prefix_indexer_hit_ratio histogram\n".to_owned(),
            "# TYPE inference_extension_prefix_indexer_hit_bytes histogram\n".to_owned(),
        ] {
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn wrong_parameters_are_named() {
        let bench = Bench::new("approx-wrong", 0);
        let check = |parameters, want| bench.refuses(REGISTRATION.factory, parameters, want);
        check("{autoTune: false, blockSizeTokens: 0}", "blockSizeTokens: must be greater than 0");
        check("{maxPrefixTokensToMatch: -1}", "maxPrefixTokensToMatch: -1 is out of range");
        check("{hashBlockSize: 64}", "hashBlockSize: unknown field");
        check("{blockSizeToken: 64}", "did you mean `blockSizeTokens`?");
    }

    #[test]
    fn defaults_are_the_go_epps() {
        let bench = Bench::new("approx-defaults", 0);
        let reader = crate::support::fields::Reader::new(serde_json::json!({}).into());
        let params = reader.root();
        let sizing = read(&params);
        params.finish();
        let want = Sizing {
            auto_tune: true,
            block_bytes: 64,
            least_block_bytes: 256,
            limit: Limit::Bytes(524_288),
            tokens: true,
            capacity: 31_250,
        };
        assert_eq!(sizing, want);
        let (_, warnings) = bench
            .try_build(REGISTRATION.factory, "{blockSize: 100, maxPrefixTokensToMatch: 50}")
            .unwrap();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
    }
}
