//! Loads a stream into a QEMU whose guest is stopped, in place of the state that its devices have.
//!
//! QEMU has one command for that which resets the devices first, as it must: `snapshot-load`. What
//! a stream leaves out (subsections that the saved device did not need) is then as in a device that
//! was just made, and not as the running one had it. The command wants the state in an internal
//! snapshot of a qcow2 node. That node is one of ours ([`super::state_image`]) and the only one
//! that the command is given, so it touches no disk. The run state does not change; the clients of
//! monitors, displays and networks stay connected.
//!
//! QEMU's device code reads the guest's memory while it loads, so that must be the checkpoint's
//! already.

use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;

use super::settings::{Found, set_capabilities};
use super::{MigrationError, state_image};
use crate::capture::unnamed;
use crate::fdset::FdSet;
use crate::jobs::{self, tolerate_refusal};
use crate::qmp::{Qmp, QmpError};

const IGNORE_SHARED: &str = "x-ignore-shared";
/// Kinds of what QEMU gets for a load.
const NODE: &str = "state";
const JOB: &str = "load";
const FD_KIND: &str = "load";

/// A stream that QEMU has the node of.
#[derive(Debug)]
pub struct LoadableState {
    qmp: Qmp,
    node: String,
}

impl LoadableState {
    /// Writes `stream` to a file without a name in `directory` and adds it to QEMU; nothing is
    /// loaded yet.
    ///
    /// # Errors
    /// When the file cannot be written, or QEMU does not take it.
    pub async fn prepare(
        qmp: &Qmp,
        directory: &Path,
        stream: Vec<u8>,
    ) -> Result<Self, MigrationError> {
        let node = qmp.names().name(NODE);
        let path = directory.join(format!("{node}.{}", std::process::id()));
        let about = path.clone();
        let write = move || {
            let file = unnamed(&path)?;
            state_image::write(&file, &stream)?;
            Ok(file)
        };
        let written = tokio::task::spawn_blocking(write).await;
        let written = written.map_err(std::io::Error::other).flatten();
        let file = written.map_err(|source| MigrationError::State { path: about, source })?;
        let set = FdSet::add(qmp, file.as_fd(), FD_KIND).await?;
        let options = json!({
            "driver": "qcow2", "node-name": node, "cache": { "no-flush": true },
            "file": {
                "driver": "file", "filename": set.filename(), "locking": "off",
                "cache": { "no-flush": true },
            },
        });
        let added = qmp.execute_json("blockdev-add", options).await;
        set.remove(qmp).await?;
        added?;
        Ok(Self { qmp: qmp.clone(), node })
    }

    /// Resets the devices and loads their state. Only while the guest is stopped.
    ///
    /// # Errors
    /// When QEMU cannot load it: its devices are then in no state in which the guest may run.
    pub async fn load(&self) -> Result<(), MigrationError> {
        let qmp = &self.qmp;
        let was_set = Found::read(qmp).await?.has(IGNORE_SHARED);
        set_capabilities(qmp, vec![(IGNORE_SHARED, true)]).await?;
        let job = qmp.names().name(JOB);
        let arguments = json!({
            "job-id": job, "tag": state_image::SNAPSHOT, "vmstate": self.node,
            "devices": [self.node],
        });
        let loaded = async {
            qmp.execute_json("snapshot-load", arguments).await?;
            jobs::conclude(qmp, &job).await
        };
        let loaded = loaded.await.map_err(|error: jobs::JobError| match error {
            jobs::JobError::Failed { why, .. } => MigrationError::Load { why },
            other => other.into(),
        });
        set_capabilities(qmp, vec![(IGNORE_SHARED, was_set)]).await?;
        loaded
    }

    /// Takes the stream out of QEMU again.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn remove(self) -> Result<(), QmpError> {
        let arguments = json!({ "node-name": self.node });
        tolerate_refusal(self.qmp.execute_json("blockdev-del", arguments).await)
    }
}
