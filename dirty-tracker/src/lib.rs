//! Which pages of a running guest were written, and what is in them.
//!
//! The plugin in QEMU (`plugin/`) opens a userfaultfd there and passes its file descriptor to the
//! helper. Everything else happens here, in another process:
//!
//! 1. [`GuestMemory::create`] makes the RAM file that QEMU is started with.
//! 2. [`PluginHandles::connect`] fetches QEMU's descriptors, [`Tracker::attach`] registers its RAM
//!    blocks.
//! 3. With the guest stopped, [`Tracker::claim`] takes the dirty pages into a [`DirtyClaim`]; when
//!    the guest runs again, [`Tracker::read_pages`] copies them.
//! 4. [`DirtyClaim::acknowledge`] drops the claim for the receipt that this checkpoint is durable;
//!    without it the pages are restored, and the next checkpoint claims them again.
//!
//! Unsafe code is in `sys/` only.
//!
//! # Example
//!
//! A guest's RAM file, of which only what was written takes memory:
//!
//! ```
//! use dirty_tracker::GuestMemory;
//!
//! # fn main() -> Result<(), dirty_tracker::TrackerError> {
//! let memory = GuestMemory::create("pc.ram", 16 << 20)?;
//! memory.write(1 << 20, b"written by the guest")?;
//! assert_eq!(memory.data_ranges()?, [1 << 20..(1 << 20) + 4096]);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod block;
mod claim;
mod error;
mod guest_memory;
mod handles;
mod holes;
mod host_support;
mod maps;
mod missing;
mod sys;
mod tracker;

pub use block::{BlockId, BlockMemory, TrackedBlock};
pub use claim::DirtyClaim;
pub use error::TrackerError;
pub use guest_memory::GuestMemory;
pub use handles::{PluginHandles, UffdSource};
pub use host_support::{HostCheck, HostSupport};
pub use maps::{parse_maps, shown_path};
pub use missing::MissingPages;
pub use tracker::Tracker;
