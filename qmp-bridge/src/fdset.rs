//! Files handed to QEMU as descriptors (`/dev/fdset/N`): its user needs no right to their path, and
//! they need none.

use std::os::fd::BorrowedFd;

use serde_json::{Value, json};

use crate::jobs::tolerate_refusal;
use crate::qmp::{Qmp, QmpError};

/// A descriptor that QEMU keeps under a file name until [`Self::remove`]; what has opened it by
/// then stays open.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FdSet {
    id: u64,
}

impl FdSet {
    /// QEMU opens it only with the very access mode that `file` has.
    pub(crate) async fn add(qmp: &Qmp, file: BorrowedFd<'_>, kind: &str) -> Result<Self, QmpError> {
        let reply = qmp
            .execute_with_fd("add-fd", json!({ "opaque": qmp.names().name(kind) }), file)
            .await?;
        let id = reply["fdset-id"]
            .as_u64()
            .ok_or_else(|| QmpError::unexpected("add-fd", "a set", &reply))?;
        Ok(Self { id })
    }

    pub(crate) fn filename(self) -> String {
        format!("/dev/fdset/{}", self.id)
    }

    /// QEMU before 9.1 closes it only while the guest runs: [`remove_all`] of a later capture does.
    pub(crate) async fn remove(self, qmp: &Qmp) -> Result<(), QmpError> {
        tolerate_refusal(qmp.execute_json("remove-fd", json!({ "fdset-id": self.id })).await)
    }

    /// For a drop.
    pub(crate) fn remove_detached(self, qmp: &Qmp) -> Result<(), QmpError> {
        qmp.send_detached("remove-fd", json!({ "fdset-id": self.id }))
    }
}

/// Removes what a killed helper left.
pub(crate) async fn remove_all(qmp: &Qmp) -> Result<(), QmpError> {
    let reply = qmp.execute_json("query-fdsets", Value::Null).await?;
    for set in reply.as_array().into_iter().flatten() {
        let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is_ours = |fd: &Value| fd["opaque"].as_str().is_some_and(|name| qmp.names().owns(name));
        if let (Some(id), false, true) =
            (set["fdset-id"].as_u64(), fds.is_empty(), fds.iter().all(is_ours))
        {
            FdSet { id }.remove(qmp).await?;
        }
    }
    Ok(())
}
