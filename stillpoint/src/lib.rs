//! The command line of `stillpoint`, as its manual pages and completions (`documents/`) need it.
//! The program is in `main.rs`.

pub mod cli;
