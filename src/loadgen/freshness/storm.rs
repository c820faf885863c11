//! Bursts of events without engines.
//!
//! Each publisher is a pod of its own with a cache that never computes: chains of blocks are stored
//! and the oldest removed, so that what the pod should hold is known at any time. Events of a burst are
//! encoded ahead, in the pauses of the steady stream, so that a burst leaves at once.
//!
//! | module | what it is for |
//! | --- | --- |
//! | `cache` | what a publisher holds, and its next message |
//! | `play` | the thread that publishes |

pub(super) mod cache;
pub(super) mod play;

use std::{fmt, str::FromStr, time::Duration};

use crate::wire::encode::Form;

/// What is injected: `publishers=4,rate=20000,burst=50000,interval=5s,…`. See
/// [`Display`](fmt::Display) for all names; what is not named has its default.
#[derive(Clone, Debug, PartialEq)]
pub struct StormOptions {
    /// Pods that publish, 1 to 64.
    pub publishers: usize,
    /// Blocks stored and removed per second all the time, all publishers together; 0 = none.
    pub rate: f64,
    /// Blocks stored and removed in each burst, all publishers together; 0 = none.
    pub burst: u64,
    /// From burst to burst; the first comes after one interval.
    pub interval: Duration,
    /// Blocks per event, 1 to 1 024.
    pub batch: usize,
    /// Events per message, 1 to 256.
    pub events: usize,
    /// Share of the events that remove, 0 to 1; what there is to remove limits it.
    pub removes: f64,
    /// How events are laid out: `map` or `array`.
    pub form: Form,
    /// Hashes as 32 bytes instead of integers.
    pub bytes: bool,
    /// Blocks that a publisher holds at most; beyond that it only removes.
    pub cap: usize,
    /// Of the random numbers.
    pub seed: u64,
    /// What goes wrong.
    pub faults: Faults,
}

/// What goes wrong: probabilities per message.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// The message is lost on its way; a replay has it.
    pub gap: f64,
    /// It comes twice.
    pub duplicate: f64,
    /// It comes after its successor.
    pub reorder: f64,
    /// The publisher starts again, empty, before it.
    pub restart: f64,
    /// The publisher clears its cache instead.
    pub clear: f64,
}

impl Faults {
    fn by_name(&mut self, name: &str) -> Option<&mut f64> {
        Some(match name {
            "gap" => &mut self.gap,
            "duplicate" => &mut self.duplicate,
            "reorder" => &mut self.reorder,
            "restart" => &mut self.restart,
            "clear" => &mut self.clear,
            _ => return None,
        })
    }

    fn named(self) -> [(&'static str, f64); 5] {
        [
            ("gap", self.gap),
            ("duplicate", self.duplicate),
            ("reorder", self.reorder),
            ("restart", self.restart),
            ("clear", self.clear),
        ]
    }
}

impl Default for StormOptions {
    fn default() -> Self {
        Self {
            publishers: 4,
            rate: 20_000.0,
            burst: 50_000,
            interval: Duration::from_secs(5),
            batch: 32,
            events: 1,
            removes: 0.3,
            form: Form::Map,
            bytes: false,
            cap: 200_000,
            seed: 1,
            faults: Faults::default(),
        }
    }
}

impl FromStr for StormOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Self::default();
        let mut in_faults = false;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            // Faults are parted by commas, too.
            if in_faults && !part.contains('=') {
                options.fault(part)?;
                continue;
            }
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("{part:?} is not NAME=VALUE"))?;
            in_faults = name == "faults";
            match name {
                "publishers" => options.publishers = number(name, value, 1.0, 64.0)? as usize,
                "rate" => options.rate = number(name, value, 0.0, 1e8)?,
                "burst" => options.burst = number(name, value, 0.0, 1e7)? as u64,
                "interval" => options.interval = duration(value)?,
                "batch" => options.batch = number(name, value, 1.0, 1_024.0)? as usize,
                "events" => options.events = number(name, value, 1.0, 256.0)? as usize,
                "removes" => options.removes = number(name, value, 0.0, 1.0)?,
                "cap" => options.cap = number(name, value, 1.0, 1e7)? as usize,
                "seed" => options.seed = number(name, value, 0.0, 1e15)? as u64,
                "form" => {
                    options.form = match value {
                        "map" => Form::Map,
                        "array" => Form::Array,
                        _ => return Err(format!("form: {value:?} is neither map nor array")),
                    };
                }
                "hashes" => {
                    options.bytes = match value {
                        "int" => false,
                        "bytes" => true,
                        _ => return Err(format!("hashes: {value:?} is neither int nor bytes")),
                    };
                }
                "faults" if value.is_empty() => {}
                "faults" => options.fault(value)?,
                _ => {
                    return Err(format!(
                        "{name:?} is none of publishers, rate, burst, interval, batch, events, \
                         removes, form, hashes, cap, seed and faults"
                    ));
                }
            }
        }
        Ok(options)
    }
}

impl StormOptions {
    fn fault(&mut self, text: &str) -> Result<(), String> {
        let (name, value) =
            text.split_once(':').ok_or_else(|| format!("faults: {text:?} is not NAME:SHARE"))?;
        let Some(share) = self.faults.by_name(name) else {
            return Err(format!(
                "faults: {name:?} is none of gap, duplicate, reorder, restart and clear"
            ));
        };
        *share = number(name, value, 0.0, 0.5)?;
        Ok(())
    }

    /// Blocks of one message.
    pub(super) fn message_blocks(&self) -> u64 {
        (self.batch * self.events) as u64
    }
}

fn number(name: &str, value: &str, least: f64, most: f64) -> Result<f64, String> {
    let number: f64 = value.parse().map_err(|_| format!("{name}: {value:?} is no number"))?;
    if !(least..=most).contains(&number) {
        return Err(format!("{name}: {value} is not within {least} to {most}"));
    }
    Ok(number)
}

/// `500ms`, `5s` or a number of seconds; 10 ms to an hour.
fn duration(value: &str) -> Result<Duration, String> {
    let (digits, unit) = match (value.strip_suffix("ms"), value.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1e-3),
        (None, Some(digits)) => (digits, 1.0),
        (None, None) => (value, 1.0),
    };
    let seconds = number("interval", digits, 0.0, 3.6e6)? * unit;
    if !(0.01..=3_600.0).contains(&seconds) {
        return Err(format!("interval: {value} is not within 10ms to 3600s"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

impl fmt::Display for StormOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = if self.form == Form::Map { "map" } else { "array" };
        let hashes = if self.bytes { "bytes" } else { "int" };
        write!(
            f,
            "publishers={},rate={},burst={},interval={}ms,batch={},events={},removes={},form={form},\
             hashes={hashes},cap={},seed={}",
            self.publishers,
            self.rate,
            self.burst,
            self.interval.as_secs_f64() * 1e3,
            self.batch,
            self.events,
            self.removes,
            self.cap,
            self.seed,
        )?;
        let faults = self.faults.named().into_iter().filter(|(_, share)| *share > 0.0);
        for (at, (name, share)) in faults.enumerate() {
            write!(f, "{}{name}:{share}", if at == 0 { ",faults=" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str) -> StormOptions {
        let options: StormOptions = text.parse().unwrap();
        assert_eq!(options.to_string().parse(), Ok(options.clone()), "{options}");
        options
    }

    #[test]
    fn options_are_read_and_written() {
        assert_eq!(check(""), StormOptions::default());
        let all = check(
            "publishers=2,rate=0,burst=100,interval=250ms,batch=4,events=3,removes=0.5,form=array,\
             hashes=bytes,cap=99,seed=7,faults=gap:0.01,restart:0.002",
        );
        assert_eq!((all.publishers, all.burst, all.batch, all.events), (2, 100, 4, 3));
        assert_eq!((all.form, all.bytes, all.seed), (Form::Array, true, 7));
        assert_eq!(all.interval, Duration::from_millis(250));
        assert_eq!((all.faults.gap, all.faults.restart, all.faults.clear), (0.01, 0.002, 0.0));
        assert_eq!(check("faults=gap:0.1,clear:0.2,rate=5").rate, 5.0);
    }

    #[track_caller]
    fn refused(text: &str, part: &str) {
        let error = text.parse::<StormOptions>().unwrap_err();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("publishers", "\"publishers\" is not NAME=VALUE");
        refused("banana=1", "\"banana\" is none of publishers, ");
        refused("rate=fast", "rate: \"fast\" is no number");
        refused("rate=-1", "rate: -1 is not within 0 to");
        refused("rate=NaN", "rate: NaN is not within");
        refused("publishers=0", "publishers: 0 is not within 1 to 64");
        refused("interval=1ms", "interval: 1ms is not within");
        refused("form=xml", "form: \"xml\" is neither");
        refused("hashes=md5", "hashes: \"md5\" is neither");
        refused("faults=gap", "faults: \"gap\" is not NAME:SHARE");
        refused("faults=fire:0.1", "faults: \"fire\" is none of gap, ");
        refused("faults=gap:0.1,clear:0.9", "clear: 0.9 is not within 0 to 0.5");
    }
}
