//! Every phase of a checkpoint, a restore and an adoption beside scripted QEMUs, in milliseconds:
//! each row of docs/protocol.md.
//!
//! `tests/tests/rows.rs` says which test stands for which row. The tests of whole VMs there are
//! beside these, with real QEMUs, guests and kills.

mod adoption;
mod between;
mod commit;
mod disk_export;
mod hooks;
mod kills;
mod on_demand;
mod pause;
mod player;
mod prepare;
mod restore;
mod scene;
mod stream;
mod upload;
