//! Everything this project says to a running QEMU: QMP commands, NBD reads, device state and the migration stream.
//!
//! The order in which a checkpoint uses the modules: [`machine`], [`ramblock`] and [`disks`] tell what there is;
//! [`capture`] prepares the disks; [`paused`] stops the guest; [`capture`] and [`device_state`] take the instant;
//! [`nbd`] drains it while the guest runs on. A restore goes [`images`], then [`stream`] into [`incoming`].

#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod capture;
pub mod device_state;
pub mod devices;
pub mod disks;
mod fdset;
pub mod handover;
pub mod host_finder;
pub mod images;
pub mod incoming;
mod jobs;
pub mod machine;
pub mod migration;
mod names;
pub mod nbd;
pub mod nbd_server;
pub mod paused;
pub mod qmp;
pub mod ramblock;
pub mod resave;
pub mod run_state;
pub mod said;
pub mod stream;
mod stream_format;
pub mod stream_reader;

pub use jobs::JobError;
pub use nbd_server::ServerError;
pub use paused::{PauseError, Paused};
pub use qmp::{Qmp, QmpError};
pub use run_state::RunState;
