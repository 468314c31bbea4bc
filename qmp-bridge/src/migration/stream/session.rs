//! One migration from its preparation to its end, as a guard.
//!
//! A dropped session cancels: what the guest needs is done before `drop` returns, the rest
//! (settings, journal) by a task; and if there is no runtime any more, by [`super::recover`] of the
//! next helper.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::activation::Activation;
use super::journal::Journal;
use super::recover::{SESSION_MARKER, recover, undo};
use super::{StreamMode, StreamOptions, WhenTooFast, probe};
use crate::migration::channel::Channel;
use crate::migration::downtime::DowntimePolicy;
use crate::migration::settings::{Found, Wanted};
use crate::migration::status::check_idle;
use crate::migration::watch::{IDLE_POLL, PAUSED_POLL, Watch};
use crate::migration::{MigrationError, MigrationStatus, Progress};
use crate::paused::{self, PAUSE_LIMIT, Paused, run_state};
use crate::qmp::{EventWatch, Qmp};
use crate::run_state::RunState;

/// As fast as it goes. What is above it differs from session to session.
const UNLIMITED: u64 = 1 << 40;
/// How long QEMU may take to close its end of the stream after it says `completed`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a drop may block its thread until QEMU has taken the cancellation.
const LAST_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Prepared,
    Started,
    /// Pre-copy: QEMU has stopped the guest and waits for us.
    SwitchedOver,
    /// The guest may run on, or does.
    Held,
}

/// What has to be undone, in one piece that a task can take over.
#[derive(Debug)]
pub(super) struct Undo {
    qmp: Qmp,
    journal: Journal,
    channel: Option<Channel>,
    activation: Option<Activation>,
}

/// A migration of ours; see the module's head for the order of calls.
#[must_use = "dropping it cancels the migration"]
#[derive(Debug)]
pub struct Migration {
    pub(super) qmp: Qmp,
    mode: StreamMode,
    pub(super) options: StreamOptions,
    pub(super) stage: Stage,
    pub(super) watch: Watch,
    /// Whether the guest has suspended itself since the first look at its run state.
    suspends: EventWatch,
    pub(super) stops: EventWatch,
    /// When `migrate` was sent.
    pub(super) started: Instant,
    /// The guest's run state then.
    pub(super) before: RunState,
    /// Taken when everything is as it was.
    undo: Option<Undo>,
}

impl Migration {
    /// While the guest runs: looks that QEMU is idle and able, writes down in `journal` what it
    /// finds, sets capabilities and parameters, and gives QEMU its end of a socket pair. A journal
    /// that is there already is recovered from first.
    ///
    /// # Errors
    /// When a migration is under way, QEMU refuses a setting, or the journal cannot be written.
    pub async fn prepare(
        qmp: &Qmp,
        mode: StreamMode,
        options: &StreamOptions,
        journal: &Path,
    ) -> Result<Self, MigrationError> {
        recover(qmp, journal).await?;
        let blocked = check_idle(qmp).await?.blocked_reasons;
        if !blocked.is_empty() {
            return Err(MigrationError::Unsupported { mode, why: blocked.join("; ") });
        }
        let suspends = qmp.watch(&["SUSPEND"]);
        check_state(qmp, mode).await?;
        let first_limit = DowntimePolicy::of_stream(options, Instant::now()).limit_ms();
        let wanted = Wanted::live(&mode.capabilities(), UNLIMITED + distinction(), first_limit);
        let settings = Found::read(qmp).await?.plan(qmp, wanted)?;
        let journal = Journal::write(journal, mode, settings)?;
        let undo = Undo { qmp: qmp.clone(), journal, channel: None, activation: None };
        // From here on the drop undoes, also when this future is dropped.
        let mut session = Self {
            qmp: qmp.clone(),
            mode,
            options: options.clone(),
            stage: Stage::Prepared,
            watch: watch(qmp),
            suspends,
            stops: qmp.watch(&["STOP"]),
            started: Instant::now(),
            before: RunState::Paused,
            undo: Some(undo),
        };
        match session.set_up().await {
            Ok(()) => Ok(session),
            Err(error) => {
                if let Err(second) = session.cancel().await {
                    tracing::warn!(error = %second, "cannot take the preparation of a migration back; the next start of the helper will");
                }
                Err(error)
            }
        }
    }

    async fn set_up(&mut self) -> Result<(), MigrationError> {
        let undo = self.undo()?;
        paused::place_marker(&undo.qmp, SESSION_MARKER).await?;
        let applied = undo.journal.entry.settings.apply(&undo.qmp).await;
        applied.map_err(|source| MigrationError::Setup { source })?;
        undo.channel = Some(Channel::open(&undo.qmp).await?);
        Ok(())
    }

    pub(super) fn undo(&mut self) -> Result<&mut Undo, MigrationError> {
        self.undo.as_mut().ok_or(MigrationError::Order("it has ended"))
    }

    pub(super) fn channel(&mut self) -> Result<&mut Channel, MigrationError> {
        self.undo()?.channel.as_mut().ok_or(MigrationError::Order("it has no stream any more"))
    }

    /// How memory gets out of QEMU.
    pub fn mode(&self) -> StreamMode {
        self.mode
    }

    /// The read end of the stream. The caller reads it, blocking, to its end: while the caller does
    /// not read, QEMU waits, and after a background snapshot has begun, a guest that writes waits
    /// too. To be taken once.
    ///
    /// # Errors
    /// When it was taken before.
    pub fn take_reader(&mut self) -> Result<UnixStream, MigrationError> {
        self.channel()?.take_reader().ok_or(MigrationError::Order("the reader was taken before"))
    }

    /// Sends `migrate`. Pre-copy: the guest runs, the fleecing overlays of the disk capture are
    /// prepared already (QEMU before 10.0 can only activate nodes that it has now), and
    /// [`Self::switchover`] follows at once. Background snapshot: the caller holds a [`Paused`] and
    /// has taken the disks, and [`Self::memory_is_held`] follows at once.
    ///
    /// # Errors
    /// When QEMU refuses to migrate.
    #[tracing::instrument(name = "migrate", skip_all, fields(mode = %self.mode))]
    pub async fn start(&mut self) -> Result<(), MigrationError> {
        if self.stage != Stage::Prepared {
            return Err(MigrationError::Order("it was started before"));
        }
        match self.mode {
            StreamMode::PreCopy => self.announce().await?,
            StreamMode::BackgroundSnapshot => self.check_stopped().await?,
        }
        self.check_awake()?;
        self.watch = watch(&self.qmp);
        self.started = Instant::now();
        // A `migrate` without a reply may have begun.
        self.stage = Stage::Started;
        let sent =
            self.qmp.execute_json("migrate", json!({ "uri": Channel::uri(&self.qmp) })).await;
        sent.map(drop).map_err(|source| MigrationError::Start { mode: self.mode, source })
    }

    async fn announce(&mut self) -> Result<(), MigrationError> {
        check_state(&self.qmp, self.mode).await?;
        let undo = self.undo.as_mut().ok_or(MigrationError::Order("it has ended"))?;
        undo.activation = Some(Activation::plan(&self.qmp, &undo.journal.socket()).await?);
        self.before = Paused::announce_switchover(&self.qmp).await?;
        Ok(())
    }

    /// From another state QEMU would abort, see [`probe::unsupported_state`].
    async fn check_stopped(&mut self) -> Result<(), MigrationError> {
        match run_state(&self.qmp).await?.as_str() {
            "paused" => Ok(()),
            other => {
                let why = format!("the guest's state is `{other}` and must be `paused`");
                Err(MigrationError::Unsupported { mode: self.mode, why })
            }
        }
    }

    /// Fails if the guest has suspended itself, see [`probe::unsupported_state`].
    pub(super) fn check_awake(&self) -> Result<(), MigrationError> {
        if self.suspends.is_empty() {
            return Ok(());
        }
        Err(MigrationError::Unsupported { mode: self.mode, why: probe::SUSPENDED.into() })
    }

    /// Pre-copy, with the guest stopped by [`Self::switchover`]: lets QEMU send the rest of memory
    /// and the devices, waits for it, and makes all disks active again, so that a disk transaction
    /// can follow. The guest stays stopped.
    ///
    /// # Errors
    /// When the migration has not reached the switchover, or fails.
    #[tracing::instrument(name = "complete", skip_all)]
    pub async fn complete(&mut self, paused: &Paused) -> Result<(), MigrationError> {
        if self.stage != Stage::SwitchedOver {
            return Err(MigrationError::Order("`complete` comes after `switchover`"));
        }
        let limit = self.pause_limit(paused);
        let completed = within(limit, "is the stream read?", self.wait_switched()).await;
        if let Err(error) = completed {
            // While QEMU cannot write it hears no command either; with the stream cut the migration
            // fails.
            self.channel()?.cut();
            return Err(error);
        }
        tracing::debug!("completed after {:?} of pause", paused.elapsed());
        if let Some(Undo { qmp, activation: Some(activation), .. }) = &self.undo {
            activation.run(qmp).await?;
        }
        self.stage = Stage::Held;
        Ok(())
    }

    async fn wait_switched(&mut self) -> Result<(), MigrationError> {
        self.qmp.execute_json("migrate-continue", json!({ "state": "pre-switchover" })).await?;
        let timeout = self.options.timeout;
        self.watch.wait_for(MigrationStatus::Completed, PAUSED_POLL, timeout).await?;
        // `completed` is said a little before the guest's state follows, and `cont` is refused
        // until then.
        while run_state(&self.qmp).await? == "finish-migrate" {}
        Ok(())
    }

    /// Background snapshot: waits until QEMU has write-protected all memory and lets the guest run
    /// on. Returns how long it was stopped. Needs a reader at work.
    ///
    /// # Errors
    /// When the migration is no background snapshot, or the guest cannot be resumed.
    #[tracing::instrument(name = "hold", skip_all)]
    pub async fn memory_is_held(&mut self, mut paused: Paused) -> Result<Duration, MigrationError> {
        if self.stage != Stage::Started || self.mode != StreamMode::BackgroundSnapshot {
            return Err(MigrationError::Order(
                "`memory_is_held` comes after `start` of a background snapshot",
            ));
        }
        let limit = self.pause_limit(&paused);
        // QEMU itself may wait until the helper reads a page from the stream.
        paused.hold_stream(self.channel()?.handle()?);
        let held = async {
            self.wait_protected().await?;
            Ok(paused.resume().await?)
        };
        let pause =
            within(limit, "large memory takes long to be write-protected; use pre-copy", held)
                .await?;
        self.stage = Stage::Held;
        Ok(pause)
    }

    /// Pages are sent only after all are protected.
    async fn wait_protected(&mut self) -> Result<(), MigrationError> {
        loop {
            if self.watch.look().await?.ram.pages() > 0 {
                return Ok(());
            }
            self.watch.next(PAUSED_POLL).await;
        }
    }

    /// Waits until QEMU has sent everything, then puts back what was changed and removes the
    /// journal. If the stream failed, its reason is the error, and all is put back as well.
    ///
    /// # Errors
    /// When the migration has not ended, or QEMU refuses to restore a setting.
    #[tracing::instrument(name = "finish", skip_all)]
    pub async fn finish(mut self) -> Result<Progress, MigrationError> {
        let waited = match self.stage {
            Stage::Held => self.wait_completed().await,
            _ => Err(MigrationError::Order("`finish` comes after `complete` or `memory_is_held`")),
        };
        if waited.is_ok() {
            // What QEMU has sent is still on its way to the reader, so nothing is cut.
            self.wait_closed().await;
            self.undo()?.channel = None;
        }
        let undone = self.end().await;
        let progress = waited?;
        undone?;
        Ok(progress)
    }

    /// Ends the migration and puts back what was changed. A [`Paused`] of it resumes the guest by
    /// itself.
    ///
    /// # Errors
    /// When QEMU refuses to cancel, or to restore a setting.
    pub async fn cancel(mut self) -> Result<(), MigrationError> {
        self.end().await
    }

    async fn end(&mut self) -> Result<(), MigrationError> {
        let undo = self.undo()?;
        undo.run().await?;
        self.undo = None;
        Ok(())
    }

    /// How far it is.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn progress(&self) -> Result<Progress, MigrationError> {
        Ok(Progress::query(&self.qmp).await?)
    }

    /// The capabilities may be changed only when QEMU's clean-up, which asks them what there is to
    /// clean, is over.
    async fn wait_closed(&mut self) {
        let Some(channel) = self.undo.as_ref().and_then(|undo| undo.channel.as_ref()) else {
            return;
        };
        if !channel.closed_by_qemu(CLOSE_TIMEOUT).await {
            tracing::warn!("QEMU keeps its end of a completed stream open");
        }
    }

    async fn wait_completed(&mut self) -> Result<Progress, MigrationError> {
        let progress = self.watch.look().await?;
        if progress.status == MigrationStatus::Completed {
            return Ok(progress);
        }
        let timeout = self.options.timeout.saturating_sub(self.started.elapsed());
        self.watch.wait_for(MigrationStatus::Completed, IDLE_POLL, timeout).await?;
        self.progress().await
    }

    /// How much longer the pause may take. With [`WhenTooFast::SwitchOver`] the caller accepts any
    /// pause, so only the migration's timeout limits it.
    fn pause_limit(&self, paused: &Paused) -> Duration {
        let allowed = match (self.mode, self.options.when_too_fast) {
            (StreamMode::PreCopy, WhenTooFast::SwitchOver) => self.options.timeout,
            _ => {
                PAUSE_LIMIT.max(self.options.max_pause.saturating_mul(2)).min(self.options.timeout)
            }
        };
        allowed.saturating_sub(paused.elapsed())
    }
}

fn watch(qmp: &Qmp) -> Watch {
    Watch::new(qmp, "QEMU's migration stream", "; is it read?")
}

/// A number that differs from session to session.
fn distinction() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    1 + (u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 8) % (1 << 32)
}

/// Ends a pause that has taken too long for anything.
async fn within<T>(
    limit: Duration,
    hint: &'static str,
    work: impl Future<Output = Result<T, MigrationError>>,
) -> Result<T, MigrationError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(MigrationError::PauseTooLong { hint }))
}

impl Drop for Migration {
    fn drop(&mut self) {
        let Some(mut undo) = self.undo.take() else { return };
        tracing::warn!("a migration session was abandoned; cancelling it");
        if self.stage != Stage::Prepared {
            undo.cancel_blocking();
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return tracing::warn!(
                "a migration session ends with its runtime; the next start of the helper puts things back"
            );
        };
        runtime.spawn(async move {
            if let Err(error) = undo.run().await {
                tracing::warn!(%error, "cannot put QEMU's migration settings back; the next start of the helper will");
            }
        });
    }
}

impl Undo {
    /// For a drop: the guest must not wait for what comes later.
    fn cancel_blocking(&mut self) {
        self.cut();
        if let Err(error) = self.qmp.send_and_linger("migrate_cancel", Value::Null, LAST_TIMEOUT) {
            tracing::warn!(%error, "cannot cancel the migration");
        }
    }

    /// Always first: a QEMU that cannot write, or whose guest waits for a page to be sent, may hear
    /// no command.
    fn cut(&self) {
        if let Some(channel) = &self.channel {
            channel.cut();
        }
    }

    /// Ends whatever of the migration is left. Repeatable.
    async fn run(&mut self) -> Result<(), MigrationError> {
        self.cut();
        undo(&self.qmp, &self.journal).await?;
        self.journal.remove()
    }
}

async fn check_state(qmp: &Qmp, mode: StreamMode) -> Result<(), MigrationError> {
    let state = run_state(qmp).await?;
    match probe::unsupported_state(qmp, mode, &state) {
        Some(why) => Err(MigrationError::Unsupported { mode, why }),
        None => Ok(()),
    }
}
