//! Checkpoints of running VMs: [`checkpoint`] takes them, [`restore`] restores one, [`boot`]
//! prepares a new VM and [`adopt`] moves an external one into a managed QEMU, [`verify`] reads back
//! what is stored and [`proof`] restores it in a sandbox and compares, [`doctor`] checks what a
//! host can do; [`layers`] and `pack` store and read data, [`lineage`] is a checkpoint with its
//! ancestors.
//!
//! Nothing here prints or parses arguments; the crate `stillpoint` does. Progress is reported to a
//! [`progress::Progress`].
//!
//! # Example
//!
//! A read-only image is stored as a layer, once for all VMs on it:
//!
//! ```
//! use checkpoint_store::{MemoryStore, Mode, Repository};
//! use engine::layers;
//! use std::sync::Arc;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let repository = Repository::open(Arc::new(MemoryStore::new()), Mode::CreateIfMissing).await?;
//! let image = tempfile::NamedTempFile::new()?;
//! std::fs::write(image.path(), [7; 100_000])?;
//!
//! let file = layers::of_file(image.path())?;
//! assert_eq!(file.len.0, 100_000);
//! assert!(layers::ensure(&repository, image.path(), file).await? > 0);
//! assert_eq!(layers::ensure(&repository, image.path(), file).await?, 0);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod adopt;
pub mod boot;
pub mod checkpoint;
pub mod doctor;
mod index;
pub mod kill_point;
pub mod layers;
pub mod lineage;
pub(crate) mod pack;
pub mod progress;
pub mod proof;
pub mod restore;
pub mod rollback;
pub mod run_state;
pub mod stores;
pub mod verify;
