//! What is known of one running VM: its QEMU (program, process, command line, monitor), its memory
//! and disks, and the runtime directory in which that is kept. [`launch`] turns an ordinary command
//! line into that of a managed VM, [`external`] reads the same facts from a QEMU that Stillpoint
//! did not start, [`running::Vm`] is a VM of either kind with a helper attached.
//!
//! Nothing here takes or restores a checkpoint; the crate `engine` does.
//!
//! # Example
//!
//! What is known of a VM is in its runtime directory; of one that was never started, nothing:
//!
//! ```
//! use vm::error::{Class, VmError};
//! use vm::runtime_dir::RuntimeDir;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = tempfile::tempdir()?;
//! let runtime = RuntimeDir::new(Some(base.path()), &"web1".parse()?)?;
//! runtime.create()?;
//! assert!(runtime.qmp().ends_with("web1/qmp.sock"));
//!
//! let unknown = runtime.vm().map_err(|error: VmError| (error.class(), error.explain()));
//! assert!(unknown.is_err_and(|(class, text)| class == Class::Refused && text.contains("no VM")));
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod cache;
pub mod drives;
pub mod error;
pub mod external;
pub mod files;
pub mod inventory;
pub mod launch;
pub mod memory_source;
pub mod process;
pub mod process_memory;
pub(crate) mod qemu_lock;
pub mod reopen;
pub mod running;
pub mod runtime_dir;
pub mod tracked_blocks;
