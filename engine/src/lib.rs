//! Checkpoints of running VMs: [`checkpoint`] takes them, [`restore`] restores one, [`boot`]
//! prepares a new VM and [`adopt`] moves an external one into a managed QEMU, [`verify`] reads back
//! what is stored and [`proof`] restores it in a sandbox and compares, [`doctor`] checks what a
//! host can do; [`layers`] and [`pack`] store and read data, [`lineage`] is a checkpoint with its
//! ancestors.
//!
//! Nothing here prints or parses arguments; the crate `stillpoint` does. Progress is reported to a
//! [`progress::Progress`].

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod adopt;
pub mod boot;
pub mod checkpoint;
pub mod doctor;
pub mod kill_point;
pub mod layers;
pub mod lineage;
pub(crate) mod pack;
pub mod progress;
pub mod proof;
pub mod restore;
pub mod run_state;
pub mod stores;
pub mod verify;
