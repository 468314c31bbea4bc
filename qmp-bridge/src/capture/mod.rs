//! Disks of one instant, without stopping for their content.
//!
//! Per writable disk node N, within the pause:
//! - a new dirty bitmap B begins, and the one before it, A, stops: A holds what changed since the
//!   parent checkpoint;
//! - a `copy-before-write` filter is inserted between N and its device: it saves each block of N
//!   into a fleecing overlay before the guest overwrites it. `filter.rs` says why that filter, and
//!   where `blockdev-backup sync=none` has to do.
//!
//! What shows N as it was in that instant (`snapshot-access` above the filter; or the overlay,
//! whose backing is N) is exported over NBD with A as a meta context and read while the guest runs.
//! Then:
//! - [`CapturedDisks::release`] ends the copying before write, as soon as all is read;
//! - [`CapturedDisks::acknowledge`] drops A for the receipt that this checkpoint is durable; or
//! - [`CapturedDisks::restore`] merges B into A and lets A record again, so that the next
//!   checkpoint carries both.
//!
//! Order: [`PreparedDisks::prepare`] (guest runs) → [`PreparedDisks::capture`] (guest paused) →
//! [`CapturedDisks::export`]. A capture that is dropped is torn down and its bitmaps are restored
//! in the background; one whose helper was killed is found by its names, which carry the instance,
//! and cleaned up by [`cleanup_leftovers`]. Bitmaps live in QEMU's memory, named with the ID of the
//! checkpoint after which they record, so they survive the helper and not the VM.
//!
//! One QEMU has at most one capture at a time: the names rely on it.

mod arriving;
mod bitmaps;
mod captured;
mod changes;
mod error;
mod filter;
mod fleecing;
mod guard;
mod leftovers;
mod names;
mod prepare;
mod rewrite;
mod size_marks;
mod storage;
mod sweep;
mod turn;

pub use bitmaps::{KeptBitmap, restart_recording, start_recording};
pub use captured::{CapturedDisk, CapturedDisks};
pub use changes::{DiskChanges, changes_since};
pub use error::CaptureError;
pub(crate) use fleecing::unnamed;
pub use leftovers::{CapturePlaces, Leftovers, cleanup_leftovers};
pub use names::{BadTag, BitmapTag};
pub use prepare::{CapturePlan, DEFAULT_FLEECING_RESERVE, Outlook, PreparedDisks};
pub use rewrite::{DiskRewrite, RewrittenDisk, differing, write_differing};
