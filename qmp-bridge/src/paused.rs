//! The pause: a guard that owns the guest's stopped state, and whose drop lets it run again.
//!
//! Two dangers decide its form. A helper that fails between `stop` and `cont` must not leave the guest stopped:
//! so `drop` sends `cont`, synchronously, even while a runtime goes down, and waits a moment for the reply, since a
//! command whose connection closes at once is lost in QEMU. A helper that is killed there cannot do
//! that: so before each stop a marker object is put into QEMU, outside the pause, and
//! [`resume_abandoned`] of the next helper finds it and resumes, without ever resuming a guest that its owner stopped.
//!
//! A migration's switch-over is the same pause with another beginning and end: QEMU stops the guest by itself, and
//! before it has completed only `migrate_cancel` lets the guest run again. And while QEMU writes the last of the stream it
//! hears no command, so if nobody reads, only cutting the stream does: the guard can hold it for that. It has a marker of its own, since that one
//! lies in QEMU while the guest still runs, for seconds, and must not speak for a `stop` of the owner. Nor does it alone
//! allow to resume: a guest that was migrated away looks the same. [`crate::migration::recover`] knows which it was.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// Id of the object that says: whoever finds the guest paused, we did it.
const MARKER: &str = "stillpoint-paused";

/// Id of the object that says: a guest that runs is about to be stopped by a migration of ours.
const SWITCHOVER_MARKER: &str = "stillpoint-switchover";

/// How long a cancelled migration may take to let the guest run again.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);
const CANCEL_LOOK: Duration = Duration::from_millis(1);

/// How long a drop may block its thread until QEMU has taken the `cont`; usually less than a millisecond.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// What has to be done before the guest is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    Cont,
    /// Before the migration has completed `migrate_cancel`, after that `cont`. In the wrong one's place each is harmless.
    CancelOrCont,
}

/// The guest's vCPUs are stopped and its block I/O is drained, for as long as this lives.
#[must_use = "dropping the guard resumes the guest"]
#[derive(Debug)]
pub struct Paused {
    qmp: Qmp,
    owed: Owed,
    /// What lies in QEMU for the case of our death.
    marker: Option<&'static str>,
    /// The stream of a migration that may hold up QEMU.
    stream: Option<UnixStream>,
    ran: bool,
    since: Instant,
}

impl Paused {
    /// Stops the guest. What has to be asked is asked before, so the pause begins with the one `stop`.
    pub async fn stop(qmp: &Qmp) -> Result<Self, QmpError> {
        let ran = is_running(qmp).await?;
        if ran {
            place_marker(qmp, MARKER).await?;
        }
        // From here on the drop resumes, also when this future is dropped in the middle or `stop` times out.
        let (owed, marker) = if ran { (Owed::Cont, Some(MARKER)) } else { (Owed::Nothing, None) };
        let paused = Self { qmp: qmp.clone(), owed, marker, stream: None, ran, since: Instant::now() };
        if ran {
            qmp.execute(qapi::qmp::stop {}).await?;
        }
        Ok(paused)
    }

    /// To be called before a migration that will stop the guest: if it runs, leaves word that it is to run again. Returns
    /// whether it runs.
    pub(crate) async fn announce_switchover(qmp: &Qmp) -> Result<bool, QmpError> {
        let runs = is_running(qmp).await?;
        if runs {
            place_marker(qmp, SWITCHOVER_MARKER).await?;
        }
        Ok(runs)
    }

    /// The guard of a pause that a migration of ours begins, now or later: its drop cancels the migration.
    pub(crate) fn by_switchover(qmp: &Qmp) -> Self {
        let marker = Some(SWITCHOVER_MARKER);
        Self { qmp: qmp.clone(), owed: Owed::CancelOrCont, marker, stream: None, ran: true, since: Instant::now() }
    }

    /// From now on the drop cuts this stream before it speaks to QEMU.
    pub(crate) fn hold_stream(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
    }

    /// QEMU has stopped the guest at `since`, or found it stopped by its owner.
    pub(crate) fn switched_over(&mut self, ran: bool, since: Instant) {
        self.ran = ran;
        self.since = since;
    }

    /// Whether the guest ran when it was stopped; if not, [`Self::resume`] leaves it stopped.
    pub fn guest_ran(&self) -> bool {
        self.ran
    }

    /// Time since `stop` was sent, or since QEMU stopped it.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Lets the guest run again if it ran before. Returns the time from sending `stop` to the reply of `cont`.
    pub async fn resume(mut self) -> Result<Duration, QmpError> {
        match self.owed {
            Owed::Nothing => return Ok(self.since.elapsed()),
            Owed::Cont => cont(&self.qmp).await?,
            Owed::CancelOrCont => end_switchover(&self.qmp, self.ran).await?,
        }
        self.owed = Owed::Nothing;
        let paused = self.since.elapsed();
        self.remove_marker();
        Ok(paused)
    }

    /// Gives up the guard and leaves the guest stopped, for a last checkpoint before QEMU is ended.
    pub fn leave_stopped(mut self) {
        self.owed = Owed::Nothing;
        self.remove_marker();
    }

    fn remove_marker(&self) {
        let Some(marker) = self.marker else { return };
        if self.qmp.send_detached("object-del", json!({ "id": marker })).is_err() {
            tracing::debug!("the pause marker stays: the QMP connection is gone");
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let commands: &[&str] = match (self.owed, self.ran) {
            (Owed::Nothing, _) => return,
            (Owed::Cont, _) => &["cont"],
            (Owed::CancelOrCont, true) => &["migrate_cancel", "cont"],
            (Owed::CancelOrCont, false) => &["migrate_cancel"],
        };
        tracing::warn!("a pause was abandoned after {:?}; resuming the guest", self.since.elapsed());
        if let Some(stream) = &self.stream {
            // Fails only when it is cut already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for command in commands {
            if let Err(error) = self.qmp.send_and_linger(command, Value::Null, LAST_PATIENCE) {
                return tracing::error!(%error, "cannot resume the guest; the next start of the helper will");
            }
        }
        self.remove_marker();
    }
}

/// A migration of the stopped guest that has just ended, or was cancelled, keeps QEMU from it for a moment.
async fn cont(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute(qapi::qmp::cont {}).await {
        Err(error) if error.is_refusal() && run_state(qmp).await? == "finish-migrate" => {
            leave_finish_migrate(qmp).await?;
            qmp.execute(qapi::qmp::cont {}).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// `cont` if the migration has completed; else it is cancelled, and QEMU lets a guest that ran run again.
async fn end_switchover(qmp: &Qmp, ran: bool) -> Result<(), QmpError> {
    if ran {
        match qmp.execute(qapi::qmp::cont {}).await {
            Err(error) if error.is_refusal() => tracing::debug!(%error, "not completed; cancelling instead"),
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

/// Resumes a guest that a migration of a dead helper stopped, or that the helper had stopped for it. Only the caller can know that
/// the last migration was that
/// one and no other, and that it is over or cancelled. Returns whether there was one.
pub(crate) async fn resume_switched_over(qmp: &Qmp) -> Result<bool, QmpError> {
    let is_owed = marker_present(qmp, SWITCHOVER_MARKER).await? || marker_present(qmp, MARKER).await?;
    let stopped = is_owed && in_switchover(qmp).await?;
    if stopped {
        end_switchover(qmp, true).await?;
    }
    Ok(stopped)
}

/// Takes back the word of [`Paused::announce_switchover`] when the migration is over, unless a guard still needs it.
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
async fn leave_finish_migrate(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + CANCEL_PATIENCE;
    while run_state(qmp).await? == "finish-migrate" {
        if Instant::now() >= deadline {
            return Err(QmpError::Timeout { command: "migrate_cancel".into(), after: CANCEL_PATIENCE });
        }
        tokio::time::sleep(CANCEL_LOOK).await;
    }
    Ok(())
}

async fn in_switchover(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(matches!(run_state(qmp).await?.as_str(), "finish-migrate" | "postmigrate"))
}

/// Resumes a guest that an earlier helper stopped and did not live to resume. Returns whether it did.
pub async fn resume_abandoned(qmp: &Qmp) -> Result<bool, QmpError> {
    if !marker_present(qmp, MARKER).await? {
        return Ok(false);
    }
    let stopped = run_state(qmp).await? == "paused";
    if stopped {
        qmp.execute(qapi::qmp::cont {}).await?;
    }
    qmp.execute_json("object-del", json!({ "id": MARKER })).await?;
    Ok(stopped)
}

/// QEMU's run state by name (`running`, `paused`, `inmigrate` ...).
pub async fn run_state(qmp: &Qmp) -> Result<String, QmpError> {
    let status = qmp.execute_json("query-status", Value::Null).await?;
    match status["status"].as_str() {
        Some(name) => Ok(name.into()),
        None => Err(QmpError::unexpected("query-status", "a status", &status)),
    }
}

/// A suspended guest counts as running: QEMU wakes it by itself, and `cont` brings it back to that state.
async fn is_running(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(matches!(run_state(qmp).await?.as_str(), "running" | "suspended"))
}

/// Puts an object into QEMU that does nothing but say something to a later helper.
pub(crate) async fn place_marker(qmp: &Qmp, marker: &str) -> Result<(), QmpError> {
    let made = qmp.execute_json("object-add", json!({ "qom-type": "throttle-group", "id": marker })).await;
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
    crate::jobs::tolerate_refusal(qmp.execute_json("object-del", json!({ "id": marker })).await)
}

pub(crate) async fn marker_present(qmp: &Qmp, marker: &str) -> Result<bool, QmpError> {
    let objects = qmp.execute_json("qom-list", json!({ "path": "/objects" })).await?;
    Ok(objects.as_array().is_some_and(|list| list.iter().any(|object| object["name"] == marker)))
}

#[cfg(test)]
mod test;
