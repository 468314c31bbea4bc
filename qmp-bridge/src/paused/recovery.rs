//! What a pause needs beyond its own guard: the marker objects in QEMU, the end of a switch-over,
//! and the guest of a helper that died.

use std::time::Duration;

use serde_json::{Value, json};

use super::{MARKER, SWITCHOVER_MARKER, is_running};
use crate::poll::poll_until;
use crate::qmp::{Qmp, QmpError};
use crate::run_state;

/// How long a cancelled migration may take to let the guest run again.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);
const CANCEL_POLL: Duration = Duration::from_millis(1);

/// `cont` if the migration has completed; else it is cancelled, and QEMU lets a guest that ran run
/// again.
pub(super) async fn end_switchover(qmp: &Qmp, ran: bool) -> Result<(), QmpError> {
    if ran {
        match qmp.execute(qapi::qmp::cont {}).await {
            Err(error) if error.is_refusal() => {
                tracing::debug!(%error, "not completed; cancelling instead")
            }
            other => return other.map(drop),
        }
    }
    qmp.execute_json("migrate_cancel", Value::Null).await?;
    leave_finish_migrate(qmp).await?;
    if ran && !is_running(qmp).await? {
        qmp.execute(qapi::qmp::cont {}).await?;
    }
    Ok(())
}

/// Resumes a guest that a migration of a dead helper stopped, or that the helper had stopped for
/// it. Only the caller can know that the last migration was that
/// one and no other, and that it is over or cancelled. Returns whether there was one.
pub(crate) async fn resume_switched_over(qmp: &Qmp) -> Result<bool, QmpError> {
    let is_ours =
        marker_present(qmp, SWITCHOVER_MARKER).await? || marker_present(qmp, MARKER).await?;
    let stopped = is_ours && in_switchover(qmp).await?;
    if stopped {
        end_switchover(qmp, true).await?;
    }
    Ok(stopped)
}

/// Removes the marker of [`super::Paused::announce_switchover`] when the migration is over, unless
/// a guard still needs it.
pub(crate) async fn withdraw_switchover(qmp: &Qmp) -> Result<(), QmpError> {
    if !marker_present(qmp, SWITCHOVER_MARKER).await? {
        return Ok(());
    }
    leave_finish_migrate(qmp).await?;
    if in_switchover(qmp).await? {
        return Ok(());
    }
    remove_marker(qmp, SWITCHOVER_MARKER).await
}

/// A migration is over a little before QEMU has put the guest into the state that follows.
pub(super) async fn leave_finish_migrate(qmp: &Qmp) -> Result<(), QmpError> {
    let left = || async {
        match run_state::name(qmp).await {
            Ok(state) if state == "finish-migrate" => None,
            other => Some(other.map(drop)),
        }
    };
    let late =
        || Err(QmpError::Timeout { command: "migrate_cancel".into(), after: CANCEL_TIMEOUT });
    poll_until(CANCEL_TIMEOUT, CANCEL_POLL, left).await.unwrap_or_else(late)
}

async fn in_switchover(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(matches!(run_state::name(qmp).await?.as_str(), "finish-migrate" | "postmigrate"))
}

/// Resumes a guest that an earlier helper stopped and did not live to resume, also when it was
/// reset since. Returns whether it did. If QEMU refuses, the marker stays, and the next call tries
/// again.
///
/// # Errors
/// When QEMU does not answer, or does not resume the guest.
pub async fn resume_abandoned(qmp: &Qmp) -> Result<bool, QmpError> {
    if !marker_present(qmp, MARKER).await? {
        return Ok(false);
    }
    let stopped = matches!(run_state::name(qmp).await?.as_str(), "paused" | "prelaunch");
    if stopped {
        qmp.execute(qapi::qmp::cont {}).await?;
    }
    qmp.execute_json("object-del", json!({ "id": qmp.names().name(MARKER) })).await?;
    Ok(stopped)
}

/// A guest that an earlier helper stopped is not resumed by the next.
///
/// # Errors
/// When QEMU does not answer.
pub async fn leave_stopped(qmp: &Qmp) -> Result<(), QmpError> {
    if marker_present(qmp, MARKER).await? { remove_marker(qmp, MARKER).await } else { Ok(()) }
}

/// If this process ends from here on, the next helper resumes the guest, which is stopped.
///
/// # Errors
/// When QEMU does not answer.
pub async fn resume_later(qmp: &Qmp) -> Result<(), QmpError> {
    place_marker(qmp, MARKER).await
}

/// Puts an object into QEMU that does nothing but say something to a later helper.
pub(crate) async fn place_marker(qmp: &Qmp, marker: &str) -> Result<(), QmpError> {
    let made = qmp
        .execute_json(
            "object-add",
            json!({ "qom-type": "throttle-group", "id": qmp.names().name(marker) }),
        )
        .await;
    match made {
        // One is left by a pause whose end was not acknowledged; it says the same.
        Err(error) if error.is_refusal() && marker_present(qmp, marker).await? => {
            tracing::debug!(%error, "the pause marker is already there");
            Ok(())
        }
        other => other.map(drop),
    }
}

pub(crate) async fn remove_marker(qmp: &Qmp, marker: &str) -> Result<(), QmpError> {
    let id = qmp.names().name(marker);
    crate::jobs::tolerate_refusal(qmp.execute_json("object-del", json!({ "id": id })).await)
}

pub(crate) async fn marker_present(qmp: &Qmp, marker: &str) -> Result<bool, QmpError> {
    let id = qmp.names().name(marker);
    Ok(qmp.qom_list("/objects").await?.iter().any(|object| object.name == id))
}
