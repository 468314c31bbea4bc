//! The pause: a guard that owns the guest's stopped state, and whose drop lets it run again.
//!
//! Two dangers decide its form. A helper that fails between `stop` and `cont` must not leave the guest stopped:
//! so `drop` sends `cont`, synchronously, even while a runtime goes down, and waits a moment for the reply, since a
//! command whose connection closes at once is lost in QEMU. A helper that is killed there cannot do
//! that: so before each stop a marker object is put into QEMU, outside the pause, and
//! [`resume_abandoned`] of the next helper finds it and resumes, without ever resuming a guest that its owner stopped.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// Id of the object that says: whoever finds the guest paused, we did it.
const MARKER: &str = "stillpoint-paused";

/// How long a drop may block its thread until QEMU has taken the `cont`; usually less than a millisecond.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// The guest's vCPUs are stopped and its block I/O is drained, for as long as this lives.
#[must_use = "dropping the guard resumes the guest"]
#[derive(Debug)]
pub struct Paused {
    qmp: Qmp,
    /// Whether we have to let it run again.
    owes_cont: bool,
    ran: bool,
    since: Instant,
}

impl Paused {
    /// Stops the guest. What has to be asked is asked before, so the pause begins with the one `stop`.
    pub async fn stop(qmp: &Qmp) -> Result<Self, QmpError> {
        let ran = is_running(qmp).await?;
        if ran {
            place_marker(qmp).await?;
        }
        // From here on the drop resumes, also when this future is dropped in the middle or `stop` times out.
        let paused = Self { qmp: qmp.clone(), owes_cont: ran, ran, since: Instant::now() };
        if ran {
            qmp.execute(qapi::qmp::stop {}).await?;
        }
        Ok(paused)
    }

    /// Whether the guest ran when it was stopped; if not, [`Self::resume`] leaves it stopped.
    pub fn guest_ran(&self) -> bool {
        self.ran
    }

    /// Time since `stop` was sent.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Lets the guest run again if it ran before. Returns the time from sending `stop` to the reply of `cont`.
    pub async fn resume(mut self) -> Result<Duration, QmpError> {
        if self.owes_cont {
            self.qmp.execute(qapi::qmp::cont {}).await?;
            self.owes_cont = false;
            let paused = self.since.elapsed();
            self.remove_marker();
            return Ok(paused);
        }
        Ok(self.since.elapsed())
    }

    /// Gives up the guard and leaves the guest stopped, for a last checkpoint before QEMU is ended.
    pub fn leave_stopped(mut self) {
        self.owes_cont = false;
        self.remove_marker();
    }

    fn remove_marker(&self) {
        if self.ran && self.qmp.send_detached("object-del", json!({ "id": MARKER })).is_err() {
            tracing::debug!("the pause marker stays: the QMP connection is gone");
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if !self.owes_cont {
            return;
        }
        tracing::warn!("a pause was abandoned after {:?}; resuming the guest", self.since.elapsed());
        match self.qmp.send_and_linger("cont", Value::Null, LAST_PATIENCE) {
            Ok(()) => self.remove_marker(),
            Err(error) => tracing::error!(%error, "cannot resume the guest; the next start of the helper will"),
        }
    }
}

/// Resumes a guest that an earlier helper stopped and did not live to resume. Returns whether it did.
pub async fn resume_abandoned(qmp: &Qmp) -> Result<bool, QmpError> {
    if !marker_present(qmp).await? {
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

async fn place_marker(qmp: &Qmp) -> Result<(), QmpError> {
    let made = qmp.execute_json("object-add", json!({ "qom-type": "throttle-group", "id": MARKER })).await;
    match made {
        // One is left by a pause whose end was not acknowledged; it says the same.
        Err(error) if error.is_refusal() && marker_present(qmp).await? => {
            tracing::debug!(%error, "the pause marker is already there");
            Ok(())
        }
        other => other.map(drop),
    }
}

async fn marker_present(qmp: &Qmp) -> Result<bool, QmpError> {
    let objects = qmp.execute_json("qom-list", json!({ "path": "/objects" })).await?;
    Ok(objects.as_array().is_some_and(|list| list.iter().any(|object| object["name"] == MARKER)))
}

#[cfg(test)]
mod test;
