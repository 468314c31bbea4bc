//! Whole machines under test: a real QEMU, a guest that would notice a wrong restore, the real `stillpoint` program.
//!
//! A test makes a [`Lab`] (a directory, a store, a place among the few machines that may run at once), starts a
//! [`TestMachine`] in it by a [`Recipe`], and restores others from its checkpoints. What runs is ended when the values are dropped, also
//! when the test fails; nothing but processes of its own is ever signalled.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `STILLPOINT_TEST_QEMUS` | QEMU programs to test with, separated by colons (default: those of `scripts/install-deps`) |
//! | `STILLPOINT_TEST_PROGRAM` | a `stillpoint` with its plugin beside it, instead of building this tree's |
//! | `STILLPOINT_TEST_KEEP` | leave the directories of the tests behind |

mod built;
mod damage;
mod hdfs;
mod images;
mod lab;
mod machine;
mod process;
mod qemus;
mod qmp;
mod random;
mod recipe;
mod slots;
mod tmpfs;
mod witness;

pub use built::{built, project};
pub use damage::{Damage, copy_tree, files_below};
pub use hdfs::Cluster;
pub use images::{qemu_img, read_image};
pub use lab::{Lab, Ran};
pub use machine::{Outcome, Taken, TestMachine};
pub use process::{Pid, is_running, stop_and_continue, wait_until};
pub use qemus::{newest_qemu, on_each_qemu, qemus};
pub use qmp::QmpClient;
pub use random::Random;
pub use recipe::{Recipe, SCRIBBLER_RAM_BYTES};
pub use tmpfs::SmallStore;
pub use witness::{Line, lines};
