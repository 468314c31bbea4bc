//! Which ways of streaming a QEMU and its VM allow; changes nothing for good.
//!
//! Whether a background snapshot is possible only QEMU can tell: when the capability is set it
//! looks whether the kernel lets it have a userfaultfd and whether each RAM block can be
//! write-protected by one. So it is set, and put back.

use std::time::Duration;

use super::StreamMode;
use crate::migration::MigrationError;
use crate::migration::settings::{
    BACKGROUND_SNAPSHOT, Change, Found, Settings, Wanted, capability_list, set_capabilities,
};
use crate::migration::status::check_idle;
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
    let blocked = check_idle(qmp).await?.blocked_reasons;
    if !blocked.is_empty() {
        let why = blocked.join("; ");
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
        None => changes(qmp, StreamMode::PreCopy).await?.map(drop),
    };
    let background_snapshot = match unsupported_state(qmp, StreamMode::BackgroundSnapshot, &state) {
        Some(why) => Err(why),
        None => background_snapshot(qmp).await?,
    };
    Ok(Support { background_snapshot, pre_copy, stopped })
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

/// Capabilities to change, or why this QEMU has not all of them.
async fn changes(qmp: &Qmp, mode: StreamMode) -> Result<Result<Settings, String>, MigrationError> {
    let capabilities = mode.capabilities().to_vec();
    let wanted = Wanted { capabilities, ..Wanted::default() };
    match Found::read(qmp).await?.plan(qmp, wanted) {
        Ok(settings) => Ok(Ok(settings)),
        Err(missing @ MigrationError::Missing { .. }) => Ok(Err(missing.to_string())),
        Err(other) => Err(other),
    }
}

async fn background_snapshot(qmp: &Qmp) -> Result<Result<(), String>, MigrationError> {
    let changes = match changes(qmp, StreamMode::BackgroundSnapshot).await? {
        Ok(settings) => settings.capabilities,
        Err(why) => return Ok(Err(why)),
    };
    if !changes.contains_key(BACKGROUND_SNAPSHOT) {
        // It is on already: its owner's QEMU has agreed to it.
        return Ok(Ok(()));
    }
    let list = |state: fn(&Change<bool>) -> bool| {
        changes.iter().map(|(name, change)| (name.as_str(), state(change))).collect::<Vec<_>>()
    };
    let found = list(|change| change.found);
    let mut guard = PutBack { qmp, states: &found };
    // Sent at once: a helper that is killed in between leaves no capability on, with which the
    // owner's next migration would be a snapshot.
    let set = set_capabilities(qmp, list(|change| change.set));
    let (set, put_back) = tokio::join!(set, set_capabilities(qmp, found.clone()));
    let outcome = match set {
        Ok(()) => Ok(put_back?),
        // Nothing was changed.
        Err(QmpError::Refused { description, .. }) => Err(description),
        Err(error) => return Err(error.into()),
    };
    guard.states = &[];
    Ok(outcome)
}

/// Puts capabilities back, also when the caller is dropped in the middle.
struct PutBack<'a> {
    qmp: &'a Qmp,
    states: &'a [(&'a str, bool)],
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        if self.states.is_empty() {
            return;
        }
        let arguments = capability_list(self.states);
        let sent = self.qmp.send_and_linger("migrate-set-capabilities", arguments, LAST_TIMEOUT);
        if let Err(error) = sent {
            tracing::warn!(%error, "cannot put QEMU's migration capabilities back");
        }
    }
}
