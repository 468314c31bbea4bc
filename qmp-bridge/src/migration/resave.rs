//! Lets a QEMU that was just loaded, and has not run, write its state again: what it would send to
//! the next host is what it has.
//!
//! Blocks in shared memory are left out (`x-ignore-shared` is set since the load); all others
//! come with every page, then the devices. Afterwards the run state is `postmigrate` and QEMU has
//! given up its disks; `cont` makes it the VM's QEMU again.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use super::channel::Channel;
use super::settings::set_parameter;
use super::watch::{PAUSED_POLL, Watch};
use super::{MigrationError, MigrationStatus};
use crate::qmp::Qmp;

/// QEMU's limit for a stream is meant for networks; here its own speed is the limit. In bytes a
/// second.
const BANDWIDTH: u64 = 100 << 30;
/// After the stream has ended QEMU has little left to do.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts it. The stream must be read to its end, blocking, then [`finish`] is called.
///
/// # Errors
/// When QEMU refuses to migrate.
pub async fn start(qmp: &Qmp) -> Result<UnixStream, MigrationError> {
    let channel = Channel::open(qmp).await?;
    set_parameter(qmp, "max-bandwidth", json!(BANDWIDTH)).await?;
    qmp.execute_json("migrate", json!({ "uri": Channel::uri(qmp) })).await?;
    channel.into_reader()
}

/// Waits until QEMU says that it has written all.
///
/// # Errors
/// When the migration fails or does not end in time.
pub async fn finish(qmp: &Qmp) -> Result<(), MigrationError> {
    let mut watch = Watch::new(qmp, "the saving of QEMU's state", " though its stream has ended");
    watch.wait_for(MigrationStatus::Completed, PAUSED_POLL, END_TIMEOUT).await
}
