//! `metrics-data-source`: where the metrics pages of endpoints are, and how often they are fetched.
//!
//! The plugin only holds the settings; the process's [`Scraper`](crate::epp::datalayer::scrape::Scraper)
//! is made of them and of a `core-metrics-extractor`.

use std::{any::Any, path::PathBuf, sync::Arc, time::Duration};

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        datalayer::scrape::{MIN_INTERVAL, ScrapeConfig, TlsConfig},
        scheduling::Plugin,
    },
    support::{fields::Fields, units},
};

/// The canonical type name.
pub const TYPE: &str = "metrics-data-source";

/// How `metrics-data-source` is configured.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// Longest interval, as no configuration wants: load older than that is none.
const MAX_INTERVAL: Duration = Duration::from_secs(3600);

/// A configured `metrics-data-source`.
///
/// | parameter | default | meaning |
/// | --- | --- | --- |
/// | `scheme` | `http` | or `https` |
/// | `path` | `/metrics` | of the page, its query included |
/// | `port` | that of the endpoint | of all endpoints' pages |
/// | `insecureSkipVerify` | true | with `https`, trust any certificate |
/// | `caCertPath` | none | PEM; needed, and only used, without `insecureSkipVerify` |
/// | `clientCertPath`, `clientKeyPath` | none | PEM, both or neither |
/// | `interval` | `--refresh-metrics-interval` | duration such as `1s`; never shorter than that flag |
#[derive(Clone, Debug)]
pub struct MetricsDataSource {
    path: String,
    port: Option<u16>,
    tls: Option<TlsConfig>,
    interval: Option<Duration>,
}

impl MetricsDataSource {
    /// `plugin` as one of this type.
    #[must_use]
    pub fn of(plugin: &dyn Plugin) -> Option<&Self> {
        (plugin as &dyn Any).downcast_ref()
    }

    /// What a scraper needs; `refresh` is `--refresh-metrics-interval`, which counts as at least 50 ms.
    #[must_use]
    pub fn config(&self, refresh: Duration) -> ScrapeConfig {
        let refresh = refresh.max(MIN_INTERVAL);
        ScrapeConfig {
            path: self.path.clone(),
            port: self.port,
            tls: self.tls.clone(),
            floor: self.interval.map_or(refresh, |interval| interval.max(refresh)),
            ..ScrapeConfig::default()
        }
    }
}

impl Plugin for MetricsDataSource {
    fn type_name(&self) -> &'static str {
        TYPE
    }
}

fn build(params: &Fields<'_>, _building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(read(params)))
}

/// Faults are noted in `params`; what is returned then is of no use.
fn read(params: &Fields<'_>) -> MetricsDataSource {
    let https = params.one_of("scheme", &[("http", false), ("https", true)]).unwrap_or(false);
    let path = params.parsed("path", |path| {
        // As in Go, where the path is joined to the host.
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let legal = path.parse::<http::Uri>().is_ok();
        if legal { Ok(path) } else { Err(format!("{path:?} is no path of a URL")) }
    });
    let port = params.integer("port", 1..=65_535);
    let insecure = params.boolean("insecureSkipVerify").unwrap_or(true);
    let file = |text: Option<String>| text.filter(|text| !text.is_empty()).map(PathBuf::from);
    let ca = file(params.string("caCertPath"));
    let chain = file(params.string("clientCertPath"));
    let key = file(params.string("clientKeyPath"));
    let interval = params.parsed("interval", interval).flatten();
    if https && !insecure && ca.is_none() {
        params.fault(
            "caCertPath",
            "missing; without insecureSkipVerify it says whom to trust, for instance \
             /etc/ssl/certs/ca-certificates.crt",
        );
    }
    if https && chain.is_some() != key.is_some() {
        let missing = if chain.is_some() { "clientKeyPath" } else { "clientCertPath" };
        params.fault(missing, "missing; clientCertPath and clientKeyPath go together");
    }
    if !https {
        for (name, given) in
            [("caCertPath", &ca), ("clientCertPath", &chain), ("clientKeyPath", &key)]
        {
            if given.is_some() {
                params.warn(name, "has no effect with scheme http");
            }
        }
    }
    let tls = TlsConfig { ca: ca.filter(|_| !insecure), client: chain.zip(key) };
    MetricsDataSource {
        path: path.unwrap_or_else(|| ScrapeConfig::default().path),
        port,
        tls: https.then_some(tls),
        interval,
    }
}

/// None of an empty text and of zero.
fn interval(text: &str) -> Result<Option<Duration>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let interval = units::duration(text)?;
    if interval > MAX_INTERVAL {
        return Err(format!("{text:?} is more than {MAX_INTERVAL:?}"));
    }
    Ok(Some(interval).filter(|interval| !interval.is_zero()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::fields::{Document, Reader, Report};

    fn parse(text: &str) -> (MetricsDataSource, Report) {
        let reader = Reader::new(Document::parse(text).unwrap());
        let root = reader.root();
        let source = read(&root);
        root.finish();
        (source, reader.finish())
    }

    #[track_caller]
    fn good(text: &str, want: &ScrapeConfig) {
        let (source, report) = parse(text);
        assert_eq!(report.faults, []);
        assert_eq!(report.warnings, [""; 0]);
        assert_eq!(source.config(MIN_INTERVAL), *want);
    }

    #[track_caller]
    fn bad(text: &str, want: &[&str]) {
        let faults = parse(text).1.faults;
        let faults: Vec<String> =
            faults.iter().map(|fault| format!("{}: {}", fault.path, fault.message)).collect();
        assert_eq!(faults.len(), want.len(), "{faults:?}");
        for (fault, want) in faults.iter().zip(want) {
            assert!(fault.contains(want), "{fault}");
        }
    }

    #[test]
    fn parameters_are_read() {
        let default = ScrapeConfig::default();
        good("{}", &default);
        good("{scheme: http, path: /metrics, insecureSkipVerify: true}", &default);
        good("path: metrics", &default);
        good(
            "{path: '/m?name[]=a', port: 9400, interval: 1s}",
            &ScrapeConfig {
                path: "/m?name[]=a".to_owned(),
                port: Some(9400),
                floor: Duration::from_secs(1),
                ..ScrapeConfig::default()
            },
        );
        let tls = |ca: Option<&str>, client: Option<(&str, &str)>| ScrapeConfig {
            tls: Some(TlsConfig {
                ca: ca.map(PathBuf::from),
                client: client.map(|(chain, key)| (chain.into(), key.into())),
            }),
            ..ScrapeConfig::default()
        };
        good("scheme: https", &tls(None, None));
        good("{scheme: https, caCertPath: ca}", &tls(None, None));
        good("{scheme: https, insecureSkipVerify: false, caCertPath: ca}", &tls(Some("ca"), None));
        good("{scheme: https, clientCertPath: a, clientKeyPath: b}", &tls(None, Some(("a", "b"))));
        assert_eq!(parse("{clientCertPath: a}").1.warnings.len(), 1);
    }

    #[test]
    fn mistakes_are_named() {
        bad("scheme: ftp", &["scheme: \"ftp\" is not one of `http`, `https`"]);
        bad("port: 0", &["port: 0 is out of range"]);
        bad("path: 'a b'", &["path: \"/a b\" is no path"]);
        bad("interval: 50", &["interval: expected a string"]);
        bad("interval: 50x", &["interval: \"50x\" is no duration"]);
        bad("interval: -1s", &["interval: \"-1s\" is negative"]);
        bad("interval: 2h", &["interval: \"2h\" is more than"]);
        bad("{scheme: https, insecureSkipVerify: false}", &["caCertPath: missing"]);
        bad("{scheme: https, clientCertPath: a}", &["clientKeyPath: missing"]);
        bad("schema: http", &["schema: unknown field; did you mean `scheme`?"]);
    }

    #[test]
    fn no_interval_is_that_of_the_flag() {
        assert_eq!(interval("1s"), Ok(Some(Duration::from_secs(1))));
        assert_eq!(interval(""), Ok(None));
        assert_eq!(interval("0s"), Ok(None));
    }

    #[test]
    fn the_flag_is_the_shortest_interval() {
        let second = Duration::from_secs(1);
        let floor = |text, refresh| parse(text).0.config(refresh).floor;
        assert_eq!(floor("{}", Duration::ZERO), MIN_INTERVAL);
        assert_eq!(floor("{}", second), second);
        assert_eq!(floor("interval: 100ms", second), second);
        assert_eq!(floor("interval: 100ms", MIN_INTERVAL), 2 * MIN_INTERVAL);
    }
}
