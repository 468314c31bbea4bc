//! Adoption: a VM that is attached by its monitor moves, while it runs, into a managed QEMU.
//!
//! ```text
//! plan      nothing done   what is in the way is refused, with what to do
//! start     guest runs     a second QEMU of the same VM, paused, its RAM in our memory
//! move      guest runs     QEMU's own live migration, over a unix socket
//! switch    guest paused   rest of memory, devices, disks; the decision; `cont` in the new QEMU
//! finish    guest runs     the old QEMU ends, sockets are renamed, machine.json is updated
//! ```
//! The files come in that order: `plan` (with `line`, `sockets` and `host`), `destination`, `steps`
//! (with `memory`), `record` (how far it is, on disk), `finish`, `recover` (back, or on, after a
//! failure or a killed helper).

mod destination;
mod finish;
mod host;
mod line;
mod memory;
mod plan;
mod record;
mod recover;
mod sockets;
mod steps;

use serde::{Deserialize, Serialize};

pub use recover::recover;
pub use steps::adopt;

/// What `stillpoint adopt --json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adopted {
    /// Always true: an adoption that fails is an error, not a result.
    pub adopted: bool,
    /// From the old QEMU's STOP to the new one's RESUME, in milliseconds.
    pub downtime_ms: f64,
    /// In milliseconds, as the old QEMU counts, which does not know the new one's part; none if it
    /// reported none.
    pub qemu_downtime_ms: Option<f64>,
    /// From the request on, in milliseconds.
    pub total_ms: f64,
    /// The old QEMU's process, which has ended.
    pub source_pid: u32,
    /// The new QEMU's process, which runs the guest.
    pub pid: u32,
    /// What the owner should know though all went well.
    pub notes: Vec<String>,
}
