//! Families of metrics under one name or two.

use std::collections::HashMap;

use prometheus::{
    core::Desc,
    proto::{self, LabelPair, Metric, MetricFamily, MetricType},
};

/// A name, what it means, and which labels it has, in alphabetical order.
#[derive(Debug)]
pub(in crate::epp) struct Family {
    pub(in crate::epp) name: &'static str,
    pub(in crate::epp) kind: MetricType,
    pub(in crate::epp) help: &'static str,
    pub(in crate::epp) labels: &'static [&'static str],
    /// The family that took over from this one, whose name goes into the help text.
    pub(in crate::epp) successor: Option<&'static str>,
}

impl Family {
    pub(in crate::epp) const fn new(
        name: &'static str,
        kind: MetricType,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind, help, labels, successor: None }
    }

    /// The same under an old name.
    pub(in crate::epp) const fn old(
        name: &'static str,
        successor: &Self,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind: successor.kind, help, labels, successor: Some(successor.name) }
    }

    fn help(&self) -> String {
        match self.successor {
            None if self.name.starts_with("epp_") => self.help.to_owned(),
            None => format!("[ALPHA] {}", self.help),
            Some(successor) => format!("[ALPHA] [Deprecated: Use {successor}] {}", self.help),
        }
    }

    /// What a registry wants to know.
    pub(in crate::epp) fn desc(&self) -> prometheus::Result<Desc> {
        let labels = self.labels.iter().map(|label| (*label).to_owned()).collect();
        Desc::new(self.name.to_owned(), self.help(), labels, HashMap::new())
    }

    /// One series; as many values as the family has labels.
    pub(in crate::epp) fn series(&self, values: &[&str], value: impl Into<Value>) -> Metric {
        let pair = |(name, value): (&&str, &&str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        let mut metric = Metric::from_label(self.labels.iter().zip(values).map(pair).collect());
        match value.into() {
            Value::Number(number) if self.kind == MetricType::COUNTER => {
                let mut counter = proto::Counter::default();
                counter.set_value(number);
                metric.set_counter(counter);
            }
            Value::Number(number) => {
                let mut gauge = proto::Gauge::default();
                gauge.set_value(number);
                metric.set_gauge(gauge);
            }
            Value::Histogram(histogram) => metric.set_histogram(histogram),
        }
        metric
    }

    /// The family with its series.
    pub(in crate::epp) fn with(&self, series: Vec<Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help());
        family.set_field_type(self.kind);
        family.set_metric(series);
        family
    }
}

/// What a series says.
pub(in crate::epp) enum Value {
    Number(f64),
    Histogram(proto::Histogram),
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number as f64)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Number(number as f64)
    }
}

impl From<proto::Histogram> for Value {
    fn from(histogram: proto::Histogram) -> Self {
        Self::Histogram(histogram)
    }
}
