//! QEMU's run states and those of a manifest: the same ones, in two crates that do not know each
//! other.

use checkpoint_format::RunState as Saved;
use qmp_bridge::RunState;

pub(crate) fn record(state: RunState) -> Saved {
    match state {
        RunState::Running => Saved::Running,
        RunState::Suspended => Saved::Suspended,
        RunState::Paused => Saved::Paused,
        RunState::Prelaunch => Saved::Prelaunch,
        RunState::Shutdown => Saved::Shutdown,
        RunState::GuestPanicked => Saved::GuestPanicked,
        RunState::IoError => Saved::IoError,
        RunState::InternalError => Saved::InternalError,
        RunState::Watchdog => Saved::Watchdog,
    }
}

/// QEMU's run state that a manifest records.
pub fn of_record(saved: Saved) -> RunState {
    match saved {
        Saved::Running => RunState::Running,
        Saved::Suspended => RunState::Suspended,
        Saved::Paused => RunState::Paused,
        Saved::Prelaunch => RunState::Prelaunch,
        Saved::Shutdown => RunState::Shutdown,
        Saved::GuestPanicked => RunState::GuestPanicked,
        Saved::IoError => RunState::IoError,
        Saved::InternalError => RunState::InternalError,
        Saved::Watchdog => RunState::Watchdog,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn run_state_is_spelled_in_manifests_as_qemu_spells_it() {
        for state in RunState::ALL {
            assert_eq!(of_record(record(state)), state);
            assert_eq!(serde_json::to_value(record(state)).unwrap(), state.name());
        }
    }
}
