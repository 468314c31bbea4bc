//! Files handed to QEMU as descriptors (`/dev/fdset/N`): its user needs no right to their path, and
//! they need none.

use std::os::fd::BorrowedFd;

use serde_json::json;

use crate::jobs::tolerate_refusal;
use crate::qmp::replies::{self, AddfdInfo, FdsetFdInfo, FdsetInfo};
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
        let AddfdInfo { fdset_id } = replies::parse("add-fd", reply)?;
        Ok(Self { id: fdset_id })
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
    let is_ours =
        |fd: &FdsetFdInfo| fd.opaque.as_deref().is_some_and(|name| qmp.names().owns(name));
    for FdsetInfo { fdset_id, fds } in qmp.query_fdsets().await? {
        if !fds.is_empty() && fds.iter().all(is_ours) {
            FdSet { id: fdset_id }.remove(qmp).await?;
        }
    }
    Ok(())
}
