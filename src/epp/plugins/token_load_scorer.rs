//! `token-load-scorer`: prefers endpoints with few tokens still to compute.
//!
//! # Formula
//!
//! ```text
//! t     = tokens in flight to the endpoint + tokens that this request would add
//! score = t = 0 ? 1 : 1 − min(t, T) / T
//! ```
//!
//! with `T` = `queueThresholdTokens` (4 194 304, 128 requests of 32 Ki tokens; 0 and less mean the
//! default). Both numbers are those of the `inflight-load-producer` that `inFlightLoadProducerName` names,
//! or of the first one. No data: 1.

use std::sync::Arc;

use crate::{
    epp::{
        plugins::{Building, Registration, Stability, inflight_load_producer::load_producer},
        scheduling::{Cycle, DataKey, Plugin, Scorer},
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

const TYPE: &str = "token-load-scorer";
const DEFAULT_THRESHOLD: f64 = 4_194_304.0;

/// See the [module](self).
#[derive(Debug)]
pub struct TokenLoadScorer {
    threshold: f64,
    producer: Arc<str>,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let threshold = params.signed("queueThresholdTokens", i64::MIN..=i64::MAX);
    let threshold = threshold.filter(|&tokens| tokens > 0).map(|tokens| tokens as f64);
    let producer = load_producer(params, building)?;
    let threshold = threshold.unwrap_or(DEFAULT_THRESHOLD);
    Some(Arc::new(TokenLoadScorer { threshold, producer }))
}

impl Plugin for TokenLoadScorer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }

    fn consumes(&self) -> Vec<DataKey> {
        vec![DataKey::InFlight(Arc::clone(&self.producer))]
    }
}

impl Scorer for TokenLoadScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let load = cycle.produced.in_flight(&self.producer);
        for (&endpoint, score) in among.iter().zip(scores) {
            let of = |tokens: &[u64]| tokens.get(endpoint).copied().unwrap_or(0);
            let tokens =
                load.map_or(0, |load| of(&load.tokens).saturating_add(of(&load.request_tokens)));
            *score = 1.0 - (tokens as f64).min(self.threshold) / self.threshold;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        plugins::prefix::testing::{Bench, Run, text},
        scheduling::InFlight,
    };

    #[test]
    fn scores_are_the_formulas() {
        #[track_caller]
        fn check(parameters: &str, load: Option<(&[u64], &[u64])>, want: &[f64]) {
            let bench = Bench::new("token-load", want.len() as u8);
            let scorer = bench.build(REGISTRATION.factory, parameters).unwrap();
            let mut run = Run::new(&bench.endpoints, text("x"));
            if let Some((tokens, request_tokens)) = load {
                let load = InFlight {
                    requests: vec![1; tokens.len()],
                    tokens: tokens.to_vec(),
                    request_tokens: request_tokens.to_vec(),
                };
                run.produced.set_in_flight(&Arc::from("inflight-load-producer"), load);
            }
            for (got, want) in run.score(&*scorer).iter().zip(want) {
                assert!((got - want).abs() < 1e-9, "{got} is not {want}");
            }
        }
        let thousand = "{queueThresholdTokens: 1000}";
        check(thousand, Some((&[0, 500, 1000], &[])), &[1.0, 0.5, 0.0]);
        check(thousand, Some((&[0, 250, 750], &[250, 250, 250])), &[0.75, 0.5, 0.0]);
        check(thousand, Some((&[2000, u64::MAX], &[1, 1])), &[0.0, 0.0]);
        check(thousand, None, &[1.0]);
        for default in ["{}", "{queueThresholdTokens: 0}", "{queueThresholdTokens: -5}"] {
            check(default, Some((&[2_097_152], &[])), &[0.5]);
        }
    }

    #[test]
    fn wrong_parameters_are_named() {
        let bench = Bench::new("token-load-wrong", 0);
        let check = |parameters, want| bench.refuses(REGISTRATION.factory, parameters, want);
        check("{queueThresholdToken: 1}", "did you mean `queueThresholdTokens`?");
        check("{inFlightLoadProducerName: nobody}", "inFlightLoadProducerName: there is no plugin");
    }
}
