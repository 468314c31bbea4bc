//! QEMU's command line: taken apart as QEMU reads it, put together again, and one table of what each value is for
//! the host. Pure: nothing is opened or asked, so every rule is tested in milliseconds.
//!
//! [`arguments`] and [`form`] are the syntax, [`table`] the meaning, [`sites`] visits and rewrites values by their
//! meaning, [`restorable`] says what a command line may do on the host that restores it.

#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod arguments;
pub mod form;
pub mod restorable;
pub mod sites;
pub mod size;
pub mod table;

pub use arguments::{KeyList, QemuOption, parse, words};
pub use form::Form;
pub use sites::{Site, rewrite, visit};
pub use table::Use;
