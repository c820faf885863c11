//! `file-discovery`: endpoints from a file, for fleets without Kubernetes.
//!
//! The plugin only holds the settings; `dataLayer.discovery.pluginRef` names it, and whoever starts
//! the process runs its [`FileDiscovery`]. The file's format is documented there.

use std::{any::Any, sync::Arc};

use super::{Building, Registration, Stability};
use crate::{
    epp::{datalayer::discovery::FileDiscovery, scheduling::Plugin},
    support::fields::Fields,
};

/// The canonical type name.
pub const TYPE: &str = "file-discovery";

/// How `file-discovery` is configured.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// A configured `file-discovery`.
///
/// | parameter | default | meaning |
/// | --- | --- | --- |
/// | `path` | required | the YAML or JSON file |
/// | `watchFile` | false | read it again when it changes |
#[derive(Clone, Debug)]
pub struct FileDiscoverySource(FileDiscovery);

impl FileDiscoverySource {
    /// `plugin` as one of this type.
    #[must_use]
    pub fn of(plugin: &dyn Plugin) -> Option<&Self> {
        (plugin as &dyn Any).downcast_ref()
    }

    /// What is to be run.
    #[must_use]
    pub fn discovery(&self) -> FileDiscovery {
        self.0.clone()
    }
}

impl Plugin for FileDiscoverySource {
    fn type_name(&self) -> &'static str {
        TYPE
    }
}

fn build(params: &Fields<'_>, _building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(read(params)?))
}

fn read(params: &Fields<'_>) -> Option<FileDiscoverySource> {
    let path = params.required("path", Fields::nonempty);
    let watch = params.boolean("watchFile").unwrap_or(false);
    Some(FileDiscoverySource(FileDiscovery::new(path?, watch)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::fields::{Document, Reader};

    /// The path that is read, or the faults.
    #[track_caller]
    fn check(text: &str, want: Result<&str, &[&str]>) {
        let reader = Reader::new(Document::parse(text).unwrap());
        let root = reader.root();
        let source = read(&root);
        root.finish();
        let faults: Vec<String> = reader.finish().faults.iter().map(ToString::to_string).collect();
        match want {
            Ok(path) => {
                assert_eq!(faults, [""; 0]);
                assert_eq!(source.unwrap().discovery().path().to_str(), Some(path));
            }
            Err(want) => assert_eq!(faults, want),
        }
    }

    #[test]
    fn parameters_are_read() {
        check("path: /etc/endpoints.yaml", Ok("/etc/endpoints.yaml"));
        check("{path: a, watchFile: true}", Ok("a"));
        check("watchFile: true", Err(&["path: missing; this field is required"]));
        check(
            "{path: '', watchFile: 1, watch: true}",
            Err(&[
                "line 1: path: must not be empty",
                "line 1: watchFile: expected true or false, got the number 1",
                "line 1: watch: unknown field",
            ]),
        );
    }

    #[test]
    fn it_is_found_behind_the_trait() {
        let plugin: Arc<dyn Plugin> = Arc::new(FileDiscoverySource(FileDiscovery::new("a", false)));
        assert_eq!(plugin.type_name(), TYPE);
        assert!(FileDiscoverySource::of(&*plugin).is_some());
    }
}
