//! What the restored VM does: what it did when the checkpoint was taken, unless the command says
//! otherwise.

use crate::run_state::of_record;
use anyhow::{Context, Result, ensure};
use checkpoint_format::RunState as Saved;
use qmp_bridge::RunState;
use qmp_bridge::device_state::DeviceState;
use qmp_bridge::paused::run_state;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::running::Vm;

/// The run states before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    saved: RunState,
    /// What the restored VM enters.
    pub wanted: RunState,
}

impl Transition {
    /// `paused` and `run` are the command's words. A VM that does not run stays in its own state
    /// with `paused`.
    ///
    /// # Errors
    /// Refused with `run` for a VM that QEMU lets run only after a reset.
    pub fn choose(saved: Option<Saved>, paused: bool, run: bool) -> Result<Self, EngineError> {
        // An earlier version did not record it, and let every VM run.
        let saved = saved.map_or(RunState::Running, of_record);
        let wanted = match saved {
            RunState::Shutdown | RunState::InternalError if run => {
                return Err(refused(format!(
                    "the VM's run state was `{saved}`: QEMU lets it run only after a reset; restore it without --run, then `system_reset` and `cont`"
                )))
                .in_phase(Phase::Plan);
            }
            _ if run && !saved.is_live() => RunState::Running,
            _ if paused && saved.is_live() => RunState::Paused,
            _ => saved,
        };
        Ok(Self { saved, wanted })
    }

    /// The devices' state carries the run state that QEMU enters when it has loaded it. A guest
    /// that is to run is paused then, and a suspended one knows by itself that it is.
    pub(crate) fn write(self, devices: DeviceState) -> Result<DeviceState> {
        if self.saved.is_live() {
            return Ok(devices);
        }
        let loaded = if self.wanted.is_live() { RunState::Paused } else { self.wanted };
        devices.with_run_state(loaded).context("giving the VM its run state")
    }

    /// After the load, of a VM that is not to run.
    pub(crate) async fn check(self, vm: &Vm) -> Result<()> {
        let is = run_state(&vm.qmp).await.context("asking for the run state")?;
        ensure!(
            is == self.wanted.name(),
            "the restored VM's run state is `{is}`, and `{}` was saved",
            self.wanted
        );
        Ok(())
    }

    /// In a sentence about the VM.
    pub(crate) fn words(self) -> String {
        match self.wanted {
            RunState::Running => "runs again".to_owned(),
            RunState::Paused if self.saved.is_live() => "is paused".to_owned(),
            other => format!("is restored with its run state, `{other}`,"),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::error::Class;

    #[test]
    fn run_state_is_as_saved_unless_the_command_says_otherwise() {
        let wanted = |saved, paused, run| {
            Transition::choose(saved, paused, run).map(|transition| transition.wanted)
        };
        let table = [
            (None, RunState::Running, RunState::Paused, Some(RunState::Running)),
            (Some(Saved::Running), RunState::Running, RunState::Paused, Some(RunState::Running)),
            (
                Some(Saved::Suspended),
                RunState::Suspended,
                RunState::Paused,
                Some(RunState::Suspended),
            ),
            (Some(Saved::Paused), RunState::Paused, RunState::Paused, Some(RunState::Running)),
            (
                Some(Saved::Prelaunch),
                RunState::Prelaunch,
                RunState::Prelaunch,
                Some(RunState::Running),
            ),
            (Some(Saved::IoError), RunState::IoError, RunState::IoError, Some(RunState::Running)),
            (Some(Saved::Shutdown), RunState::Shutdown, RunState::Shutdown, None),
            (Some(Saved::InternalError), RunState::InternalError, RunState::InternalError, None),
        ];
        for (saved, plain, paused, run) in table {
            assert_eq!(wanted(saved, false, false).unwrap(), plain, "{saved:?}");
            assert_eq!(wanted(saved, true, false).unwrap(), paused, "{saved:?} --paused");
            match run {
                Some(run) => {
                    assert_eq!(wanted(saved, false, true).unwrap(), run, "{saved:?} --run")
                }
                None => assert_eq!(
                    wanted(saved, false, true).unwrap_err().class(),
                    Class::Refused,
                    "{saved:?} --run"
                ),
            }
        }
    }
}
