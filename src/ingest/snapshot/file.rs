//! The snapshot in a directory.
//!
//! A new one is written beside the old one, forced to the disk, and put in its place by a rename,
//! which then is forced to the disk, too: whenever the process or the machine dies, the name leads to
//! a whole file, the old one or the new one.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{Exported, Source};

/// Name of the snapshot in its directory.
const NAME: &str = "kv-indexer.snapshot";
/// Name of one that is being written.
const UNFINISHED: &str = "kv-indexer.snapshot.tmp";
/// Bytes per write.
const BUFFER: usize = 1 << 20;

/// What could not be done to which file.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {error}", path.display())]
pub struct StoreError {
    what: &'static str,
    path: PathBuf,
    #[source]
    error: io::Error,
}

/// A directory with one snapshot. Nobody else may write to it.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// The directory, made if need be.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let make = fs::create_dir_all(directory);
        make.map_err(|error| StoreError { what: "making", path: directory.to_owned(), error })?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Where the snapshot is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Opens the snapshot; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When there is one that cannot be opened.
    pub fn read(&self) -> Result<Option<File>, StoreError> {
        match File::open(self.path()) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError { what: "opening", path: self.path(), error }),
        }
    }

    /// Puts a new snapshot in the place of the old one.
    ///
    /// # Errors
    ///
    /// What could not be done; then the old one is still there.
    pub fn write(&self, source: &dyn Source) -> Result<Exported, StoreError> {
        let unfinished = self.directory.join(UNFINISHED);
        let failed = |what| {
            let path = unfinished.clone();
            move |error| StoreError { what, path, error }
        };
        let file = File::create(&unfinished).map_err(failed("making"))?;
        let mut out = io::BufWriter::with_capacity(BUFFER, file);
        let exported = source.write(&mut out).map_err(failed("writing"))?;
        out.flush().map_err(failed("writing"))?;
        out.get_ref().sync_all().map_err(failed("syncing"))?;
        fs::rename(&unfinished, self.path()).map_err(failed("renaming"))?;
        let directory = File::open(&self.directory).and_then(|directory| directory.sync_all());
        let path = self.directory.clone();
        directory.map_err(|error| StoreError { what: "syncing", path, error })?;
        Ok(exported)
    }
}
