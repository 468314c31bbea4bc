//! Pre-copy until QEMU has stopped the guest.

use std::time::Instant;

use super::StreamMode;
use super::session::{Migration, Stage};
use crate::migration::downtime::DowntimePolicy;
use crate::migration::settings::set_downtime_limit;
use crate::migration::watch::{IDLE_POLL, News, PAUSED_POLL};
use crate::migration::{MigrationError, MigrationStatus};
use crate::paused::{PauseError, Paused, run_state};

impl Migration {
    /// Waits while memory travels and the guest runs, until QEMU has stopped it to send the rest.
    /// The pause counts from QEMU's own word that it has stopped. Dropping the guard, or this
    /// future, cancels.
    ///
    /// # Errors
    /// When the migration fails or times out, or the guest writes too fast for the longest pause.
    #[tracing::instrument(name = "pre-copy", skip_all)]
    pub async fn switchover(&mut self) -> Result<Paused, MigrationError> {
        if self.stage != Stage::Started || self.mode() != StreamMode::PreCopy {
            return Err(MigrationError::Order("`switchover` comes after `start` of a pre-copy"));
        }
        let mut paused = Paused::by_switchover(&self.qmp, self.before);
        paused.hold_stream(self.channel()?.handle()?);
        let mut policy = DowntimePolicy::of_stream(&self.options, self.started);
        let mut is_stopped = false;
        loop {
            match self.watch.next(if is_stopped { PAUSED_POLL } else { IDLE_POLL }).await {
                News::Status(MigrationStatus::PreSwitchover) => break,
                // The owner may stop the guest, or QEMU for the switch-over: the state tells which.
                News::Stop => match run_state(&self.qmp).await?.as_str() {
                    "finish-migrate" => is_stopped = true,
                    state => {
                        paused.leave_to_owner();
                        return Err(disturbed(format!("its run state became `{state}`")));
                    }
                },
                News::Resume if !self.before.is_live() => {
                    return Err(disturbed("the guest was let run (`cont`)".into()));
                }
                News::Resume => {}
                News::Status(_) | News::Look => {
                    let progress = self.watch.look().await?;
                    if progress.status == MigrationStatus::PreSwitchover {
                        break;
                    }
                    if !is_stopped && let Some(limit) = policy.judge(&progress, Instant::now())? {
                        let passes = progress.ram.passes;
                        tracing::debug!(limit, passes, "allowing a longer pause");
                        set_downtime_limit(&self.qmp, limit).await?;
                    }
                    self.watch.check_time(&progress, self.started, self.options.timeout)?;
                }
            }
        }
        self.check_awake()?;
        // A reply of QEMU may overtake its events on the way to `watch`, but not to this.
        let stopped = self.stops.since(self.started).last().map(|event| event.at);
        paused.switched_over(stopped.unwrap_or_else(Instant::now));
        self.stage = Stage::SwitchedOver;
        Ok(paused)
    }
}

fn disturbed(what: String) -> MigrationError {
    PauseError::Disturbed { what }.into()
}
