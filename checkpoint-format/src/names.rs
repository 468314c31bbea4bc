//! Names that end up in file paths and saved forms, validated once when they are made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::ContentDigest;

/// Longest [`SpaceName`], in bytes. QEMU's RAM block names are up to 255 with their terminator.
pub const MAX_SPACE_NAME: usize = 255;
/// Longest [`VmName`], in bytes.
pub const MAX_VM_NAME: usize = 64;
/// Longest [`PackName`], in bytes.
pub const MAX_PACK_NAME: usize = 96;

#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum NameError {
    #[error("the {what} is empty; give at least one character")]
    Empty { what: &'static str },
    #[error("the {what} is {len} bytes long, the limit is {limit}; choose a shorter one")]
    TooLong { what: &'static str, len: usize, limit: usize },
    #[error("the {what} {name:?} holds {found:?} at byte {at}; allowed: {allowed}")]
    BadCharacter { what: &'static str, name: String, found: char, at: usize, allowed: &'static str },
    #[error(
        "the space name {name:?} has no known kind; it must begin with ram:, disk:, state: or layer:"
    )]
    UnknownKind { name: String },
    #[error(
        "the space name {name:?} has '..' as a path component; rename the RAM block or the disk's node"
    )]
    ParentComponent { name: String },
    #[error("the layer space {name:?} must end in 64 lower-case hex digits")]
    LayerDigest { name: String },
}

/// What a space holds. Written as the prefix of its name, so that a name alone says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpaceKind {
    /// A RAM block of the VM.
    Ram,
    /// The writable layer of a disk.
    Disk,
    /// A byte stream kept whole, such as the device state.
    State,
    /// An immutable disk image, shared between VMs.
    Layer,
}

impl SpaceKind {
    const ALL: [Self; 4] = [Self::Ram, Self::Disk, Self::State, Self::Layer];

    /// The prefix of names of that kind.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Ram => "ram:",
            Self::Disk => "disk:",
            Self::State => "state:",
            Self::Layer => "layer:",
        }
    }
}

impl fmt::Display for SpaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix().trim_end_matches(':'))
    }
}

/// The name of a space: `ram:<block>`, `disk:<node>`, `state:device` or `layer:<digest>`.
///
/// RAM block names hold slashes and colons (`0000:00:02.0/vga.vram`, `/rom@etc/acpi/tables`), so a
/// space name is no file name and must never be used as one; `..` components are refused all the
/// same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpaceName(String);

impl SpaceName {
    /// Parses `kind:name`.
    ///
    /// # Errors
    /// When the kind is unknown, or the name is empty, too long, or has characters that are not
    /// allowed.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        let kind = kind_of(&name).ok_or_else(|| NameError::UnknownKind { name: name.clone() })?;
        check_rest(kind, &name)?;
        Ok(Self(name))
    }

    /// The space of a RAM block.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn ram(block: &str) -> Result<Self, NameError> {
        Self::new(format!("{}{block}", SpaceKind::Ram.prefix()))
    }

    /// The space of a disk, by its node name.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn disk(node: &str) -> Result<Self, NameError> {
        Self::new(format!("{}{node}", SpaceKind::Disk.prefix()))
    }

    /// The one space for the device state.
    pub fn device_state() -> Self {
        Self(format!("{}device", SpaceKind::State.prefix()))
    }

    /// The space of a layer's blocks.
    pub fn layer(digest: ContentDigest) -> Self {
        Self(format!("{}{digest}", SpaceKind::Layer.prefix()))
    }

    /// The whole name, with its prefix.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The kind that the prefix says.
    ///
    /// # Panics
    /// Never: the constructors check the prefix.
    pub fn kind(&self) -> SpaceKind {
        kind_of(&self.0).expect("the constructor accepts only names with a known prefix")
    }

    /// What follows the kind: the RAM block's or the node's name.
    pub fn local(&self) -> &str {
        &self.0[self.kind().prefix().len()..]
    }
}

fn kind_of(name: &str) -> Option<SpaceKind> {
    SpaceKind::ALL.into_iter().find(|kind| name.starts_with(kind.prefix()))
}

fn check_rest(kind: SpaceKind, name: &str) -> Result<(), NameError> {
    let rest = &name[kind.prefix().len()..];
    check_length("space name", rest.len(), MAX_SPACE_NAME - kind.prefix().len())?;
    check_characters("space name", name, "printable ASCII", |_, c| {
        c == ' ' || c.is_ascii_graphic()
    })?;
    if rest.split('/').any(|component| component == "..") {
        return Err(NameError::ParentComponent { name: name.into() });
    }
    if kind == SpaceKind::Layer && rest.parse::<ContentDigest>().is_err() {
        return Err(NameError::LayerDigest { name: name.into() });
    }
    Ok(())
}

/// The name of a VM in the store: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`, so that it is one safe path
/// component.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// Checks the name of a VM.
    ///
    /// # Errors
    /// When it is empty, too long, or has characters that are not allowed in a path.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        check_file_name("VM name", &name, MAX_VM_NAME)?;
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The file name of a pack inside its checkpoint or layer: one safe path component.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PackName(String);

impl PackName {
    /// Checks the name of a pack.
    ///
    /// # Errors
    /// When it is empty, too long, or has characters that are not allowed in a path.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        check_file_name("pack name", &name, MAX_PACK_NAME)?;
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_file_name(what: &'static str, name: &str, limit: usize) -> Result<(), NameError> {
    const ALLOWED: &str = "letters, digits, '.', '_' and '-', the first a letter or a digit";
    check_length(what, name.len(), limit)?;
    check_characters(what, name, ALLOWED, |at, c| {
        c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '.' | '_' | '-'))
    })
}

fn check_length(what: &'static str, len: usize, limit: usize) -> Result<(), NameError> {
    match len {
        0 => Err(NameError::Empty { what }),
        _ if len > limit => Err(NameError::TooLong { what, len, limit }),
        _ => Ok(()),
    }
}

fn check_characters(
    what: &'static str,
    name: &str,
    allowed: &'static str,
    is_allowed: impl Fn(usize, char) -> bool,
) -> Result<(), NameError> {
    match name.char_indices().find(|&(at, c)| !is_allowed(at, c)) {
        None => Ok(()),
        Some((at, found)) => {
            Err(NameError::BadCharacter { what, name: name.into(), found, at, allowed })
        }
    }
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    )*};
}

text!(SpaceName, VmName, PackName);

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn real_ram_block_names_are_accepted() {
        for block in ["pc.ram", "0000:00:02.0/vga.vram", "/rom@etc/acpi/tables", "a..b"] {
            let name = SpaceName::ram(block).expect(block);
            assert_eq!((name.kind(), name.local()), (SpaceKind::Ram, block));
        }
    }

    #[test]
    fn bad_space_names_are_refused_for_their_own_reason() {
        let refused = |name: &str| SpaceName::new(name).expect_err(name);
        assert!(matches!(refused("cpu:0"), NameError::UnknownKind { .. }));
        assert!(matches!(refused("ram"), NameError::UnknownKind { .. }));
        assert!(matches!(refused("ram:"), NameError::Empty { .. }));
        assert!(matches!(refused("ram:a/../b"), NameError::ParentComponent { .. }));
        assert!(matches!(refused("ram:.."), NameError::ParentComponent { .. }));
        assert!(matches!(refused("ram:a\nb"), NameError::BadCharacter { at: 5, .. }));
        assert!(matches!(refused("disk:ä"), NameError::BadCharacter { .. }));
        assert!(matches!(refused("layer:00"), NameError::LayerDigest { .. }));
    }

    #[test]
    fn a_space_name_may_be_255_bytes_and_no_longer() {
        let longest = "x".repeat(MAX_SPACE_NAME - "ram:".len());
        assert_eq!(SpaceName::ram(&longest).expect("fits").as_str().len(), 255);
        let error = SpaceName::ram(&(longest + "x")).expect_err("one more");
        assert!(matches!(error, NameError::TooLong { .. }));
    }

    #[test]
    fn names_made_without_checks_would_pass_them() {
        for name in [SpaceName::device_state(), SpaceName::layer(ContentDigest::of(b""))] {
            assert_eq!(SpaceName::new(name.as_str()), Ok(name));
        }
    }

    #[test]
    fn vm_names_are_single_path_components() {
        for good in ["a", "web-1.prod_x", &"v".repeat(64)] {
            assert_eq!(VmName::new(good).expect(good).as_str(), good);
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "é", &"v".repeat(65)] {
            assert!(VmName::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn saved_names_are_checked_when_read() {
        assert!(serde_json::from_str::<VmName>("\"../etc\"").is_err());
        assert!(serde_json::from_str::<SpaceName>("\"ram:pc.ram\"").is_ok());
        assert!(serde_json::from_str::<PackName>("\".hidden\"").is_err());
    }
}
