//! QEMU's live migration, in the four ways in which it is used:
//! - [`Migration`]: into a socket of ours, as the source of memory of a VM that continues;
//! - [`LocalMigration`]: into another QEMU on the same host, where the VM continues;
//! - [`Incoming`]: out of a checkpoint, into a QEMU that was just started;
//! - [`resave`]: out of such a QEMU again, to compare.
//!
//! All share what QEMU has once: its settings, its status and events, and its decision when the
//! guest stops.

mod channel;
mod downtime;
mod error;
mod in_place;
mod incoming;
mod local;
pub mod resave;
mod settings;
mod state_image;
mod status;
mod stream;
mod watch;

pub use error::MigrationError;
pub use in_place::LoadableState;
pub use incoming::{Incoming, LOAD_TIMEOUT};
pub use local::{BitmapMap, Downtime, LocalMigration, resume_source};
pub use settings::Found;
pub use status::{MigrationStatus, Progress, RamProgress, check_idle};
pub use stream::{
    Migration, Recovered, StreamMode, StreamOptions, Support, WhenTooFast, probe, recover,
};

/// A migration in messages.
const MIGRATION: &str = "QEMU's migration";
