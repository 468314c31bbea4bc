//! Whole VMs under test: a real QEMU, a guest that would notice a wrong restore, the real
//! `stillpoint` program.
//!
//! A test makes a [`Lab`] (a directory, a store, a place among the few VMs that may run at once),
//! starts a [`TestVm`] in it by a [`Recipe`], and restores others from its checkpoints. What all of
//! them have is a [`Guest`]. What runs is ended when the values are dropped, also when the test
//! fails; nothing but processes of its own is ever signalled.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `STILLPOINT_TEST_QEMUS` | QEMU programs to test with, separated by colons (default: those of `scripts/install-deps`) |
//! | `STILLPOINT_TEST_PROGRAM` | a `stillpoint` with its plugin beside it, instead of building this tree's |
//! | `STILLPOINT_TEST_THOROUGH` | more of the same: 20 checkpoints on every layout of an external VM (before a release; 20 minutes) |
//! | `STILLPOINT_TEST_KEEP` | keep the directories of failed tests (`failed`), or of all (any other value), and print their names |

mod built;
pub mod cost;
mod damage;
pub mod figures;
mod footprint;
mod guest;
mod hdfs;
mod images;
mod lab;
mod libvirt;
pub mod pages;
mod plain;
mod process;
mod qemus;
mod qmp;
mod random;
mod recipe;
mod registry;
mod scribbles;
mod slots;
mod taken;
mod tmpfs;
pub mod torture;
mod tpm;
mod truth;
mod vm;
mod witness;

pub use built::{built, project};
pub use damage::{Damage, copy_tree, files_below};
pub use footprint::{Footprint, descriptors};
pub use guest::Guest;
pub use hdfs::Cluster;
pub use images::{qemu_img, read_image};
pub use lab::{Lab, Ran};
pub use libvirt::{Domain, Libvirt, Shape};
pub use process::{
    Pid, assert_root, is_running, kill_hard, processor_time, qemus_below, stop_and_continue,
    wait_until,
};
pub use qemus::{major_version, newest_qemu, on_each_qemu, qemus, stream_modes};
pub use qmp::QmpClient;
pub use random::Random;
pub use recipe::{Recipe, SCRIBBLER_RAM_BYTES};
pub use registry::{Registry, own_tests};
pub use scribbles::Scribbles;
pub use taken::{Taken, stored_over_changed};
pub use tmpfs::SmallStore;
pub use tpm::{SoftwareTpm, Tis};
pub use truth::{Scribbled, thorough, wait_for_scribbles};
pub use vm::TestVm;
pub use witness::{Line, lines};
