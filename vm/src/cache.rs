//! Small facts that are dear to find and cheap to keep: what a QEMU binary is, a base image's
//! digest. A missing, damaged or unwritable cache costs time and nothing else.

use crate::files;
use serde::{Serialize, de::DeserializeOwned};
use std::path::PathBuf;

/// No cached fact is larger.
const MAX_ENTRY_BYTES: u64 = 1 << 20;

/// `$STILLPOINT_CACHE_DIR`, else `$XDG_CACHE_HOME/stillpoint`, else `~/.cache/stillpoint`.
pub fn directory() -> PathBuf {
    let under =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    under("STILLPOINT_CACHE_DIR")
        .or_else(|| under("XDG_CACHE_HOME").map(|cache| cache.join("stillpoint")))
        .or_else(|| under("HOME").map(|home| home.join(".cache/stillpoint")))
        .unwrap_or_else(|| PathBuf::from("/var/cache/stillpoint"))
}

#[derive(Serialize, serde::Deserialize)]
struct Entry<T> {
    key: String,
    value: T,
}

fn path(kind: &str, key: &str) -> PathBuf {
    let name = blake3::hash(key.as_bytes()).to_hex();
    directory().join(kind).join(format!("{}.json", &name[..32]))
}

/// What [`save`] has kept under that kind and key; `None` if nothing, or nothing that can be read.
pub fn load<T: DeserializeOwned>(kind: &str, key: &str) -> Option<T> {
    let path = path(kind, key);
    let entry: Entry<T> =
        serde_json::from_slice(&files::read_limited(&path, MAX_ENTRY_BYTES).ok()?).ok()?;
    (entry.key == key).then_some(entry.value)
}

/// Keeps a value until the cache directory is emptied. A cache that cannot be written is no
/// failure.
pub fn save<T: Serialize>(kind: &str, key: &str, value: &T) {
    let path = path(kind, key);
    if let Err(error) = write(&path, key, value) {
        tracing::debug!(path = %path.display(), %error, "not cached");
    }
}

fn write<T: Serialize>(path: &std::path::Path, key: &str, value: &T) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    std::fs::create_dir_all(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    serde_json::to_writer(&mut file, &Entry { key: key.to_owned(), value })?;
    file.persist(path)?;
    Ok(())
}
