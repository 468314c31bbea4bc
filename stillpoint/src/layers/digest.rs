//! The digest of a read-only file, found once: a base image has gigabytes, and every machine on it asks.

use crate::cache;
use anyhow::{Context, Result, bail};
use checkpoint_format::{ByteLen, ContentDigest, ContentHasher};
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

const BUFFER_BYTES: usize = 1 << 20;
/// A file that changed so lately may change again within the same tick of its time stamp.
const SETTLED: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    pub digest: ContentDigest,
    pub len: ByteLen,
}

/// What a file's content is known by: device, inode, size, modification and change times.
pub fn identity(facts: &Metadata) -> String {
    let times = [facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec()];
    format!("{:?} {times:?}", [facts.dev(), facts.ino(), facts.size()])
}

/// From the cache when the file is the same as when it was read last; else reads it all.
pub fn of_file(path: &Path) -> Result<FileDigest> {
    let about = || format!("reading the layer {}", path.display());
    let mut file = File::open(path).with_context(about)?;
    let before = file.metadata().with_context(about)?;
    let key = identity(&before);
    if let Some(known) = cache::load::<FileDigest>("digests", &key) {
        return Ok(known);
    }
    let found = read(&mut file).with_context(about)?;
    let after = file.metadata().with_context(about)?;
    if identity(&after) != key || found.len.0 != before.size() {
        bail!("{} changed while it was read; a layer must be read-only", path.display());
    }
    if settled(&after) {
        cache::save("digests", &key, &found);
    }
    Ok(found)
}

fn settled(facts: &Metadata) -> bool {
    let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(facts.ctime().max(facts.mtime()).max(0) as u64);
    SystemTime::now().duration_since(changed).is_ok_and(|age| age > SETTLED)
}

fn read(file: &mut File) -> std::io::Result<FileDigest> {
    let mut hasher = ContentHasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut len = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(FileDigest { digest: hasher.finish(), len: ByteLen(len) });
        }
        hasher.update(&buffer[..count]);
        len += count as u64;
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn another_content_under_the_same_name_is_another_digest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.img");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let first = of_file(&path).unwrap();
        assert_eq!(first, FileDigest { digest: ContentDigest::of(&vec![7; 3 << 20]), len: ByteLen(3 << 20) });
        std::fs::write(&path, vec![8; 3 << 20]).unwrap();
        assert_ne!(of_file(&path).unwrap().digest, first.digest);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = of_file(Path::new("/nonexistent/base.img")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/base.img"));
    }
}
