//! An HDFS URL: the cluster, and the directory in it.

use crate::error::{Result, StoreError};
use crate::path::StorePath;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HdfsUrl {
    /// Scheme and authority, as the client wants them.
    service: String,
    /// Absolute, without a slash at the end; empty for the root.
    base: String,
    shown: String,
}

impl HdfsUrl {
    pub(super) fn parse(url: &str) -> Result<Self> {
        let invalid = |reason: &str| StoreError::InvalidUrl {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| invalid("there is no scheme"))?;
        let (authority, base) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        // As HDFS itself has it: several slashes are one, so a store has one name however its URL
        // is written.
        let parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
        if parts.iter().any(|part| matches!(*part, "." | "..")) {
            return Err(invalid("the path must be plain, without '.' and '..'"));
        }
        let base: String = parts.iter().flat_map(|part| ["/", part]).collect();
        if base.contains(['?', '#', ':']) {
            return Err(invalid("'?', '#' and ':' are not allowed in the path"));
        }
        let service = format!("{scheme}://{authority}");
        Ok(HdfsUrl { shown: format!("{service}{base}"), base, service })
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Whether it names a NameNode by its port, and not a name service with several.
    pub(super) fn is_single_namenode(&self) -> bool {
        self.service.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    }

    pub(super) fn path_of(&self, path: &StorePath) -> String {
        match (path.is_root(), self.base.is_empty()) {
            (true, true) => "/".to_owned(),
            (true, false) => self.base.clone(),
            (false, _) => format!("{}/{}", self.base, path.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_the_base() {
        let path = StorePath::new("a/b").expect("valid");
        for (url, root, file) in [
            ("hdfs://h:9000", "/", "/a/b"),
            ("hdfs://h:9000/", "/", "/a/b"),
            ("hdfs://service/x/y/", "/x/y", "/x/y/a/b"),
            ("hdfs:///x", "/x", "/x/a/b"),
            ("hdfs://h:9000//x", "/x", "/x/a/b"),
            ("hdfs://h:9000//", "/", "/a/b"),
            ("hdfs://h:9000///x//y///", "/x/y", "/x/y/a/b"),
        ] {
            let parsed = HdfsUrl::parse(url).expect(url);
            assert_eq!(parsed.path_of(&StorePath::root()), root, "{url}");
            assert_eq!(parsed.path_of(&path), file, "{url}");
        }
    }

    #[test]
    fn url_repeated_slashes_name_the_same_store() {
        let plain = HdfsUrl::parse("hdfs://h:9000/x/y").expect("valid");
        assert_eq!(HdfsUrl::parse("hdfs://h:9000//x///y/").expect("valid"), plain);
        for url in ["hdfs://h/x/../y", "hdfs://h//./y", "hdfs://h/x?y", "hdfs://h/x:y"] {
            assert!(HdfsUrl::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_port_names_one_namenode() {
        assert!(HdfsUrl::parse("hdfs://h:9000/x").expect("valid").is_single_namenode());
        assert!(!HdfsUrl::parse("hdfs://service/x").expect("valid").is_single_namenode());
    }
}
