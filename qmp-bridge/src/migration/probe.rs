//! Which ways of streaming a QEMU and its VM allow; changes nothing for good.
//!
//! Whether a background snapshot is possible only QEMU can tell: when the capability is set it
//! looks whether the kernel lets it have a userfaultfd and whether each RAM block can be
//! write-protected by one. So it is set, and put back.

use std::time::Duration;

use serde_json::Value;

use super::settings::{self, BACKGROUND_SNAPSHOT};
use super::status::Progress;
use super::{MigrationError, StreamMode};
use crate::paused::run_state;
use crate::qmp::{Qmp, QmpError};
use crate::quirks;

/// How long putting back may block a thread if this call is dropped half-way.
const LAST_TIMEOUT: Duration = Duration::from_secs(2);
/// Before 9.0 QEMU wakes a suspended guest for a migration. Since then it aborts at the `cont`
/// after one: its table of run states has no step from `postmigrate` to `suspended` (seen with
/// 10.0).
pub(super) const SUSPENDED: &str = "the guest is suspended, and QEMU cannot let it continue after a migration; wake it, or attach with the tracker";

/// What [`probe`] found; each `Err` says why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Support {
    /// Whether [`StreamMode::BackgroundSnapshot`] works.
    pub background_snapshot: Result<(), String>,
    /// Whether [`StreamMode::PreCopy`] works.
    pub pre_copy: Result<(), String>,
    /// The guest is stopped, by its owner.
    pub stopped: bool,
}

impl Support {
    /// Whether a mode works.
    pub fn of(&self, mode: StreamMode) -> &Result<(), String> {
        match mode {
            StreamMode::BackgroundSnapshot => &self.background_snapshot,
            StreamMode::PreCopy => &self.pre_copy,
        }
    }

    /// The mode to use when the user asks for none; `None` if none is possible. Pre-copy for a
    /// guest that runs, see the module's head; a stopped one has no pause to lose, and after a
    /// background snapshot its state is still `paused`.
    pub fn preferred(&self) -> Option<StreamMode> {
        let mut modes = [StreamMode::PreCopy, StreamMode::BackgroundSnapshot];
        if self.stopped {
            modes.reverse();
        }
        modes.into_iter().find(|mode| self.of(*mode).is_ok())
    }
}

/// Asks QEMU. [`MigrationError::Busy`] while it is being migrated.
///
/// # Errors
/// When QEMU is being migrated or does not answer.
pub async fn probe(qmp: &Qmp) -> Result<Support, MigrationError> {
    let progress = idle(qmp).await?;
    if !progress.blocked.is_empty() {
        let why = progress.blocked.join("; ");
        return Ok(Support {
            background_snapshot: Err(why.clone()),
            pre_copy: Err(why),
            stopped: false,
        });
    }
    let state = run_state(qmp).await?;
    let stopped = !matches!(state.as_str(), "running" | "suspended");
    let pre_copy = match unsupported_state(qmp, StreamMode::PreCopy, &state) {
        Some(why) => Err(why),
        None => pre_copy(qmp).await?,
    };
    let background_snapshot = match unsupported_state(qmp, StreamMode::BackgroundSnapshot, &state) {
        Some(why) => Err(why),
        None => background_snapshot(qmp).await?,
    };
    Ok(Support { background_snapshot, pre_copy, stopped })
}

/// QEMU's word on its last migration, if none is under way.
pub(super) async fn idle(qmp: &Qmp) -> Result<Progress, MigrationError> {
    let progress = Progress::query(qmp).await?;
    if progress.is_running() {
        return Err(MigrationError::Busy { status: progress.status });
    }
    Ok(progress)
}

/// Why a guest in this run state cannot be streamed so. A background snapshot puts the guest into
/// the state `paused`, and QEMU aborts when its table of states does not allow that step (seen with
/// 7.2 and 10.0 from `prelaunch`).
pub(super) fn unsupported_state(qmp: &Qmp, mode: StreamMode, state: &str) -> Option<String> {
    let version = qmp.version();
    let snapshot_hangs = quirks::SNAPSHOT_WITHOUT_READER_HANGS;
    let why = match (mode, state) {
        (_, "inmigrate") => "the guest's own state is still being loaded".into(),
        (_, "postmigrate") => "the guest is stopped since an earlier migration; QEMU allows the next when it has run again (`cont`)".into(),
        (StreamMode::BackgroundSnapshot, _) if version.has(snapshot_hangs) => {
            let safe = snapshot_hangs.changed_in();
            format!("with QEMU {version} a guest can hang for ever when its reader ends; {safe} is the first that is safe")
        }
        (_, "suspended") => SUSPENDED.into(),
        (StreamMode::PreCopy, _) | (_, "running" | "paused") => return None,
        (StreamMode::BackgroundSnapshot, other) => format!("the guest's state is `{other}`, from which QEMU cannot make one"),
    };
    Some(why)
}

async fn pre_copy(qmp: &Qmp) -> Result<Result<(), String>, MigrationError> {
    match settings::capability_changes(qmp, StreamMode::PreCopy).await {
        Ok(_) => Ok(Ok(())),
        Err(MigrationError::Unsupported { why, .. }) => Ok(Err(why)),
        Err(other) => Err(other),
    }
}

async fn background_snapshot(qmp: &Qmp) -> Result<Result<(), String>, MigrationError> {
    let changes = match settings::capability_changes(qmp, StreamMode::BackgroundSnapshot).await {
        Ok(changes) => changes,
        Err(MigrationError::Unsupported { why, .. }) => return Ok(Err(why)),
        Err(other) => return Err(other),
    };
    if !changes.contains_key(BACKGROUND_SNAPSHOT) {
        // It is on already: its owner's QEMU has agreed to it.
        return Ok(Ok(()));
    }
    let back = changes.iter().map(|(name, change)| (name.clone(), change.found)).collect();
    let guard = PutBack { qmp: qmp.clone(), states: back };
    let set = settings::set_capabilities(
        qmp,
        changes.iter().map(|(name, change)| (name.as_str(), change.set)),
    )
    .await;
    match set {
        Ok(()) => guard.now().await?,
        Err(QmpError::Refused { description, .. }) => {
            guard.forget();
            return Ok(Err(description));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(Ok(()))
}

/// Puts capabilities back, also when the caller is dropped in the middle.
struct PutBack {
    qmp: Qmp,
    states: Vec<(String, bool)>,
}

impl PutBack {
    async fn now(mut self) -> Result<(), QmpError> {
        settings::set_capabilities(
            &self.qmp,
            self.states.iter().map(|(name, state)| (name.as_str(), *state)),
        )
        .await?;
        self.states.clear();
        Ok(())
    }

    /// Nothing was changed.
    fn forget(mut self) {
        self.states.clear();
    }
}

impl Drop for PutBack {
    fn drop(&mut self) {
        if self.states.is_empty() {
            return;
        }
        let list: Vec<Value> = self
            .states
            .iter()
            .map(|(name, state)| serde_json::json!({ "capability": name, "state": state }))
            .collect();
        let arguments = serde_json::json!({ "capabilities": list });
        if let Err(error) =
            self.qmp.send_and_linger("migrate-set-capabilities", arguments, LAST_TIMEOUT)
        {
            tracing::warn!(%error, "cannot put QEMU's migration capabilities back");
        }
    }
}
