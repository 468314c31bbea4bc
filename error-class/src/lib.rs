//! What kind of failure an error is: the word from which a caller, and the exit code of a command,
//! tells what to do about it.
//!
//! # Example
//!
//! ```
//! use error_class::{Class, Classified, classes};
//!
//! #[derive(Debug, thiserror::Error)]
//! enum MonitorError {
//!     #[error("another client holds the monitor")]
//!     Held,
//!     #[error("the monitor does not answer")]
//!     Silent,
//! }
//!
//! #[derive(Debug, thiserror::Error)]
//! enum DiskError {
//!     #[error(transparent)]
//!     Monitor(MonitorError),
//!     #[error("disk {name} is encrypted")]
//!     Encrypted { name: String },
//! }
//!
//! classes! {
//!     MonitorError: Refused(Held) Failed(Silent);
//!     DiskError: (Monitor) Refused(Encrypted);
//! }
//!
//! assert_eq!(DiskError::Monitor(MonitorError::Silent).class(), Class::Failed);
//! assert_eq!(DiskError::Encrypted { name: "d".into() }.class(), Class::Refused);
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// What kind of failure an error is; the exit code of a command derives from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Anything else.
    Failed,
    /// What the user wrote cannot be meant, whatever the VM, host and store are.
    Usage,
    /// The VM, its QEMU, this host or the store is not in a state in which it may be done; the
    /// message says what to change.
    Refused,
    /// Store I/O failed.
    Store,
    /// The store holds damaged content.
    Damaged,
}

impl Class {
    /// The code with which a command ends that failed so: see `stillpoint --help`.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::Store => 4,
            Self::Damaged => 5,
        }
    }

    /// The class of another process's failure, by its exit code.
    pub fn of_exit_code(code: u8) -> Self {
        let all = [Self::Usage, Self::Refused, Self::Store, Self::Damaged];
        all.into_iter().find(|class| class.exit_code() == code).unwrap_or(Self::Failed)
    }
}

/// An error that knows its class.
pub trait Classified: std::error::Error {
    /// The class of this error; of the error that it only wraps, if it says nothing of its own.
    fn class(&self) -> Class;
}

/// Implements [`Classified`] for error types by a `match` without a wildcard: a new variant must
/// choose its class, or does not compile.
///
/// For an enum: `Error: (Wrapping, …) {Source, …} Class(Variant, …) …;`. The variants in
/// parentheses wrap one error, those in braces have it in a field `source`, and all of these have
/// the class of that error.
/// For an error whose class does not depend on what it holds: `Error = Class;`.
#[macro_export]
macro_rules! classes {
    () => {};
    ($error:ty = $class:ident; $($rest:tt)*) => {
        impl $crate::Classified for $error {
            fn class(&self) -> $crate::Class {
                $crate::Class::$class
            }
        }
        $crate::classes! { $($rest)* }
    };
    ($error:ty: $(($($wraps:ident),+))? $({$($source:ident),+})?
        $($class:ident($($variant:ident),+))*; $($rest:tt)*) => {
        impl $crate::Classified for $error {
            fn class(&self) -> $crate::Class {
                match self {
                    $($(Self::$wraps(error) => $crate::Classified::class(error),)+)?
                    $($(Self::$source { source, .. } => $crate::Classified::class(source),)+)?
                    $($(Self::$variant { .. })|+ => $crate::Class::$class,)*
                }
            }
        }
        $crate::classes! { $($rest)* }
    };
}
