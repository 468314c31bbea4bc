//! Pre-copy until QEMU has stopped the guest.

use std::time::Instant;

use super::policy::{Policy, Step};
use super::session::{IDLE_LOOK, Migration, PAUSED_LOOK, Stage};
use super::settings::set_downtime_limit;
use super::status::{Hint, Progress};
use super::{MigrationError, StreamMode};
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
        let mut policy = Policy::new(&self.options, self.started);
        let mut stopped = None;
        loop {
            let look = if stopped.is_some() { PAUSED_LOOK } else { IDLE_LOOK };
            match self.hints.next(look).await {
                Hint::Status(status) if status == "pre-switchover" => break,
                // The owner may stop the guest, or QEMU for the switch-over: the state tells which.
                Hint::Stop(at) => match run_state(&self.qmp).await?.as_str() {
                    "finish-migrate" => stopped = Some(at),
                    state => {
                        paused.leave_to_owner();
                        return Err(disturbed(format!("its run state became `{state}`")));
                    }
                },
                Hint::Resume if !self.before.is_live() => {
                    return Err(disturbed("the guest was let run (`cont`)".into()));
                }
                Hint::Resume => {}
                Hint::Status(_) | Hint::Look => {
                    let progress = Progress::query(&self.qmp).await?;
                    progress.check()?;
                    if progress.status == "pre-switchover" {
                        break;
                    }
                    if stopped.is_none()
                        && let Step::Raise(limit) = policy.judge(&progress, Instant::now())?
                    {
                        tracing::debug!(limit, passes = progress.passes, "allowing a longer pause");
                        set_downtime_limit(&self.qmp, limit).await?;
                    }
                    self.check_time(
                        &progress,
                        "the guest's memory does not acknowledge, or the stream is not read",
                    )?;
                }
            }
        }
        // The reply to a question may have overtaken the news.
        for hint in self.hints.queued() {
            match hint {
                Hint::Stop(at) => stopped = Some(at),
                Hint::Resume | Hint::Status(_) | Hint::Look => {}
            }
        }
        self.check_awake()?;
        paused.switched_over(stopped.unwrap_or_else(Instant::now));
        self.stage = Stage::SwitchedOver;
        Ok(paused)
    }
}

fn disturbed(what: String) -> MigrationError {
    PauseError::Disturbed { what }.into()
}
