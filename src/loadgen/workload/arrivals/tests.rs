use proptest::prelude::*;

use super::*;

fn arrivals(text: &str) -> Arrivals {
    text.parse().unwrap()
}

/// Mean rate over 2 000 s and index of dispersion in windows of `window`.
#[track_caller]
fn check(text: &str, window: Duration, rate: f64, dispersed: f64) {
    let duration = Duration::from_secs(2_000);
    let process = arrivals(text);
    let times = process.times(3, duration);
    assert!(times.is_sorted_by_key(|arrival| arrival.at), "{text}");
    assert!((process.rate() - rate).abs() < 1e-9, "{text}: {}", process.rate());
    let got = times.len() as f64 / duration.as_secs_f64();
    assert!((got - rate).abs() < 0.05 * rate, "{text}: rate {got}, not {rate}");
    let got = dispersion(&times, duration, window).unwrap();
    let bound = 0.15 * dispersed + 0.05;
    assert!((got - dispersed).abs() < bound, "{text}: dispersion {got}, not {dispersed}");
}

#[test]
fn dispersion_is_that_of_the_process() {
    let second = Duration::from_secs(1);
    check("constant:20", second, 20.0, 0.0);
    for window in DISPERSION_WINDOWS {
        check("poisson:60", window, 60.0, 1.0);
    }
    check("gamma:rate=20,cv=1", second, 20.0, 1.0);
    // cv² is the limit of long windows.
    check("gamma:rate=200,cv=2", second, 200.0, 4.0);
    check("gamma:rate=200,cv=0.5", second, 200.0, 0.25);
    // A burst in every tenth window.
    check("constant:0+bursts:size=100,every=10s,first=0", second, 10.0, 90.0);
}

#[test]
fn on_and_off_have_their_rates() {
    let process = "onoff:rate=40,on=1s,off=3s,idle=4";
    // MMPP: 1 + 2 p (1-p) (r1-r0)² / (mean · (a+b)) in long windows, a and b the rates of change.
    let (p, a, b) = (0.25, 1.0, 1.0 / 3.0);
    let limit = 1.0 + 2.0 * p * (1.0 - p) * (36_f64).powi(2) / (13.0 * (a + b));
    let duration = Duration::from_secs(100_000);
    assert!((arrivals(process).rate() - 13.0).abs() < 1e-9);
    let times = arrivals(process).times(1, duration);
    assert!((times.len() as f64 / 1_300_000.0 - 1.0).abs() < 0.02, "{}", times.len());
    let got = dispersion(&times, duration, Duration::from_secs(50)).unwrap();
    assert!((got - limit).abs() < 0.15 * limit, "{got}, not {limit}");
    assert!(arrivals("onoff:rate=40,on=1s,off=3s").times(1, Duration::from_secs(100)).len() > 300);
}

#[test]
fn bursts_come_at_one_instant_over_the_base() {
    let duration = Duration::from_secs(16);
    let process = arrivals("poisson:20").with_bursts(50, Duration::from_secs(5));
    let times = process.times(7, duration);
    for burst in 0..3 {
        let of: Vec<_> = times.iter().filter(|arrival| arrival.burst == Some(burst)).collect();
        assert_eq!(of.len(), 50);
        assert!(of.iter().all(|it| it.at == Duration::from_secs(5) * (burst + 1)));
    }
    let base: Vec<_> = times.iter().copied().filter(|it| it.burst.is_none()).collect();
    assert_eq!(base, arrivals("poisson:20").times(7, duration), "bursts change the base");
    assert_eq!(times.len(), base.len() + 150);
    assert!(times.is_sorted_by_key(|arrival| arrival.at));
    assert_eq!(process.rate(), 30.0);
    assert_eq!(arrivals("poisson:20").with_bursts(0, duration), arrivals("poisson:20"));
}

#[test]
fn a_seed_gives_one_schedule() {
    let duration = Duration::from_secs(30);
    for text in ["poisson:20", "gamma:rate=20,cv=2", "onoff:rate=20,on=1s,off=3s"] {
        let process = arrivals(text);
        assert_eq!(process.times(1, duration), process.times(1, duration));
        assert_ne!(process.times(1, duration), process.times(2, duration));
        // A longer run begins as a shorter one.
        let (short, long) = (process.times(1, duration), process.times(1, duration * 2));
        assert_eq!(short[..], long[..short.len()], "{text}");
    }
}

#[test]
fn nothing_comes_of_nothing_and_everything_ends() {
    assert!(arrivals("poisson:0").times(1, Duration::from_secs(9)).is_empty());
    assert!(arrivals("poisson:50").times(1, Duration::ZERO).is_empty());
    assert!(arrivals("onoff:rate=0,on=1s,off=1s").times(1, Duration::from_secs(9)).is_empty());
    let endless = arrivals("constant:1000000").times(1, Duration::from_secs(3_600));
    assert_eq!(endless.len(), MAX_ARRIVALS);
    assert_eq!(dispersion(&[], Duration::from_secs(9), Duration::from_secs(1)), None);
    assert_eq!(dispersion(&endless, Duration::from_secs(1), Duration::from_secs(1)), None);
    assert_eq!(dispersion(&endless, Duration::from_secs(1), Duration::ZERO), None);
}

#[test]
fn what_is_no_process_is_refused() {
    for (text, part) in [
        ("", "no process of arrivals \"\""),
        ("poison:20", "did you mean \"poisson\""),
        ("poisson", "rate is missing"),
        ("poisson:-1", "poisson: the value: \"-1\" is no number"),
        ("poisson:rate=nan", "poisson: rate: \"nan\""),
        ("poisson:1,cv=2", "no field \"cv\""),
        ("gamma:rate=20", "gamma: cv is missing"),
        ("gamma:rate=20,cv=0", "gamma: cv: \"0\""),
        ("onoff:rate=20,on=1,off=3s", "onoff: on: \"1\" is no duration"),
        ("onoff:rate=20,on=0,off=3s", "not above 0"),
        ("poisson:1+bursts:size=0,every=1s", "bursts: size: \"0\""),
        ("poisson:1+bursts:size=5", "bursts: every is missing"),
        ("poisson:1+bursts:size=5,evry=1s", "bursts: every is missing"),
    ] {
        let error = text.parse::<Arrivals>().unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn texts_round_trip(
        kind in 0..4,
        rate in 0.0..1e6_f64,
        idle in 0.0..1e3_f64,
        cv in 0.01..20.0_f64,
        times in prop::array::uniform4(1..10_000_000_000_000_u64),
        bursts in prop::option::of(1..10_000_u32),
    ) {
        let [on, off, interval, first] = times.map(Duration::from_nanos);
        let process = match kind {
            0 => Process::Constant { rate },
            1 => Process::Poisson { rate },
            2 => Process::Gamma { rate, cv },
            _ => Process::OnOff { rate, idle, on, off },
        };
        let bursts = bursts.map(|size| Bursts { size, interval, first });
        let arrivals = Arrivals { process, bursts };
        prop_assert_eq!(arrivals.to_string().parse(), Ok(arrivals));
    }
}
