//! The command line of `stillpoint`, as its manual pages and completions (`documents/`) need it.
//! The program is in `main.rs`.
//!
//! # Example
//!
//! ```
//! use clap::Parser;
//! use stillpoint_cli::cli::{Cli, Command};
//!
//! # fn main() -> Result<(), clap::Error> {
//! let cli = Cli::try_parse_from(["stillpoint", "checkpoint", "web1", "--full"])?;
//! let Command::Checkpoint(args) = cli.command else { panic!("another command") };
//! assert!(args.name.as_str() == "web1" && args.full && !args.json);
//! assert!(Cli::try_parse_from(["stillpoint", "checkpoint"]).is_err());
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod cli;
