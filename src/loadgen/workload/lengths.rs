//! How long prompts and answers are.

use std::{fmt, str::FromStr};

use fastrand::Rng;

use super::{random, text};

/// Tokens of a part or an answer at most.
pub const MAX_TOKENS: u32 = 1 << 24;

/// A distribution of lengths, tokens. Its text form is `6000`, `uniform(10,20)`, `normal(6000,500)` or
/// `lognormal(2000,1500)`; the latter two take `min=` and `max=` as well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
    /// Each length from the first to the second, both included, equally often.
    Uniform(u32, u32),
    /// Normal, rounded.
    Normal(Spread),
    /// The exponential of a normal distribution, rounded.
    LogNormal(Spread),
}

/// Moments of a distribution of lengths, tokens, before its ends are cut off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean of the lengths themselves, for [`Lengths::LogNormal`] too; at least 1.
    pub mean: f64,
    /// Their standard deviation, 0 or more.
    pub sd: f64,
    /// What is shorter becomes this, at least 1.
    pub min: u32,
    /// What is longer becomes this, at most [`MAX_TOKENS`].
    pub max: u32,
}

impl Spread {
    fn cut(&self, length: f64) -> f64 {
        length.clamp(f64::from(self.min), f64::from(self.max.max(self.min)))
    }
}

impl Lengths {
    /// A length times `scale`, rounded, at least 1.
    #[must_use]
    pub fn draw(&self, rng: &mut Rng, scale: f64) -> u32 {
        let length = match self {
            Self::Fixed(tokens) => f64::from(*tokens),
            Self::Uniform(from, to) => f64::from(rng.u32(*from..=(*to).max(*from))),
            Self::Normal(it) => it.cut(it.mean + it.sd * random::normal(rng)),
            Self::LogNormal(it) => {
                let variance = (it.sd / it.mean).powi(2).ln_1p();
                let log = it.mean.ln() - variance / 2.0 + variance.sqrt() * random::normal(rng);
                it.cut(log.exp())
            }
        };
        // A cast of a float saturates.
        ((length * scale).round() as u32).clamp(1, MAX_TOKENS)
    }

    /// The mean, tokens, before ends are cut off.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self {
            Self::Fixed(tokens) => f64::from(*tokens),
            Self::Uniform(from, to) => f64::midpoint(f64::from(*from), f64::from(*to)),
            Self::Normal(it) | Self::LogNormal(it) => it.mean,
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let tokens = text::whole(1, MAX_TOKENS);
        let Some((name, rest)) = text.split_once('(') else { return tokens(text).map(Self::Fixed) };
        let inside = rest.strip_suffix(')').ok_or_else(|| format!("{text:?}: no ) at the end"))?;
        let (named, plain): (Vec<_>, Vec<_>) = text::split(inside).partition(|it| it.contains('='));
        let [first, second] = plain[..] else {
            return Err(format!("{text:?}: two numbers are needed, {} are there", plain.len()));
        };
        if name == "uniform" {
            let (from, to) = (tokens(first)?, tokens(second)?);
            if from > to || !named.is_empty() {
                return Err(format!("{text:?}: the smaller number first, and nothing else"));
            }
            return Ok(Self::Uniform(from, to));
        }
        let most = f64::from(MAX_TOKENS);
        let mut spread = Spread {
            mean: text::number(1.0, most)(first)?,
            sd: text::number(0.0, most)(second)?,
            min: 1,
            max: MAX_TOKENS,
        };
        for bound in named {
            match bound.split_once('=') {
                Some(("min", value)) => spread.min = tokens(value)?,
                Some(("max", value)) => spread.max = tokens(value)?,
                _ => return Err(format!("{bound:?} in {text:?} is neither min= nor max=")),
            }
        }
        if spread.min > spread.max {
            return Err(format!("{text:?}: min is above max"));
        }
        match name {
            "normal" => Ok(Self::Normal(spread)),
            "lognormal" => Ok(Self::LogNormal(spread)),
            _ => {
                let known = ["uniform", "normal", "lognormal"];
                Err(text::unknown("distribution", name, known.into_iter()))
            }
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, spread) = match self {
            Self::Fixed(tokens) => return write!(f, "{tokens}"),
            Self::Uniform(from, to) => return write!(f, "uniform({from},{to})"),
            Self::Normal(spread) => ("normal", spread),
            Self::LogNormal(spread) => ("lognormal", spread),
        };
        write!(f, "{name}({},{}", spread.mean, spread.sd)?;
        if spread.min > 1 {
            write!(f, ",min={}", spread.min)?;
        }
        if spread.max < MAX_TOKENS {
            write!(f, ",max={}", spread.max)?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, mean: f64, sd: f64) {
        let lengths: Lengths = text.parse().unwrap();
        assert_eq!(lengths.to_string(), text);
        let mut rng = Rng::with_seed(1);
        let draws: Vec<f64> = (0..50_000).map(|_| f64::from(lengths.draw(&mut rng, 1.0))).collect();
        let got = draws.iter().sum::<f64>() / draws.len() as f64;
        assert!((got - mean).abs() <= mean * 0.02, "{text}: mean {got}");
        let got = draws.iter().map(|x| (x - got).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!((got.sqrt() - sd).abs() <= sd * 0.05, "{text}: deviation {}", got.sqrt());
    }

    #[test]
    fn lengths_have_the_moments_that_are_asked_for() {
        check("6000", 6000.0, 0.0);
        check("uniform(10,20)", 15.0, 10_f64.sqrt());
        check("normal(6000,500)", 6000.0, 500.0);
        check("lognormal(2000,1500)", 2000.0, 1500.0);
        check("normal(6000,0,min=7000)", 7000.0, 0.0);
        check("lognormal(6000,0,min=2,max=500)", 500.0, 0.0);
    }

    #[test]
    fn a_scale_leaves_at_least_one_token() {
        let mut rng = Rng::with_seed(1);
        assert_eq!(Lengths::Fixed(6000).draw(&mut rng, 0.1), 600);
        assert_eq!(Lengths::Fixed(3).draw(&mut rng, 0.1), 1);
        assert_eq!(Lengths::Fixed(MAX_TOKENS).draw(&mut rng, 10.0), MAX_TOKENS);
    }

    #[test]
    fn what_is_no_length_is_refused() {
        for (text, part) in [
            ("", "whole number"),
            ("0", "whole number"),
            ("-1", "whole number"),
            ("1.5", "whole number"),
            ("uniform(3,2)", "smaller number first"),
            ("uniform(3)", "two numbers"),
            ("normal(1,2,3)", "two numbers"),
            ("normal(1,2", "no )"),
            ("normal(0,2)", "no number from 1"),
            ("normal(5,-2)", "no number from 0"),
            ("normal(5,2,mim=3)", "neither min= nor max="),
            ("normal(5,2,min=9,max=8)", "min is above max"),
            ("lognormel(5,2)", "did you mean \"lognormal\""),
        ] {
            let error = text.parse::<Lengths>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
