use proptest::prelude::*;

use super::*;

fn lower_bound(value: f64) -> Observed {
    Observed { value, censored: true }
}

#[test]
fn ranks_are_whole_where_the_product_is() {
    #[track_caller]
    fn check(p: f64, n: usize, expected: usize) {
        assert_eq!(rank(p, n), expected, "{p} of {n}");
    }
    check(0.5, 1, 1);
    check(0.5, 2, 1);
    check(0.5, 3, 2);
    check(0.95, 20, 19);
    check(0.95, 200, 190);
    check(0.99, 100, 99);
    check(0.99, 101, 100);
    check(0.999, 10_000, 9_990);
    check(0.001, 5, 1);
}

#[test]
fn percentiles_of_known_values() {
    let described = percentiles((1..=1_000).rev().map(f64::from));
    assert_eq!(described.n, 1_000);
    assert_eq!(described.p50, Some(500.0));
    assert_eq!(described.p90, Some(900.0));
    assert_eq!(described.p95, Some(950.0));
    assert_eq!(described.p99, Some(990.0));
    assert_eq!(described.p999, Some(999.0));
    assert_eq!((described.min, described.max), (Some(1.0), Some(1_000.0)));
    assert_eq!(described.mean, Some(500.5));
    assert!((described.stddev.unwrap() - 288.674_99).abs() < 1e-3);
    assert_eq!(described.doubtful, ["p999"]);
}

#[test]
fn few_samples_are_named() {
    #[track_caller]
    fn check(n: u32, expected: &[&str]) {
        assert_eq!(percentiles((0..n).map(f64::from)).doubtful, expected, "{n}");
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        (0..n).for_each(|value| histogram.record(value.into()).unwrap());
        assert_eq!(from_histogram(&histogram, 1.0).doubtful, expected, "{n} in a histogram");
    }
    check(0, &[]);
    check(199, &["p95", "p99", "p999"]);
    check(200, &["p99", "p999"]);
    check(1_000, &["p999"]);
    check(10_000, &[]);
}

#[test]
fn nothing_has_no_percentiles() {
    assert_eq!(percentiles(Vec::<f64>::new()), Percentiles::default());
    assert_eq!(percentiles([f64::NAN]), Percentiles::default());
    assert_eq!(from_histogram(&Histogram::<u64>::new(3).unwrap(), 1.0), Percentiles::default());
}

#[test]
fn a_histogram_is_scaled() {
    let mut histogram = Histogram::<u64>::new(3).unwrap();
    for value in 1..=100 {
        histogram.record(value * 1_000_000).unwrap();
    }
    let described = from_histogram(&histogram, 1e-6);
    #[track_caller]
    fn near(value: Option<f64>, expected: f64) {
        assert!((value.unwrap() / expected - 1.0).abs() < 2e-3, "{value:?}, want {expected}");
    }
    near(described.p50, 50.0);
    near(described.p90, 90.0);
    near(described.max, 100.0);
    near(described.mean, 50.5);
}

#[test]
fn lower_bounds_count_with_what_they_waited() {
    // 1 000 answers after 1..=900 ms; 100 requests were given up after 2 s.
    let values = || {
        (0..900)
            .map(|ms| Observed::from(1.0 + f64::from(ms)))
            .chain((0..100).map(|_| lower_bound(2_000.0)))
    };
    let described = percentiles(values());
    assert_eq!(described.n, 1_000);
    assert_eq!((described.p50, described.p90), (Some(500.0), Some(900.0)));
    assert_eq!(described.p95, Some(2_000.0));
    assert_eq!(described.doubtful, ["p95", "p99", "p999"]);

    // A bound that lies low says nothing of where the value is: all above it may be larger.
    let early = (0..10_000).map(|ms| Observed { value: f64::from(ms), censored: ms < 2_000 });
    assert_eq!(percentiles(early).doubtful, ["p50", "p90", "p95", "p99", "p999"]);
    // One of ten thousand moves the largest only.
    let one = (0..20_000).map(|ms| Observed { value: f64::from(ms), censored: ms == 5 });
    assert_eq!(percentiles(one).doubtful, Vec::<String>::new());
}

proptest! {
    #[test]
    fn percentiles_are_those_of_the_definition(values in prop::collection::vec(0u32..1_000, 1..300)) {
        let described = percentiles(values.iter().copied().map(f64::from));
        // The smallest value that at least a share p of all does not exceed, in whole thousandths.
        let naive = |thousandths: usize| {
            let enough = |bound: u32| {
                values.iter().filter(|value| **value <= bound).count() * 1_000
                    >= thousandths * values.len()
            };
            values.iter().copied().filter(|bound| enough(*bound)).min().map(f64::from)
        };
        prop_assert_eq!(described.p50, naive(500));
        prop_assert_eq!(described.p90, naive(900));
        prop_assert_eq!(described.p95, naive(950));
        prop_assert_eq!(described.p99, naive(990));
        prop_assert_eq!(described.p999, naive(999));
    }
}

#[test]
fn wilson_intervals_of_known_shares() {
    #[track_caller]
    fn check(met: u64, n: u64, expected: [f64; 2]) {
        let found = wilson(met, n);
        let near = found.iter().zip(expected).all(|(found, want)| (found - want).abs() < 5e-5);
        assert!(near, "{met} of {n}: {found:?}, want {expected:?}");
    }
    check(0, 0, [0.0, 1.0]);
    check(0, 10, [0.0, 0.27753]);
    check(10, 10, [0.72247, 1.0]);
    check(5, 10, [0.23659, 0.76341]);
    check(81, 263, [0.25525, 0.36621]);
    check(950, 1_000, [0.93470, 0.96186]);
}

#[test]
fn the_middle_and_the_spread_of_repeats() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    assert_eq!(cv(&[5.0]), None);
    assert_eq!(cv(&[2.0, 2.0]), Some(0.0));
    // Deviations ±1 and 0 of three: √(2/2) = 1; the mean is 2.
    assert_eq!(cv(&[1.0, 2.0, 3.0]), Some(0.5));
    let expected = Spread { median: 2.0, min: 1.0, max: 3.0, cv: Some(0.5) };
    assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(expected));
    assert_eq!(spread(&[]), None);
}

#[test]
fn an_interval_of_repeats_holds_their_median() {
    for ratios in [[2.0, 2.1, 1.9, 2.2, 2.0], [0.9, 1.1, 1.0, 0.8, 1.2]] {
        let [low, high] = bootstrap_median(&ratios, 1).unwrap();
        let middle = median(&ratios).unwrap();
        assert!(low <= middle && middle <= high, "{low} {middle} {high}");
        assert_eq!(low > 1.0, middle > 1.5, "one of them is beyond 1 as a whole: {low} {high}");
        assert_eq!(bootstrap_median(&ratios, 7), bootstrap_median(&ratios, 7));
    }
    assert_eq!(bootstrap_median(&[2.0, 2.1], 1), None);
    assert_eq!(bootstrap_median(&[], 1), None);
}

/// Published by llm-d for 73 % capacity: requests per second, tokens per second, P90 of the time to the
/// first token in seconds; where a throughput was not given that of the neighbour stands.
const PRECISE: [(f64, f64, f64); 8] = [
    (3.0, 1_219.0, 0.50),
    (10.0, 3_902.0, 0.60),
    (15.0, 5_761.0, 0.40),
    (20.0, 9_185.0, 0.60),
    (30.0, 9_222.0, 0.51),
    (35.0, 9_781.0, 0.49),
    (40.0, 10_271.0, 0.49),
    (60.0, 10_497.0, 0.50),
];
const APPROXIMATE: [(f64, f64, f64); 8] = [
    (3.0, 1_311.0, 0.50),
    (10.0, 3_842.0, 0.50),
    (15.0, 5_153.0, 0.40),
    (20.0, 8_083.0, 0.60),
    (30.0, 8_436.0, 0.71),
    (35.0, 7_444.0, 2.46),
    (40.0, 8_046.0, 43.0),
    (60.0, 7_248.0, 50.2),
];
const RANDOM: [(f64, f64, f64); 8] = [
    (3.0, 1_314.0, 0.82),
    (10.0, 3_569.0, 1.40),
    (15.0, 3_791.0, 2.30),
    (20.0, 4_933.0, 70.3),
    (30.0, 4_636.0, 86.2),
    (35.0, 4_333.0, 91.5),
    (40.0, 4_774.0, 101.3),
    (60.0, 4_835.0, 106.0),
];

#[test]
fn knees_of_published_ladders() {
    assert_eq!(knee(&PRECISE, LoopKind::Open), None);
    let random = knee(&RANDOM, LoopKind::Open).unwrap();
    assert!((15.0..=20.0).contains(&random), "{random}");
    let approximate = knee(&APPROXIMATE, LoopKind::Open).unwrap();
    assert!((30.0..=40.0).contains(&approximate), "{approximate}");
}

#[test]
fn knees_by_each_rule() {
    use LoopKind::{Closed, Open};
    #[track_caller]
    fn check(pacing: LoopKind, levels: &[(f64, f64, f64)], expected: Option<f64>) {
        assert_eq!(knee(levels, pacing), expected, "{levels:?}");
    }
    check(Open, &[], None);
    check(Closed, &[(1.0, 10.0, 1.0)], None);
    check(Closed, &[(1.0, 10.0, 1.0), (8.0, 75.0, 1.2), (32.0, 250.0, 2.0)], None);
    check(Closed, &[(1.0, 10.0, 1.0), (8.0, 75.0, 1.2), (32.0, 90.0, 2.0)], Some(8.0));
    check(Open, &[(1.0, 10.0, 1.0), (8.0, 75.0, 1.2), (32.0, 90.0, 2.0)], None);
    check(Open, &[(1.0, 10.0, 1.0), (2.0, 20.0, 3.1)], Some(1.0));
    check(Open, &[(1.0, 10.0, 1.0), (2.0, 8.0, 1.0)], Some(1.0));
}
