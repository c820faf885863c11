//! A text file that is looked at again and again.
//!
//! Looking compares the path's current file with what was read last, so it does not matter how the
//! file came to change: written over, renamed into place, or behind a symbolic link that now leads
//! elsewhere, as in a mounted ConfigMap.

use std::{
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// A file written this shortly before it was read may be written again without a change of its
/// timestamp, on file systems that count in seconds.
const RACY: Duration = Duration::from_secs(2);

/// A file, and what was seen when it was last looked at.
#[derive(Debug)]
pub struct WatchedFile {
    path: PathBuf,
    max_bytes: u64,
    seen: Option<Seen>,
}

/// The file as last looked at, good or not.
#[derive(Debug, PartialEq)]
enum Seen {
    Unreadable,
    Read { stamp: Stamp, settled: bool, content: String },
}

/// What the file system says of a file without reading it.
#[derive(Debug, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl WatchedFile {
    /// Watches `path`, of which at most `max_bytes` are read. Nothing is read yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, max_bytes: u64) -> Self {
        Self { path: path.into(), max_bytes, seen: None }
    }

    /// The path given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content if it differs from that of the last look, none if not. The first look reads it.
    ///
    /// Blocks for as long as the file system takes.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is too long or is no UTF-8: once until it can be read again, so
    /// that a caller that polls can report every error.
    pub fn changed(&mut self) -> io::Result<Option<&str>> {
        let now = match self.look() {
            Ok(None) => return Ok(None),
            Ok(Some(now)) => now,
            Err(error) => {
                let known = self.seen.replace(Seen::Unreadable) == Some(Seen::Unreadable);
                return if known { Ok(None) } else { Err(error) };
            }
        };
        let before = self.seen.replace(now);
        let Some(Seen::Read { content, .. }) = &self.seen else { return Ok(None) };
        if matches!(&before, Some(Seen::Read { content: before, .. }) if before == content) {
            return Ok(None);
        }
        Ok(Some(content))
    }

    /// The file, unless its metadata shows that it is still the one seen.
    fn look(&self) -> io::Result<Option<Seen>> {
        // Opening a pipe waits for its writer, and a device may never end.
        if !std::fs::metadata(&self.path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no regular file"));
        }
        let file = File::open(&self.path)?;
        let stamp = Stamp::of(&file.metadata()?);
        if matches!(&self.seen, Some(Seen::Read { stamp: s, settled: true, .. }) if *s == stamp) {
            return Ok(None);
        }
        let mut content = String::new();
        file.take(self.max_bytes + 1).read_to_string(&mut content)?;
        if content.len() as u64 > self.max_bytes {
            let text = format!("longer than {} bytes", self.max_bytes);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let age = stamp.modified.and_then(|modified| modified.elapsed().ok());
        let settled = age.is_some_and(|age| age > RACY);
        Ok(Some(Seen::Read { stamp, settled, content }))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[track_caller]
    fn check(file: &mut WatchedFile, want: Option<&str>) {
        assert_eq!(file.changed().unwrap(), want);
        assert_eq!(file.changed().unwrap(), None);
    }

    fn settle(path: &Path) {
        let old = SystemTime::now() - Duration::from_secs(60);
        File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let mut file = WatchedFile::new(&path, 8);
        assert_eq!(file.changed().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "one").unwrap();
        check(&mut file, Some("one"));
    }

    #[test]
    fn every_way_to_change_a_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        let mut file = WatchedFile::new(&path, 8);
        assert!(file.changed().is_err());
        assert_eq!(file.changed().unwrap(), None, "said once");
        fs::write(&path, "one").unwrap();
        check(&mut file, Some("one"));
        // The same length, and maybe the same timestamp.
        fs::write(&path, "two").unwrap();
        check(&mut file, Some("two"));
        // The same content.
        fs::write(&path, "two").unwrap();
        check(&mut file, None);
        settle(&path);
        check(&mut file, None);
        assert!(file.look().unwrap().is_none(), "its metadata is enough");
        // Another file of the same length and timestamp.
        let other = dir.path().join("other");
        fs::write(&other, "six").unwrap();
        settle(&other);
        fs::rename(&other, &path).unwrap();
        check(&mut file, Some("six"));
        fs::write(&path, "123456789").unwrap();
        assert!(file.changed().unwrap_err().to_string().contains("longer than 8 bytes"));
        fs::write(&path, [0xff]).unwrap();
        assert_eq!(file.changed().unwrap(), None, "still not readable");
        fs::remove_file(&path).unwrap();
        assert_eq!(file.changed().unwrap(), None);
        fs::write(&path, "six").unwrap();
        check(&mut file, Some("six"));
    }

    #[test]
    fn the_end_of_a_chain_of_links_is_what_counts() {
        // As the kubelet mounts a ConfigMap: list → ..data/list, ..data → ..<time>.
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, content) in [("..1", "one"), ("..2", "two")] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("list"), content).unwrap();
            settle(&at(name).join("list"));
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/list", at("list")).unwrap();
        let mut file = WatchedFile::new(at("list"), 8);
        check(&mut file, Some("one"));
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        check(&mut file, Some("two"));
    }
}
