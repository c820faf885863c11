use serde_json::{Value, json};

use super::*;
use crate::epp::scheduling::testing::{NOW, Rig, build};

/// Queue, cache and age of metrics in milliseconds; `None` was never scraped.
type Load = Option<(u64, f64, u64)>;

fn metrics(loads: &[Load]) -> Vec<Metrics> {
    let metrics = |load: &Load| match *load {
        Some((waiting, kv_usage, age)) => {
            let updated = Some(*NOW - Duration::from_millis(age));
            Metrics { waiting, kv_usage, updated, ..Metrics::default() }
        }
        None => Metrics::default(),
    };
    loads.iter().map(metrics).collect()
}

fn read(params: Value) -> Arc<dyn Plugin> {
    build(REGISTRATION, params).unwrap()
}

fn detector(plugin: &Arc<dyn Plugin>) -> UtilizationDetector {
    UtilizationDetector::of(&**plugin).unwrap().clone()
}

/// With thresholds of 5 requests, 0.9 of the cache and 100 ms.
#[track_caller]
fn saturation(loads: &[Load], want: f64) {
    let params = json!({"kvCacheUtilThreshold": 0.9, "metricsStalenessThreshold": "100ms"});
    let metrics: Vec<_> = metrics(loads).into_iter().map(Arc::new).collect();
    let got = detector(&read(params)).saturation(&metrics, *NOW);
    assert!((got - want).abs() < 1e-9, "{loads:?}: {got}, want {want}");
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn saturation_is_the_mean_of_the_scarcest_resources() {
    saturation(&[],                                        1.0);
    saturation(&[Some((2, 0.5, 0))],                       0.5 / 0.9);
    saturation(&[Some((1, 0.1, 200))],                     1.0); // stale
    saturation(&[Some((1, 0.1, 100))],                     0.2); // just fresh
    saturation(&[Some((1, 0.1, 101))],                     1.0);
    saturation(&[Some((10, 0.1, 0))],                      2.0);
    saturation(&[Some((1, 0.95, 0))],                      0.95 / 0.9);
    saturation(&[None],                                    1.0);
    saturation(&[Some((1, 0.1, 0)), Some((0, 0.2, 0))],    (0.2 + 0.2 / 0.9) / 2.0);
    saturation(&[Some((1, 0.1, 0)), Some((0, 0.0, 200))],  0.6);
    saturation(&[Some((1, 0.1, 0)), Some((15, 0.1, 0))],   1.6);
    saturation(&[Some((1, 0.1, 500)), Some((20, 0.1, 0)), Some((1, 0.99, 0))], (1.0 + 4.0 + 1.1) / 3.0);
    saturation(&[Some((5, 0.1, 0))],                       1.0);
    saturation(&[Some((0, f64::NAN, 0))],                  0.0); // no number: the queue counts
}

/// Limits: 6 requests, 0.96 of the cache.
#[track_caller]
fn passing(loads: &[Load], want: &[usize]) {
    let rig = Rig::new(metrics(loads));
    assert_eq!(rig.passing(&*read(json!({"headroom": 0.2}))), want, "{loads:?}");
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn the_filter_keeps_whoever_has_room() {
    passing(&[Some((1, 0.1, 0)), Some((2, 0.2, 0))],      &[0, 1]);
    passing(&[Some((5, 0.8, 0))],                         &[0]);
    passing(&[Some((5, 0.9, 0)), Some((9, 0.9, 0))],      &[0]);    // in the headroom
    passing(&[Some((6, 0.1, 0)), Some((1, 0.1, 0))],      &[1]);    // at the limit
    passing(&[Some((1, 0.97, 0)), Some((1, 0.5, 0))],     &[1]);
    passing(&[Some((1, 0.1, 300)), Some((1, 0.1, 0)), None], &[1]); // stale, never scraped
    passing(&[Some((1, 0.1, 300)), None],                 &[0, 1]); // nobody would be left
    passing(&[Some((9, 0.1, 0)), Some((1, 0.99, 0))],     &[0, 1]);
    passing(&[],                                          &[]);
}

#[test]
fn defaults_are_those_of_the_reference() {
    assert_eq!(detector(&read(json!({}))), UtilizationDetector::default());
    let all = json!({"queueDepthThreshold": 5, "kvCacheUtilThreshold": 0.8,
                     "metricsStalenessThreshold": "0.2s", "headroom": 0});
    assert_eq!(detector(&read(all)), UtilizationDetector::default());
    assert!(build(REGISTRATION, json!({"headroom": 2.0})).is_ok());
}

#[test]
fn wrong_parameters_are_refused() {
    #[track_caller]
    fn check(params: Value, want: &str) {
        let faults = build(REGISTRATION, params).unwrap_err();
        assert!(faults.len() == 1 && faults[0].starts_with(want), "{faults:?}");
    }
    check(json!({"queueDepthThreshold": "invalid"}), "queueDepthThreshold: expected an integer");
    check(json!({"queueDepthThreshold": 0}), "queueDepthThreshold: 0 is out of range");
    check(json!({"kvCacheUtilThreshold": 1.5}), "kvCacheUtilThreshold: expected a number above 0");
    check(json!({"kvCacheUtilThreshold": 0.0}), "kvCacheUtilThreshold: expected");
    check(
        json!({"metricsStalenessThreshold": "0s"}),
        "metricsStalenessThreshold: must be positive",
    );
    check(json!({"metricsStalenessThreshold": "x"}), "metricsStalenessThreshold: \"x\" is no dur");
    check(
        json!({"metricsStalenessThreshold": 200}),
        "metricsStalenessThreshold: expected a string",
    );
    check(json!({"headroom": -0.5}), "headroom: -0.5 is out of range");
    check(json!({"queueDepthTreshold": 1}), "queueDepthTreshold: unknown field; did you mean");
}

#[test]
fn an_idle_pool_is_not_saturated() {
    let detector = detector(&read(json!({})));
    let saturation = |age: u64| {
        let metrics: Vec<_> =
            metrics(&[Some((0, 0.0, age)); 3]).into_iter().map(Arc::new).collect();
        detector.saturation(&metrics, *NOW)
    };
    assert_eq!(saturation(200), 0.0);
    assert_eq!(saturation(201), 1.0);
    detector.allow_for(Duration::from_secs(2));
    assert_eq!(saturation(2000), 0.0);
    assert_eq!(saturation(2001), 1.0);

    let patient = self::detector(&read(json!({"metricsStalenessThreshold": "5s"})));
    patient.allow_for(Duration::from_secs(2));
    let old = metrics(&[Some((0, 0.0, 5000))]).into_iter().map(Arc::new).collect::<Vec<_>>();
    assert_eq!(patient.saturation(&old, *NOW), 0.0);
}
