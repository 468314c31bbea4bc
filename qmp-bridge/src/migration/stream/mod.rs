//! QEMU's own migration, into a socket of ours, as a source of memory for VMs that were not
//! launched by us.
//!
//! Two ways, both of stock QEMU:
//! - [`StreamMode::PreCopy`]: memory travels while the guest runs, in passes, until the rest is
//!   small; QEMU stops the guest, sends the rest and the devices, and inactivates its disks. As no
//!   destination takes them, they are made active again while the guest is still stopped, so that a
//!   disk transaction can be of the same instant; then `cont`.
//! - [`StreamMode::BackgroundSnapshot`]: the caller stops the guest and takes the disks; QEMU
//!   write-protects memory by userfaultfd and lets the guest run on; each page is sent before the
//!   guest may overwrite it.
//!
//! Pre-copy is the default, by measurement (Linux of 1 GiB that writes 1500 pages/s, 260 MiB
//! resident, TCG, pause including the disk transaction; median and worst of 6 on a busy host):
//!
//! | | QEMU 7.2 | QEMU 10.0 | stream, 10.0 |
//! | --- | --- | --- | --- |
//! | pre-copy | 12.5, 15.1 ms | 9.8, 20.6 ms | 0.13 to 0.37 s |
//! | background snapshot | refused | 43, 260 ms | 2 to 3 s |
//!
//! Of a pre-copy's pause, 1.5 ms are QEMU's way to the switch-over, 3.5 ms the last pages, the
//! devices and the disks' way out and in, 1.8 ms the transaction, 0.7 ms `cont`; it does not grow
//! with the memory. A background snapshot touches and write-protects each page within the pause,
//! sends each by a system call of its own, and makes a guest that writes wait for our reader: a
//! helper that is stopped (not killed) stops the guest. Before QEMU 9.0 a killed one stops it for
//! ever. Either reads all memory: of private memory nothing becomes resident by that but page
//! tables (2 MiB/GiB), of shared memory (memfd) all of it.
//!
//! Order of calls, pre-copy: [`Migration::prepare`], [`Migration::take_reader`] (the caller must
//! always read), [`Migration::start`], [`Migration::switchover`], [`Migration::complete`], disk
//! transaction, [`Paused::resume`], [`Migration::finish`]. Background snapshot: `prepare`,
//! `take_reader`, [`Paused::stop`], disk transaction, `start`, [`Migration::memory_is_held`]
//! (resumes), `finish`.
//!
//! Whatever goes wrong, also the death of this process, leaves the guest running, its disks active,
//! and QEMU's capabilities and parameters as they were: what was found stands in a journal file
//! before anything is changed, and [`recover`] puts it back.
//!
//! [`Paused::stop`]: crate::Paused::stop
//! [`Paused::resume`]: crate::Paused::resume

mod activation;
mod journal;
mod probe;
mod recover;
mod session;
mod switchover;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use probe::{Support, probe};
pub use recover::{Recovered, recover};
pub use session::Migration;

use super::settings::BACKGROUND_SNAPSHOT;

/// How memory gets out of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamMode {
    /// QEMU write-protects memory and sends each page as it was at the start.
    BackgroundSnapshot,
    /// QEMU sends pages while the guest runs, and those that change again.
    PreCopy,
}

impl StreamMode {
    fn capabilities(self) -> [&'static str; 2] {
        match self {
            Self::BackgroundSnapshot => ["events", BACKGROUND_SNAPSHOT],
            Self::PreCopy => ["events", "pause-before-switchover"],
        }
    }
}

impl fmt::Display for StreamMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackgroundSnapshot => "background snapshot",
            Self::PreCopy => "pre-copy",
        })
    }
}

/// What to do with a guest that writes faster than its memory can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WhenTooFast {
    /// Give up, and say how fast it is.
    Fail,
    /// Stop it for longer than [`StreamOptions::max_pause`].
    SwitchOver,
}

/// How a migration into our reader is run.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Pre-copy: for how long the guest may be stopped for the rest of its memory, by QEMU's
    /// estimate. Device state, disks and the resumption come on top, some milliseconds.
    pub max_pause: Duration,
    /// What to do when the guest writes too fast for `max_pause`.
    pub when_too_fast: WhenTooFast,
    /// For the whole migration.
    pub timeout: Duration,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            max_pause: Duration::from_millis(100),
            when_too_fast: WhenTooFast::Fail,
            timeout: Duration::from_secs(600),
        }
    }
}

#[cfg(test)]
mod test;
