//! The command line of `stillpoint`, as its manual pages and completions (`documents/`) need it.
//! The program is in `main.rs`.

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod cli;
