//! All communication with a running QEMU: QMP commands, NBD reads, device state and the migration
//! stream.
//!
//! The order in which a checkpoint uses the modules: [`vm`], [`ramblock`] and [`disks`] query
//! what the VM has; [`capture`] prepares the disks; [`paused`] stops the guest; [`capture`]
//! captures the disks and [`device_state`] the devices; [`nbd`] reads the disks while the guest
//! runs. A restore uses [`images`], then [`stream`] and [`migration`].
//!
//! # Example
//!
//! A monitor is asked for the VM's run state. Here a thread plays QEMU's part:
//!
//! ```
//! use qmp_bridge::Qmp;
//! use std::io::{BufRead, BufReader, Write};
//! use std::os::unix::net::UnixStream;
//! use std::time::Duration;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (ours, mut qemu) = UnixStream::pair()?;
//! std::thread::spawn(move || -> std::io::Result<()> {
//!     let version = r#"{"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}"#;
//!     writeln!(qemu, r#"{{"QMP": {{"version": {version}, "capabilities": ["oob"]}}}}"#)?;
//!     let mut answers = [r#"{}"#, r#"{"status": "running", "running": true}"#].iter();
//!     for line in BufReader::new(qemu.try_clone()?).lines() {
//!         let command: serde_json::Value = serde_json::from_str(&line?)?;
//!         let Some(answer) = answers.next() else { break };
//!         writeln!(qemu, r#"{{"return": {answer}, "id": {}}}"#, command["id"])?;
//!     }
//!     Ok(())
//! });
//! let monitor = Qmp::over(ours, Duration::from_secs(5)).await?;
//! let status = monitor.execute_json("query-status", serde_json::json!({})).await?;
//! assert_eq!((monitor.version().major, status["status"].as_str()), (10, Some("running")));
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

pub mod arriving;
pub mod capture;
mod class;
pub mod device_sections;
pub mod device_state;
pub mod devices;
pub mod disks;
mod fdset;
pub mod guest_agent;
pub mod host_finder;
pub mod images;
mod jobs;
pub mod migration;
mod names;
pub mod nbd;
pub mod nbd_server;
pub mod paused;
pub mod poll;
pub mod qmp;
pub mod quirks;
pub mod ramblock;
pub mod run_state;
pub mod said;
pub mod stream;
mod stream_format;
pub mod stream_reader;
pub mod synthetic_qcow2;
pub mod vm;

pub use jobs::JobError;
pub use nbd_server::ServerError;
pub use paused::{PauseError, Paused};
pub use qmp::{Qmp, QmpError};
pub use run_state::RunState;
