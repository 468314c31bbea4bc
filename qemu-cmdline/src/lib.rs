//! QEMU's command line: taken apart as QEMU reads it, put together again, and one table of what
//! each value is for the host. Pure: nothing is opened or asked, so every rule is tested in
//! milliseconds.
//!
//! [`arguments`], [`config`] and [`form`] are the syntax, [`table`] the meaning, [`sites`] visits and
//! rewrites values by their meaning, [`restorable`] says what a command line may do on the host that
//! restores it, [`unsupported`] what on it cannot be checkpointed or adopted.
//!
//! # Example
//!
//! Another path for each disk, however it is written:
//!
//! ```
//! use qemu_cmdline::{Use, parse, rewrite, words};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let line = ["-m", "1G", "-drive", "file=/srv/web1.qcow2,if=virtio", "-hdb", "/srv/data.raw"];
//! let options = parse(&line.map(String::from))?;
//! let moved = rewrite(options, |site| {
//!     let is_disk = matches!(site.means, Use::Disk);
//!     is_disk.then(|| site.value.replace("/srv/", "/restored/"))
//! });
//! let expected = ["-m", "1G", "-drive", "file=/restored/web1.qcow2,if=virtio", "-hdb", "/restored/data.raw"];
//! assert_eq!(words(&moved), expected);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod arguments;
pub mod config;
pub mod form;
pub mod restorable;
pub mod sites;
pub mod size;
pub mod table;
pub mod unsupported;

pub use arguments::{KeyList, QemuOption, parse, words};
pub use form::Form;
pub use sites::{Site, rewrite, visit};
pub use table::Use;
