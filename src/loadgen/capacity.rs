//! Published results of routing policies on fleets, and what our model of an engine says of the same
//! traffic.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`published`] | the tables, and the fleets and the traffic that they are of |
//! | [`simulation`] | a fleet of [`Scheduler`](super::engine::scheduler::Scheduler)s in virtual time |
//! | [`choice`] | who gets a request, by each policy |
//! | `measured` | reports of the same traffic on processes, in the tables' units |
//! | [`command`] | `loadgen capacity`: a table beside either |
//!
//! # Model
//!
//! The engines are those of [`engine`](super::engine), cache, scheduling and preemption included; only
//! time is simulated. What has to be assumed of the hardware is [`Constants`]: four numbers, found on one
//! published table and then kept.

pub mod choice;
pub mod command;
mod measured;
pub mod published;
pub mod simulation;

use self::published::Study;
use super::{
    engine::Pace,
    stack::{
        fleet::FleetOptions,
        policy::{APPROXIMATE_BLOCK, ApproximateLimits},
    },
};

/// Tokens that an engine computes in one step at most, as vLLM on an H100.
const STEP_TOKENS: f64 = 8_192.0;
/// Requests that it runs at once at most, likewise.
const SEQUENCES: usize = 1_024;
/// Tokens per block of the published fleets.
const BLOCK: f64 = 64.0;
/// Shorter steps, milliseconds, would cost more than they show: to wake up takes a tenth of one.
const SHORTEST_STEP_MS: f64 = 2.0;
/// The shortest block that vLLM has by default.
const SHORTEST_BLOCK: usize = 16;

/// What the hardware needs: a pair of H100 with a model of 32.8 billion parameters.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Constants {
    /// Fixed time of a request before it is queued: gateway, picker, HTTP, tokenizer; milliseconds.
    pub request_ms: f64,
    /// Prefill of a token that is not cached, milliseconds.
    pub prefill_ms_per_token: f64,
    /// A step in which requests decode, milliseconds.
    pub decode_ms_per_step: f64,
    /// The same, further for each of them, milliseconds.
    pub decode_ms_per_sequence: f64,
}

impl Default for Constants {
    /// Found on the 73 % table: of twenty sets in a coarse grid the one with the least mean error of
    /// logarithms, TTFT p90 and output tokens together, over random, approximate and precise at five rates.
    /// The fixed time is taken from warm requests there and was not varied.
    fn default() -> Self {
        Self {
            request_ms: 200.0,
            prefill_ms_per_token: 0.06,
            decode_ms_per_step: 24.0,
            decode_ms_per_sequence: 0.35,
        }
    }
}

impl Constants {
    /// For hardware that has this many times as many parameters per GPU: what computes takes so much
    /// longer, and what does not stays.
    #[must_use]
    pub fn for_model(self, factor: f64) -> Self {
        Self {
            request_ms: self.request_ms,
            prefill_ms_per_token: self.prefill_ms_per_token * factor,
            decode_ms_per_step: self.decode_ms_per_step * factor,
            decode_ms_per_sequence: self.decode_ms_per_sequence * factor,
        }
    }

    /// The same for prompts and answers that have `scale_tokens` times as many tokens, so that requests and
    /// steps take as long as before, on engines that are `speed` times as fast as real ones. Where steps would
    /// become shorter than two milliseconds there are fewer, longer ones.
    #[must_use]
    pub fn pace(self, scale_tokens: f64, speed: f64) -> Pace {
        let token_ms = self.decode_ms_per_step / scale_tokens / speed;
        let steps =
            (1.0 / scale_tokens).round().min((token_ms / SHORTEST_STEP_MS).floor()).max(1.0);
        // 1 where the scale is one over a whole number, and steps are long enough.
        let rest = 1.0 / scale_tokens / steps;
        Pace {
            request_us: self.request_ms * 1e3,
            step_us: 0.0,
            prefill_us_per_token: self.prefill_ms_per_token * 1e3 / scale_tokens,
            decode_us_per_step: self.decode_ms_per_step * 1e3 * rest,
            decode_us_per_sequence: self.decode_ms_per_sequence * 1e3 * rest,
            steps_per_token: steps as u32,
            scale: 1.0 / speed,
        }
    }
}

/// Engines with the published constants, for `scale_tokens` times as many tokens, `speed` times as fast.
///
/// A step's budget shrinks with the tokens, so that it takes as long as before. How many engines there are
/// and how much they hold is that of [`FleetOptions::default`].
#[must_use]
pub fn engines(scale_tokens: f64, speed: f64) -> FleetOptions {
    FleetOptions {
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: ((STEP_TOKENS * scale_tokens) as usize).max(1),
        pace: Constants::default().pace(scale_tokens, speed),
        ..FleetOptions::default()
    }
}

/// The engines of a published fleet with caches for `scale_tokens` times as many tokens; blocks do not get
/// shorter than 16 tokens.
#[must_use]
pub fn fleet(study: &Study, scale_tokens: f64, speed: f64) -> FleetOptions {
    let block_size = ((BLOCK * scale_tokens) as usize).max(SHORTEST_BLOCK);
    let tokens = f64::from(study.kv_tokens) * scale_tokens;
    FleetOptions {
        engines: study.pods,
        block_size,
        // One more: the null block holds nothing.
        num_gpu_blocks: (tokens / block_size as f64) as u32 + 1,
        pace: Constants::default().for_model(study.factor()).pace(scale_tokens, speed),
        ..engines(scale_tokens, speed)
    }
}

/// What the published approximate policy looked at and remembered, for `scale_tokens` times as many tokens
/// and engines with blocks of `block_size`.
#[must_use]
pub fn approximate(scale_tokens: f64, block_size: usize) -> ApproximateLimits {
    let block = block_size.max(APPROXIMATE_BLOCK) as f64;
    let blocks = |tokens: f64| ((tokens * scale_tokens / block) as usize).max(1);
    ApproximateLimits {
        prompt: blocks(choice::APPROXIMATE_TOKENS),
        endpoint: blocks(choice::APPROXIMATE_CAPACITY),
    }
}

#[cfg(test)]
mod tests {
    use super::{published::STUDY_73, *};

    #[test]
    fn steps_take_as_long_with_fewer_tokens() {
        #[track_caller]
        fn check(scale: f64, speed: f64, steps: u32) {
            let pace = Constants::default().pace(scale, speed);
            assert_eq!(pace.steps_per_token, steps);
            let near = |value: f64, expected: f64| {
                assert!((value / expected - 1.0).abs() < 1e-9, "{value}, not {expected}");
            };
            // The same time for a prompt and for an answer, of `scale` times as many tokens.
            near(pace.prefill_us_per_token * scale, 60.0);
            let steps = f64::from(steps) * scale;
            near(pace.decode_us_per_step * steps, 24_000.0);
            near(pace.decode_us_per_sequence * steps, 350.0);
        }
        check(1.0, 1.0, 1);
        check(0.1, 1.0, 10);
        check(0.1, 10.0, 10);
        check(0.1, 25.0, 4);
        check(0.1, 1_000.0, 1);
        check(0.3, 1.0, 3);
        check(0.05, 1.0, 20);
        check(2.0, 1.0, 1);
    }

    #[test]
    fn a_published_fleet_keeps_its_shape_when_scaled() {
        let fleet = fleet(&STUDY_73, 0.1, 6.0);
        assert_eq!((fleet.engines, fleet.block_size, fleet.num_gpu_blocks), (8, 16, 1_921));
        assert_eq!((fleet.max_num_batched_tokens, fleet.max_num_seqs), (819, 1_024));
        let limits = ApproximateLimits { prompt: 6, endpoint: 781 };
        assert_eq!(approximate(0.1, fleet.block_size), limits);
        assert_eq!(approximate(1.0, 64), ApproximateLimits { prompt: 64, endpoint: 7_812 });
    }
}
