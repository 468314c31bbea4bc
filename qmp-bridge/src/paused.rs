//! The pause: a guard that owns the guest's stopped state, and whose drop lets it run again.
//!
//! Two dangers decide its form. A helper that fails between `stop` and `cont` must not leave the
//! guest stopped: so `drop` sends `cont`, synchronously, even while a runtime goes down, and waits
//! a moment for the reply, since a command whose connection closes at once is lost in QEMU. A
//! helper that is killed there cannot do that: so before each stop a marker object is put into
//! QEMU, outside the pause, and [`resume_abandoned`] of the next helper finds it and resumes,
//! without ever resuming a guest that its owner stopped.
//!
//! A migration's switch-over is the same pause with another beginning and end: QEMU stops the guest
//! by itself, and before it has completed only `migrate_cancel` lets the guest run again. While
//! QEMU writes the last part of the stream it reads no command, so if the reader of the stream
//! stops, only closing the stream lets the guest run: the guard can hold the stream for that. The
//! switch-over has a marker of its own, because it is in QEMU for seconds while the guest still
//! runs, and a `stop` of the owner in that time must not count as ours. That marker alone is no
//! reason to resume: a guest that was migrated to another host leaves QEMU in the same state.
//! [`crate::migration::recover`] finds out which it was.
//!
//! A guest that does not run when the guard is made has no pause: nothing is sent to it, and its
//! run state stays what it is. The guard only detects whether another client changes it.

mod recovery;
mod verdict;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;

use crate::qmp::{EventWatch, Qmp, QmpError};
pub use crate::run_state::name as run_state;
use crate::run_state::{NoGuest, RunState, RunStateError};
use recovery::{end_switchover, leave_finish_migrate};
pub use recovery::{leave_stopped, resume_abandoned, resume_later};
pub(crate) use recovery::{
    marker_present, place_marker, remove_marker, resume_switched_over, withdraw_switchover,
};

/// The longest that a guest is stopped for a checkpoint, from `stop` to `cont`. It is sixty times
/// what a busy host needs; what takes longer (storage that hangs) may take for ever.
pub const PAUSE_LIMIT: Duration = Duration::from_secs(2);

/// Kind of the object (its id carries the instance) that tells the next helper: if the guest is
/// paused, an earlier helper paused it.
const MARKER: &str = "paused";

/// Kind of the object that says: a guest that runs is about to be stopped by a migration of ours.
const SWITCHOVER_MARKER: &str = "switchover";

/// How long a drop may block its thread until QEMU has taken the `cont`; usually less than a
/// millisecond.
const LAST_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum PauseError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    NoGuest(#[from] NoGuest),
    #[error(
        "another client changed the VM while it was stopped for a checkpoint: {what}; \
         the change stays, and the checkpoint fails"
    )]
    Disturbed { what: String },
    #[error(
        "the guest would have been stopped for more than {limit:?} ({during}), so it was let run again; is QEMU's storage slow?"
    )]
    TooLong { limit: Duration, during: &'static str },
}

impl PauseError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Disturbed { .. } | Self::TooLong { .. } => true,
            Self::NoGuest(_) => false,
        }
    }
}

impl From<RunStateError> for PauseError {
    fn from(error: RunStateError) -> Self {
        match error {
            RunStateError::Qmp(error) => Self::Qmp(error),
            RunStateError::NoGuest(error) => Self::NoGuest(error),
        }
    }
}

/// What has to be done before the guest is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    Cont,
    /// Before the migration has completed `migrate_cancel`, after that `cont`. In the wrong one's
    /// place each is harmless.
    CancelOrCont,
}

/// The guest's vCPUs are stopped and its block I/O is drained, for as long as this lives.
#[must_use = "dropping the guard resumes the guest"]
#[derive(Debug)]
pub struct Paused {
    qmp: Qmp,
    pending: Pending,
    /// What lies in QEMU for the case of our death.
    marker: Option<&'static str>,
    /// The stream of a migration that may hold up QEMU.
    stream: Option<UnixStream>,
    /// The run state before it was stopped.
    before: RunState,
    /// The run state that our own work has led to.
    expected: &'static str,
    watch: EventWatch,
    /// Events read after this are not of our own doing.
    watched_from: Instant,
    since: Instant,
    limit: Duration,
    /// When the limit passes, by the clock that all waits have.
    deadline: tokio::time::Instant,
}

impl Paused {
    /// Stops the guest, if it runs, for [`PAUSE_LIMIT`] at most.
    ///
    /// # Errors
    /// When QEMU does not stop the guest in time, or is in a run state without a whole guest.
    pub async fn stop(qmp: &Qmp) -> Result<Self, PauseError> {
        Self::stop_within(qmp, PAUSE_LIMIT).await
    }

    /// What has to be asked is asked before, so the pause begins with the one `stop`. Fails, with
    /// the guest running on, if that alone takes longer than `limit`.
    ///
    /// # Errors
    /// When QEMU does not stop the guest in time, or is in a run state without a whole guest.
    pub async fn stop_within(qmp: &Qmp, limit: Duration) -> Result<Self, PauseError> {
        let watch = qmp.watch(verdict::EVENTS);
        let (before, watched_from) = RunState::timed(qmp).await?;
        let mut paused = Self {
            qmp: qmp.clone(),
            pending: Pending::Nothing,
            marker: None,
            stream: None,
            before,
            expected: before.name(),
            watch,
            watched_from,
            since: Instant::now(),
            limit,
            deadline: tokio::time::Instant::now() + limit,
        };
        if before.is_live() {
            place_marker(qmp, MARKER).await?;
            // From here on the drop resumes, also when this future is dropped in the middle.
            (paused.marker, paused.pending) = (Some(MARKER), Pending::Cont);
            paused.begin(Instant::now());
            paused.send_stop().await?;
        }
        Ok(paused)
    }

    /// The question goes right before the order: an owner who has stopped the guest since we first
    /// asked wants it stopped.
    async fn send_stop(&mut self) -> Result<(), PauseError> {
        let stop = async {
            tokio::try_join!(run_state(&self.qmp), self.qmp.execute_timed("stop", Value::Null))
        };
        let Ok(stopped) = tokio::time::timeout(self.limit, stop).await else {
            // QEMU takes this up as soon as it can. Waiting for that is of no use to the guest.
            self.qmp.send_detached("cont", Value::Null)?;
            self.pending = Pending::Nothing;
            self.remove_marker();
            return Err(PauseError::TooLong { limit: self.limit, during: "`stop`" });
        };
        let (state, (_, at)) = stopped?;
        self.watched_from = at;
        match state.parse::<RunState>() {
            Ok(state) if state.is_live() => self.expected = RunState::Paused.name(),
            Ok(state) => {
                self.pending = Pending::Nothing;
                self.remove_marker();
                self.marker = None;
                (self.before, self.expected) = (state, state.name());
            }
            Err(no_guest) => {
                self.pending = Pending::Nothing;
                self.remove_marker();
                return Err(no_guest.into());
            }
        }
        Ok(())
    }

    /// To be called before a migration that will stop the guest: if it runs, leaves word that it is
    /// to run again. Returns its run state.
    pub(crate) async fn announce_switchover(qmp: &Qmp) -> Result<RunState, PauseError> {
        let state = RunState::of(qmp).await?;
        if state.is_live() {
            place_marker(qmp, SWITCHOVER_MARKER).await?;
        }
        Ok(state)
    }

    /// The guard of a pause that a migration of ours begins, now or later: its drop cancels the
    /// migration. `before`: the guest's run state.
    pub(crate) fn by_switchover(qmp: &Qmp, before: RunState) -> Self {
        Self {
            qmp: qmp.clone(),
            pending: Pending::CancelOrCont,
            marker: Some(SWITCHOVER_MARKER),
            stream: None,
            before,
            expected: "postmigrate",
            watch: qmp.watch(verdict::EVENTS),
            watched_from: Instant::now(),
            since: Instant::now(),
            limit: PAUSE_LIMIT,
            deadline: tokio::time::Instant::now() + PAUSE_LIMIT,
        }
    }

    /// The guest is stopped `since` then.
    fn begin(&mut self, since: Instant) {
        self.since = since;
        let left = self.limit.saturating_sub(since.elapsed());
        self.deadline = tokio::time::Instant::now() + left;
    }

    /// From now on the drop cuts this stream before it speaks to QEMU.
    pub(crate) fn hold_stream(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
    }

    /// QEMU has stopped the guest at `since`.
    pub(crate) fn switched_over(&mut self, since: Instant) {
        self.watched_from = since;
        self.begin(since);
    }

    /// A migration of ours has completed while this guard held the guest.
    pub fn has_migrated(&mut self) {
        self.expected = "postmigrate";
    }

    /// The guest was stopped by its owner before a migration of ours came to it, so it is not for
    /// us to let it run.
    pub(crate) fn leave_to_owner(&mut self) {
        self.before = RunState::Paused;
    }

    /// The run state before the pause, which is that of the checkpoint.
    pub fn before(&self) -> RunState {
        self.before
    }

    /// Time since `stop` was sent, or since QEMU stopped it.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// The monitor that stopped the guest.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Does a part of the pause's work, if that ends before the guest has been stopped for too
    /// long. A guest that did not run waits for nothing, so its limit is that of each command.
    ///
    /// # Errors
    /// When the pause's limit passes, the guest runs again, or the VM changes meanwhile.
    pub async fn within<T>(
        &self,
        during: &'static str,
        work: impl Future<Output = T>,
    ) -> Result<T, PauseError> {
        if !self.before.is_live() {
            return Ok(work.await);
        }
        let too_long = PauseError::TooLong { limit: self.limit, during };
        if tokio::time::Instant::now() > self.deadline {
            return Err(too_long);
        }
        tokio::time::timeout_at(self.deadline, work).await.map_err(|_| too_long)
    }

    /// Lets the guest run again if it ran before, and fails if another client changed the VM
    /// meanwhile. Returns the time from sending `stop` to the reply of `cont`.
    ///
    /// # Errors
    /// When QEMU does not resume the guest, or another client changed the VM meanwhile.
    pub async fn resume(mut self) -> Result<Duration, PauseError> {
        let state = self.state_now().await?;
        let events = self.watch.since(self.watched_from);
        let verdict =
            verdict::judge(self.before.is_live(), self.expected, state.as_deref(), &events);
        // A switch-over that has not completed is given up, whatever became of it.
        let is_cancelled =
            self.pending == Pending::CancelOrCont && state.as_deref() == Some("finish-migrate");
        match self.pending {
            Pending::Cont if verdict.needs_cont => cont(&self.qmp).await?,
            Pending::CancelOrCont if is_cancelled || verdict.needs_cont => {
                end_switchover(&self.qmp, self.before.is_live()).await?
            }
            Pending::Nothing | Pending::Cont | Pending::CancelOrCont => {}
        }
        self.pending = Pending::Nothing;
        let paused = self.since.elapsed();
        self.remove_marker();
        let late = || verdict::after_cont(&self.watch.since(self.watched_from)[events.len()..]);
        match verdict.disturbance.filter(|_| !is_cancelled).or_else(late) {
            Some(what) => Err(PauseError::Disturbed { what }),
            None => Ok(paused),
        }
    }

    /// The guest stays stopped, whatever becomes of this process: what follows makes it another
    /// guest. Fails if another client changed the VM meanwhile; then it is resumed.
    ///
    /// # Errors
    /// As those of [`Self::resume`].
    pub async fn hold(mut self) -> Result<(), PauseError> {
        let state = self.state_now().await?;
        let state = state.unwrap_or_else(|| "unknown".to_owned());
        let events = self.watch.since(self.watched_from);
        let verdict = verdict::judge(self.before.is_live(), self.expected, Some(&state), &events);
        if let Some(what) = verdict.disturbance {
            return Err(PauseError::Disturbed { what });
        }
        if let Some(marker) = self.marker {
            recovery::remove_marker(&self.qmp, marker).await?;
        }
        (self.marker, self.pending) = (None, Pending::Nothing);
        Ok(())
    }

    /// None if the guest has waited too long already, or QEMU takes too long to say.
    async fn state_now(&self) -> Result<Option<String>, QmpError> {
        self.within("`query-status`", run_state(&self.qmp)).await.ok().transpose()
    }

    fn remove_marker(&self) {
        let Some(marker) = self.marker else { return };
        if self
            .qmp
            .send_detached("object-del", json!({ "id": self.qmp.names().name(marker) }))
            .is_err()
        {
            tracing::debug!("the pause marker stays: the QMP connection is gone");
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let was_resumed =
            self.watch.since(self.watched_from).iter().any(|event| event.name == "RESUME");
        let is_live = self.before.is_live() && !was_resumed;
        let commands: &[&str] = match (self.pending, is_live) {
            (Pending::Nothing, _) | (Pending::Cont, false) => &[],
            (Pending::Cont, true) => &["cont"],
            (Pending::CancelOrCont, true) => &["migrate_cancel", "cont"],
            (Pending::CancelOrCont, false) => &["migrate_cancel"],
        };
        if self.pending == Pending::Nothing {
            return;
        }
        tracing::warn!(
            "a pause was abandoned after {:?}; resuming the guest",
            self.since.elapsed()
        );
        if let Some(stream) = &self.stream {
            // Fails only when it is cut already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let mut is_done = true;
        for command in commands {
            match self.qmp.send_and_linger(command, Value::Null, LAST_TIMEOUT) {
                Ok(accepted) => is_done = accepted,
                Err(error) => {
                    return tracing::error!(%error, "cannot resume the guest; the next start of the helper will");
                }
            }
        }
        if is_done {
            self.remove_marker();
        } else {
            tracing::error!(
                "QEMU refuses to let the guest run; the next checkpoint or helper tries again"
            );
        }
    }
}

/// A migration of the stopped guest that has just ended, or was cancelled, keeps QEMU from it for a
/// moment.
async fn cont(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute(qapi::qmp::cont {}).await {
        Err(error) if error.is_refusal() && run_state(qmp).await? == "finish-migrate" => {
            leave_finish_migrate(qmp).await?;
            qmp.execute(qapi::qmp::cont {}).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// A suspended guest counts as running: QEMU wakes it by itself, and `cont` brings it back to that
/// state.
async fn is_running(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(run_state(qmp).await?.parse().is_ok_and(RunState::is_live))
}

#[cfg(test)]
mod test;
