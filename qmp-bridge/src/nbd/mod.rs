//! An NBD client for QEMU's exports: fixed newstyle, structured replies, meta contexts, several
//! requests in flight.
//!
//! It is how disk content travels both ways: captures are read from an export of the instant,
//! restores are written through one. Over a unix socket, without TLS. Everything the peer sends is
//! bounded before it is believed.
//!
//! [`server`] is the other side: read-only exports for QEMU to read from.

mod chunks;
mod client;
mod coverage;
mod error;
mod extents;
mod handshake;
mod ranges;
pub mod server;
mod wire;

pub(crate) use client::answers;
pub use client::{NbdClient, REQUEST_TIMEOUT, ZeroMode};
pub use error::NbdError;
pub use extents::{ContextExtents, Extent};
pub use ranges::{Content, ContentRange, content_ranges};
pub use wire::{MAX_IN_FLIGHT, MAX_REQUEST};

/// Names and flags of meta contexts.
pub mod context {
    /// Holes and zeroes.
    pub const BASE_ALLOCATION: &str = "base:allocation";
    /// In which layer a block is: 0 nowhere, 1 the exported node, 2 its backing ...
    pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
    /// `base:allocation` flag: not allocated.
    pub const STATE_HOLE: u32 = 1;
    /// `base:allocation` flag: reads as zeroes.
    pub const STATE_ZERO: u32 = 2;
    /// `qemu:dirty-bitmap:` flag.
    pub const STATE_DIRTY: u32 = 1;

    /// The context of a dirty bitmap.
    pub fn dirty_bitmap(name: &str) -> String {
        format!("qemu:dirty-bitmap:{name}")
    }
}
