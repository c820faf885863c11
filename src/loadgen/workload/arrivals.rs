//! When requests come.
//!
//! # Model
//!
//! A base process, and bursts over it. Everything comes from one generator before anything is sent, so
//! that a schedule does not depend on threads, and what was asked for can be checked: [`dispersion`] is 0
//! for a constant rate, 1 for a Poisson process, about cv² for gamma-distributed gaps.

use std::{fmt, str::FromStr, time::Duration};

use fastrand::Rng;

use super::{
    random,
    text::{Fields, Written, number, some_time, unknown, whole},
};

/// Arrivals of a schedule at most; [`Arrivals::times`] ends there.
pub const MAX_ARRIVALS: usize = 10_000_000;
/// Windows over which [`dispersion`] is customarily given.
pub const DISPERSION_WINDOWS: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_millis(500), Duration::from_secs(1)];
/// Highest rate, requests per second.
const MAX_RATE: f64 = 1e6;

/// One arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// From the start of the run.
    pub at: Duration,
    /// Which burst it belongs to, from 0; `None` between bursts.
    pub burst: Option<u32>,
}

/// A base process. Rates are requests per second, 0 to 10^6; 0 = nothing comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Process {
    /// Equal gaps; the first request comes at 0.
    Constant {
        /// The rate.
        rate: f64,
    },
    /// Exponential gaps.
    Poisson {
        /// The mean rate.
        rate: f64,
    },
    /// Gamma-distributed gaps.
    Gamma {
        /// The mean rate.
        rate: f64,
        /// Coefficient of variation of the gaps, 0.01 to 20: below 1 more regular than Poisson, above 1
        /// more irregular.
        cv: f64,
    },
    /// A Poisson process that changes between two rates after exponentially distributed times.
    OnOff {
        /// The rate while it is on.
        rate: f64,
        /// The rate while it is off.
        idle: f64,
        /// How long it is on, in the mean.
        on: Duration,
        /// How long it is off, in the mean.
        off: Duration,
    },
}

/// Requests that come at exactly the same instant, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bursts {
    /// Requests of a burst, at least 1.
    pub size: u32,
    /// From one burst to the next, above 0.
    pub interval: Duration,
    /// When the first one is.
    pub first: Duration,
}

/// A process of arrivals, seeded: one generator, computed before the start. Its text form is
/// `constant:50`, `poisson:20`, `gamma:rate=20,cv=2` or `onoff:rate=20,on=1s,off=3s[,idle=1]`, and with
/// bursts `poisson:20+bursts:size=200,every=5s[,first=1s]`; the first burst is otherwise one interval
/// after the start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrivals {
    /// What comes between bursts.
    pub process: Process,
    /// Bursts over it.
    pub bursts: Option<Bursts>,
}

impl From<Process> for Arrivals {
    fn from(process: Process) -> Self {
        Self { process, bursts: None }
    }
}

impl Process {
    /// Mean rate, requests per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        match self {
            Self::Constant { rate } | Self::Poisson { rate } | Self::Gamma { rate, .. } => *rate,
            Self::OnOff { rate, idle, on, off } => {
                let (on, off) = (on.as_secs_f64(), off.as_secs_f64());
                (rate * on + idle * off) / (on + off)
            }
        }
    }

    /// Seconds of arrivals below `end`, handed to `push` in order until it says no.
    fn draw(&self, rng: &mut Rng, end: f64, mut push: impl FnMut(f64) -> bool) {
        match *self {
            Self::Constant { rate } if rate > 0.0 => {
                let mut count = 0.0;
                while count / rate < end && push(count / rate) {
                    count += 1.0;
                }
            }
            Self::Poisson { rate } if rate > 0.0 => {
                let mut at = random::exponential(rng) / rate;
                while at < end && push(at) {
                    at += random::exponential(rng) / rate;
                }
            }
            Self::Gamma { rate, cv } if rate > 0.0 => {
                let shape = cv.powi(-2);
                // We come in the middle of a gap, and rather of a long one than of a short one: the
                // rate is right from the start. The longer gaps' density gives a shape one higher.
                let mut at = rng.f64() * random::gamma(rng, shape + 1.0) / (shape * rate);
                while at < end && push(at) {
                    at += random::gamma(rng, shape) / (shape * rate);
                }
            }
            Self::OnOff { rate, idle, on, off } => {
                let (on, off) = (on.as_secs_f64(), off.as_secs_f64());
                let mut is_on = rng.f64() * (on + off) < on;
                let mut changes = 0.0;
                let mut at = 0.0;
                while at < end {
                    changes += random::exponential(rng) * if is_on { on } else { off };
                    let rate = if is_on { rate } else { idle };
                    // Without memory: what is left of a gap at a change is drawn anew.
                    loop {
                        // At no rate the gap has no end.
                        at += random::exponential(rng) / rate;
                        if at >= changes.min(end) {
                            break;
                        }
                        if !push(at) {
                            return;
                        }
                    }
                    at = changes;
                    is_on = !is_on;
                }
            }
            _ => {}
        }
    }
}

impl Arrivals {
    /// Adds bursts of `size` requests every `interval`, the first one after one interval; a size or an
    /// interval of 0 adds none.
    #[must_use]
    pub fn with_bursts(self, size: u32, interval: Duration) -> Self {
        let some = size > 0 && !interval.is_zero();
        Self { bursts: some.then_some(Bursts { size, interval, first: interval }), ..self }
    }

    /// Mean rate with bursts, requests per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let bursts = |it: Bursts| f64::from(it.size) / it.interval.as_secs_f64();
        self.process.rate() + self.bursts.map_or(0.0, bursts)
    }

    /// Arrivals from 0 to `duration`, in order, [`MAX_ARRIVALS`] at most; one that a caller would refuse
    /// to do without is foreseen by [`Self::rate`].
    #[must_use]
    pub fn times(&self, seed: u64, duration: Duration) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        self.process.draw(&mut Rng::with_seed(seed), duration.as_secs_f64(), |seconds| {
            arrivals.push(Arrival { at: Duration::from_secs_f64(seconds), burst: None });
            arrivals.len() < MAX_ARRIVALS
        });
        if let Some(Bursts { size, interval, first }) = self.bursts {
            let mut at = first;
            for burst in 0.. {
                if at >= duration || arrivals.len() + size as usize > 2 * MAX_ARRIVALS {
                    break;
                }
                arrivals.extend((0..size).map(|_| Arrival { at, burst: Some(burst) }));
                at += interval.max(Duration::from_nanos(1));
            }
            arrivals.sort_by_key(|arrival| arrival.at);
            arrivals.truncate(MAX_ARRIVALS);
        }
        // Rounding may put one on the end itself.
        arrivals.truncate(arrivals.partition_point(|arrival| arrival.at < duration));
        arrivals
    }
}

/// Index of dispersion of counts: variance by mean of the arrivals in each whole window of `duration`.
/// `None` with fewer than two windows or without arrivals in them.
#[must_use]
pub fn dispersion(arrivals: &[Arrival], duration: Duration, window: Duration) -> Option<f64> {
    let windows = duration.as_nanos().checked_div(window.as_nanos())?;
    let windows =
        usize::try_from(windows).ok().filter(|windows| (2..=1 << 24).contains(windows))?;
    let mut counts = vec![0_u32; windows];
    for arrival in arrivals {
        let at = usize::try_from(arrival.at.as_nanos() / window.as_nanos()).unwrap_or(usize::MAX);
        if let Some(count) = counts.get_mut(at) {
            *count += 1;
        }
    }
    let mean = counts.iter().copied().map(f64::from).sum::<f64>() / windows as f64;
    let square = |count: &u32| (f64::from(*count) - mean).powi(2);
    let variance = counts.iter().map(square).sum::<f64>() / (windows - 1) as f64;
    (mean > 0.0).then(|| variance / mean)
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (base, bursts) = match text.split_once("+bursts:") {
            Some((base, bursts)) => (base, Some(bursts)),
            None => (text, None),
        };
        let mut fields = Fields::read(base)?;
        let rate = |fields: &mut Fields<'_>| match fields.with("", number(0.0, MAX_RATE))? {
            Some(rate) => Ok(rate),
            None => fields.need("rate", number(0.0, MAX_RATE)),
        };
        let process = match fields.name {
            "constant" => Process::Constant { rate: rate(&mut fields)? },
            "poisson" => Process::Poisson { rate: rate(&mut fields)? },
            "gamma" => Process::Gamma {
                rate: rate(&mut fields)?,
                cv: fields.need("cv", number(0.01, 20.0))?,
            },
            "onoff" => Process::OnOff {
                rate: rate(&mut fields)?,
                idle: fields.with("idle", number(0.0, MAX_RATE))?.unwrap_or(0.0),
                on: fields.need("on", some_time)?,
                off: fields.need("off", some_time)?,
            },
            other => {
                let known = ["constant", "poisson", "gamma", "onoff"];
                return Err(unknown("process of arrivals", other, known.into_iter()));
            }
        };
        fields.end()?;
        let bursts = bursts.map(|text| {
            let text = format!("bursts:{text}");
            let mut fields = Fields::read(&text)?;
            let size = fields.need("size", whole(1, MAX_ARRIVALS as u32))?;
            let interval = fields.need("every", some_time)?;
            let first = fields.with("first", crate::support::units::duration)?.unwrap_or(interval);
            fields.end().map(|()| Bursts { size, interval, first })
        });
        Ok(Self { process, bursts: bursts.transpose()? })
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Process::Constant { rate } => write!(f, "constant:{rate}")?,
            Process::Poisson { rate } => write!(f, "poisson:{rate}")?,
            Process::Gamma { rate, cv } => write!(f, "gamma:rate={rate},cv={cv}")?,
            Process::OnOff { rate, idle, on, off } => {
                write!(f, "onoff:rate={rate},on={},off={}", Written(*on), Written(*off))?;
                if *idle > 0.0 {
                    write!(f, ",idle={idle}")?;
                }
            }
        }
        if let Some(Bursts { size, interval, first }) = self.bursts {
            write!(f, "+bursts:size={size},every={}", Written(interval))?;
            if first != interval {
                write!(f, ",first={}", Written(first))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
