//! QEMU's run state: which ones hold a guest that a checkpoint can take and a restore can bring
//! back, and why the others do not.

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use thiserror::Error;

use crate::qmp::replies::StatusInfo;
use crate::qmp::{QemuVersion, Qmp, QmpError};
use crate::quirks;

/// A run state whose guest is whole: its memory, disks and devices are of one instant, or can be
/// made so by a `stop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Asleep (ACPI S3); devices continue.
    Suspended,
    /// Stopped by its owner.
    Paused,
    /// Never started (`-S`), or reset while it was stopped.
    Prelaunch,
    /// Powered off, with `-no-shutdown`.
    Shutdown,
    /// The guest's kernel reported a panic.
    GuestPanicked,
    /// Stopped at a disk error, with `werror=stop` or `rerror=stop`; the request waits.
    IoError,
    /// Stopped after an error of KVM.
    InternalError,
    /// Stopped by a watchdog device.
    Watchdog,
}

/// There is no guest to take a checkpoint of.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the VM's run state is `{state}`: {why}")]
pub struct NoGuest {
    /// QEMU's name of the run state.
    pub state: String,
    /// Why there is no guest.
    pub why: String,
}

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum RunStateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    NoGuest(#[from] NoGuest),
}

impl RunState {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::Running,
        Self::Suspended,
        Self::Paused,
        Self::Prelaunch,
        Self::Shutdown,
        Self::GuestPanicked,
        Self::IoError,
        Self::InternalError,
        Self::Watchdog,
    ];

    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Suspended => "suspended",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::Shutdown => "shutdown",
            Self::GuestPanicked => "guest-panicked",
            Self::IoError => "io-error",
            Self::InternalError => "internal-error",
            Self::Watchdog => "watchdog",
        }
    }

    /// Whether vCPUs or devices work, so that a `stop` is needed, and a `cont` after it.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Suspended)
    }

    /// Asks QEMU. Fails in a state that holds no whole guest.
    ///
    /// # Errors
    /// When QEMU does not answer, or there is no whole guest.
    pub async fn of(qmp: &Qmp) -> Result<Self, RunStateError> {
        Ok(Self::timed(qmp).await?.0)
    }

    /// The same, with the time at which QEMU's answer was read.
    pub(crate) async fn timed(qmp: &Qmp) -> Result<(Self, Instant), RunStateError> {
        let (StatusInfo { status }, at) = qmp.query_status_timed().await?;
        Ok((Self::check(&status, qmp.version())?, at))
    }

    fn check(name: &str, version: &QemuVersion) -> Result<Self, NoGuest> {
        let state: Self = name.parse()?;
        let continues = quirks::SUSPENDED_GUEST_CANNOT_BE_STOPPED;
        if state == Self::Suspended && version.has(continues) {
            let why = format!(
                "QEMU {version} cannot stop a guest that is suspended (since {} it can); \
                 wake it first",
                continues.changed_in()
            );
            return Err(NoGuest { state: name.into(), why });
        }
        Ok(state)
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RunState {
    type Err = NoGuest;

    fn from_str(name: &str) -> Result<Self, NoGuest> {
        let known = Self::ALL.into_iter().find(|state| state.name() == name);
        known.ok_or_else(|| NoGuest { state: name.into(), why: no_guest(name).into() })
    }
}

fn no_guest(name: &str) -> &'static str {
    match name {
        "inmigrate" => {
            "it waits for a migration, or its state is being loaded; take the checkpoint when it has arrived"
        }
        "postmigrate" => {
            "it was migrated, perhaps to another host where it runs; `cont` lets it run here again"
        }
        "finish-migrate" => "a migration of it is about to end; wait for that",
        "restore-vm" => {
            "a snapshot is being loaded, or could not be; only a reset, or a `loadvm` that works, gives it a state"
        }
        "save-vm" => "its state is being saved; wait for the end",
        "colo" => "it is one half of a COLO pair",
        "debug" => "a debugger holds it; let it continue there",
        _ => "this version of Stillpoint does not know it",
    }
}

/// QEMU's run state by name.
///
/// # Errors
/// When QEMU does not answer.
pub async fn name(qmp: &Qmp) -> Result<String, QmpError> {
    Ok(qmp.query_status().await?.status)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn run_state_without_a_whole_guest_is_refused_by_name() {
        let version = |major| QemuVersion { major, minor: 0, micro: 0, package: String::new() };
        for name in [
            "inmigrate",
            "postmigrate",
            "restore-vm",
            "finish-migrate",
            "save-vm",
            "colo",
            "debug",
            "of-the-future",
        ] {
            let error = RunState::check(name, &version(10)).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
        }
        for state in RunState::ALL {
            let name = state.name();
            assert_eq!(RunState::check(name, &version(10)).expect(name), state);
            assert_eq!(
                RunState::check(name, &version(7)).is_ok(),
                state != RunState::Suspended,
                "{name}"
            );
        }
    }
}
