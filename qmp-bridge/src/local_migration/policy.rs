//! When the guest may be stopped for the rest: the limit begins small and grows while the guest
//! writes too fast for it.

use std::time::Duration;

use super::LocalMigrationError;
use super::watch::State;

/// Limits of the pause, each with this many passes over memory to be met. The last is QEMU's own
/// default.
const LIMITS_MS: [u64; 5] = [10, 30, 80, 150, 300];
const PASSES: u64 = 6;
const LAST_PASSES: u64 = 30;

#[derive(Debug, Default)]
pub(super) struct Policy {
    step: usize,
    /// The pass at which the present limit was set.
    pass: u64,
}

impl Policy {
    pub(super) fn limit_ms(&self) -> u64 {
        LIMITS_MS[self.step.min(LIMITS_MS.len() - 1)]
    }

    /// A new limit, if it is time for one.
    pub(super) fn judge(&mut self, state: &State) -> Result<Option<u64>, LocalMigrationError> {
        let is_last = self.step + 1 >= LIMITS_MS.len();
        // The first pass is everything, however long it takes.
        let timeout = if is_last { LAST_PASSES } else { PASSES };
        if state.passes <= self.pass.max(1) + timeout {
            return Ok(None);
        }
        if is_last {
            let limit = Duration::from_millis(self.limit_ms());
            return Err(LocalMigrationError::TooFast {
                written: state.written_rate >> 20,
                moved: state.moved_rate >> 20,
                limit,
            });
        }
        self.step += 1;
        self.pass = state.passes;
        Ok(Some(self.limit_ms()))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_limit_grows_with_the_passes_and_ends() {
        let mut policy = Policy::default();
        let at = |passes| State { passes, ..State::default() };
        assert_eq!(policy.limit_ms(), 10);
        assert_eq!(policy.judge(&at(7)).unwrap(), None);
        assert_eq!(policy.judge(&at(8)).unwrap(), Some(30));
        assert_eq!(policy.judge(&at(9)).unwrap(), None);
        for pass in [15, 22] {
            policy.judge(&at(pass)).unwrap();
        }
        assert_eq!(policy.judge(&at(29)).unwrap(), Some(300));
        assert_eq!(policy.judge(&at(59)).unwrap(), None);
        assert!(matches!(policy.judge(&at(60)), Err(LocalMigrationError::TooFast { .. })));
    }
}
