//! `config/epp.yaml`: it loads, its examples load, and it lists every field.

use std::{collections::BTreeSet, fs, path::Path};

use kv_indexer::{
    epp::{config::EndpointPickerConfig, plugins::types},
    support::fields::{Document, Reader},
};

use super::{fakes::release, load_with};
use crate::support::{paths, with_examples};

fn sample() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/epp.yaml")).unwrap()
}

/// The examples of plugins: they stand at the left edge.
fn plugin_examples() -> Vec<String> {
    let text = sample();
    let lines = text.lines().filter_map(|line| line.strip_prefix("#: - "));
    lines.map(|entry| entry.split("  #").next().unwrap_or_default().to_owned()).collect()
}

/// The sample with its examples of sections in force.
fn full_sample() -> String {
    let replaced = ["featureGates: []", "  sources: []"];
    with_examples(&sample(), |line| replaced.contains(&line) || line.starts_with("#: - "))
}

#[test]
fn it_is_the_default_with_endpoints_from_a_file() {
    let types = release();
    let loaded = load_with(&types, &sample()).unwrap();
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!(loaded.discovery.as_ref().map(|it| &*it.name), Some("file-discovery"));
    let default = load_with(&types, "").unwrap();
    let (got, want) = (loaded.to_json(), default.to_json());
    for section in ["profiles", "profileHandler", "parsers", "metricsSources", "saturationDetector"]
    {
        assert_eq!(got[section], want[section], "{section}");
    }
}

#[test]
fn its_examples_load() {
    let examples = plugin_examples();
    let (handlers, others): (Vec<_>, Vec<_>) =
        examples.iter().partition(|entry| entry.contains("profile-handler"));
    assert_eq!(handlers.len(), 2);
    let others: String = others.iter().map(|entry| format!("- {entry}\n")).collect();
    for handler in handlers {
        let text = format!(
            "plugins:\n{others}- {handler}\nschedulingProfiles: [{{name: decode, plugins: []}}]\n"
        );
        if let Err(faults) = load_with(&release(), &text) {
            panic!("{faults:#?}\n{text}");
        }
    }
}

#[test]
fn it_names_every_type_of_this_release() {
    let text = sample();
    for known in release().iter().filter(|known| known.factory.is_some()) {
        // Policies are of no use before flow control is.
        assert!(
            known.type_name.ends_with("-policy") || text.contains(known.type_name),
            "{} is missing",
            known.type_name
        );
    }
    assert!(types().find("queue-scorer").is_some());
}

#[test]
fn it_lists_every_field_and_no_other() {
    let text = full_sample();
    let reader = Reader::new(Document::parse(&text).unwrap());
    drop(EndpointPickerConfig::read(&reader));
    let report = reader.finish();
    assert_eq!(report.faults, [], "{text}");
    let is_free = |path: &str| path.ends_with(".parameters") || path.ends_with(".peerDiscovery");
    let listed = paths(&serde_saphyr::from_str(&text).unwrap(), &is_free);
    let old = ["data", "parser", "saturationDetector"];
    let is_old = |path: &str| old.contains(&path.split(['.', '[']).next().unwrap_or_default());
    let known: BTreeSet<String> = report.asked.into_iter().filter(|path| !is_old(path)).collect();
    let missing: Vec<_> = known.difference(&listed).collect();
    let unread: Vec<_> = listed.difference(&known).collect();
    assert!(missing.is_empty(), "not in config/epp.yaml: {missing:?}");
    assert!(unread.is_empty(), "in config/epp.yaml and not read: {unread:?}");
    assert!(known.len() > 45, "{}", known.len());
}
