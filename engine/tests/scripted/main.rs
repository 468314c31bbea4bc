//! Every phase of a checkpoint beside a scripted VM, in milliseconds: each row of docs/protocol.md.
//!
//! `tests/tests/rows.rs` says which test stands for which row. The tests of whole VMs there are
//! beside these, with real QEMUs, guests and kills.

mod between;
mod commit;
mod kills;
mod on_demand;
mod pause;
mod prepare;
mod scene;
mod stream;
mod upload;
