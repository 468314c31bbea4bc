//! Names inside a store: relative, plain ASCII, no way out of the store's root.

use std::fmt;

use crate::error::StoreError;

/// Longest component; what common file systems and HDFS both allow.
const MAX_COMPONENT_LEN: usize = 255;
/// Longest whole path, far above what the layout needs.
const MAX_PATH_LEN: usize = 1024;

/// A path relative to the store's root: components of `[A-Za-z0-9._-]` that do not begin with a
/// dot, joined by `/`. The empty path is the root. Names that begin with a dot belong to the stores
/// themselves (unfinished files); no listing shows them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath(String);

impl StorePath {
    /// The base directory of the store.
    pub fn root() -> Self {
        StorePath(String::new())
    }

    /// Parses `a/b/c`.
    ///
    /// # Errors
    /// When a component is empty, `.` or `..`, too long, or has characters that are not allowed.
    pub fn new(text: &str) -> Result<Self, StoreError> {
        let refuse = |reason| StoreError::InvalidPath {
            text: text.chars().take(MAX_PATH_LEN).collect(),
            reason,
        };
        if text.len() > MAX_PATH_LEN {
            return Err(refuse("it is too long"));
        }
        if !text.is_empty() {
            for component in text.split('/') {
                check_component(component).map_err(refuse)?;
            }
        }
        Ok(StorePath(text.to_owned()))
    }

    /// This path with one or more components added.
    ///
    /// # Errors
    /// When `name` is no valid component.
    pub fn join(&self, name: &str) -> Result<Self, StoreError> {
        if self.is_root() {
            return Self::new(name);
        }
        Self::new(&format!("{}/{name}", self.0))
    }

    /// Whether it is the base directory of the store.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components, separated by `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directory that holds this; `None` for the root.
    pub fn parent(&self) -> Option<StorePath> {
        if self.is_root() {
            return None;
        }
        let parent = self.0.rsplit_once('/').map_or("", |(parent, _)| parent);
        Some(StorePath(parent.to_owned()))
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// Whether `self` is `other` or lies below it.
    pub fn is_within(&self, other: &StorePath) -> bool {
        other.is_root()
            || self == other
            || (self.0.starts_with(&other.0) && self.0[other.0.len()..].starts_with('/'))
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "/" } else { &self.0 })
    }
}

fn check_component(component: &str) -> Result<(), &'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if component.is_empty() {
        Err("a component is empty")
    } else if component.len() > MAX_COMPONENT_LEN {
        Err("a component is too long")
    } else if component.starts_with('.') {
        Err("a component begins with a dot")
    } else if !component.chars().all(plain) {
        Err("only letters, digits, '.', '_' and '-' are allowed")
    } else {
        Ok(())
    }
}

/// Whether a name found in a directory is one that a caller could have put there.
pub(crate) fn is_visible(name: &str) -> bool {
    check_component(name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_paths_pass() {
        for text in ["", "a", "vms/vm-1/checkpoints/7.2-1.partial", "layers/00ff"] {
            assert_eq!(StorePath::new(text).expect(text).as_str(), text);
        }
    }

    #[test]
    fn ways_out_are_refused() {
        for text in
            ["/", "/a", "a/", "a//b", "..", "a/../b", ".", ".tmp", "a b", "a\0", "ä", "a%2e", "a:b"]
        {
            assert!(StorePath::new(text).is_err(), "{text:?} passed");
        }
        assert!(StorePath::new(&"a".repeat(256)).is_err());
        assert!(StorePath::new(&"a/".repeat(600)).is_err());
    }

    #[test]
    fn family() {
        let path = StorePath::new("a/b").expect("valid");
        assert_eq!(path.parent(), Some(StorePath::new("a").expect("valid")));
        assert_eq!(path.parent().and_then(|p| p.parent()), Some(StorePath::root()));
        assert_eq!(StorePath::root().parent(), None);
        assert_eq!(path.name(), "b");
        assert!(path.is_within(&StorePath::new("a").expect("valid")));
        assert!(
            !StorePath::new("ab").expect("valid").is_within(&StorePath::new("a").expect("valid"))
        );
    }
}
