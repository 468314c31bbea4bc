//! From a URL to a store.

use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::hdfs::{HdfsOptions, HdfsStore};
use crate::local::LocalStore;
use crate::store::Store;

/// Options of [`open`] for every kind of store.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// For `hdfs://` URLs.
    pub hdfs: HdfsOptions,
}

/// Opens the store at `file:///directory` (or just `/directory`), `hdfs://namenode:port/directory`,
/// `hdfs://nameservice/directory` or `viewfs://…`. Nothing is contacted or created yet. The path of
/// a `file:` URL is taken as it stands, without percent decoding.
///
/// # Errors
/// When the URL has an unknown scheme or no path, or the store cannot be opened.
pub fn open(url: &str, options: &StoreOptions) -> Result<Arc<dyn Store>> {
    if url.starts_with('/') {
        return Ok(Arc::new(LocalStore::new(url)?));
    }
    match url.split_once("://") {
        Some(("file", path)) => Ok(Arc::new(LocalStore::new(path)?)),
        Some(("hdfs" | "viewfs", _)) => Ok(Arc::new(HdfsStore::open(url, &options.hdfs)?)),
        _ => Err(StoreError::InvalidUrl {
            url: url.to_owned(),
            reason: "no store is known under this scheme".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(url: &str) -> Result<String> {
        open(url, &StoreOptions::default()).map(|store| store.url().to_owned())
    }

    #[test]
    fn urls_of_each_kind() {
        assert_eq!(opened("/a/b").expect("a path"), "file:///a/b");
        assert_eq!(opened("file:///a/b").expect("a file URL"), "file:///a/b");
        assert_eq!(
            opened("hdfs://127.0.0.1:9000/a/").expect("an HDFS URL"),
            "hdfs://127.0.0.1:9000/a"
        );
        assert_eq!(
            opened("hdfs://127.0.0.1:9000//a").expect("an HDFS URL"),
            "hdfs://127.0.0.1:9000/a"
        );
        assert_eq!(opened("file:////a//b/").expect("a file URL"), "file:///a/b");
    }

    #[test]
    fn others_are_refused() {
        for url in ["", "a/b", "file://host/a", "s3://bucket/a", "hdfs://127.0.0.1:9000/a/../b"] {
            assert!(matches!(opened(url), Err(StoreError::InvalidUrl { .. })), "{url:?} passed");
        }
    }
}
