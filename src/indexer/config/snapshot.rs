//! `snapshot`: where the index is saved, and when.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{HOUR_MS, IndexerConfig};
use crate::support::fields::{Fields, set};

impl IndexerConfig {
    pub(super) fn read_snapshot(&mut self, root: &Fields<'_>) {
        let fields = root.mapping("snapshot");
        let out = &mut self.snapshot;
        out.dir = fields.nonempty("dir").map(PathBuf::from);
        set(&mut out.interval, fields.millis("intervalMs", 0..=24 * HOUR_MS));
        set(&mut out.at_shutdown, fields.boolean("atShutdown"));
        set(&mut out.grace, fields.millis("graceMs", 0..=24 * HOUR_MS));
        set(&mut out.max_streams, fields.integer("maxStreams", 0..=64));
        fields.finish();
    }

    pub(super) fn snapshot_json(&self) -> Value {
        let millis =
            |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        json!({
            "dir": self.snapshot.dir,
            "intervalMs": millis(self.snapshot.interval),
            "atShutdown": self.snapshot.at_shutdown,
            "graceMs": millis(self.snapshot.grace),
            "maxStreams": self.snapshot.max_streams,
        })
    }
}
