//! The checkpoint stays in the store while memory and disks arrive from it: the store has a note
//! that it is in use.
//!
//! The note is written beside the work, since no guest should wait for it, and tried again if the
//! store does not take it. It goes when all is here, or when QEMU has ended. A helper that takes
//! the place of another renews the note of its QEMU.

use super::hydration::Hydration;
use super::lazy_disks::Disks;
use super::on_demand::Origin;
use crate::checkpoint::{Arriving, ArrivingDisks};
use crate::stores;
use anyhow::{Context, Result};
use checkpoint_store::{Reader, ReaderRecord};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use vm::error::{EngineError, InPhase, Phase};
use vm::runtime_dir::VmFile;

/// A note expires a day after it was renewed.
const RENEWAL: Duration = Duration::from_secs(30 * 60);
/// After a note that the store did not take.
const RETRY: Duration = Duration::from_secs(60);
/// What a store that is away may cost when nothing is needed from it any more.
const RELEASE: Duration = Duration::from_secs(10);
/// Between two looks whether all is here.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// A checkpoint that the store keeps for as long as this lives and anything is to come from it.
pub struct InUse {
    note: Arc<Note>,
    task: AbortHandle,
}

struct Note {
    origin: Origin,
    record: ReaderRecord,
    state: Mutex<State>,
}

enum State {
    /// Not in the store yet.
    Wanted,
    Noted(Reader),
    /// The checkpoint is not needed any more.
    Over,
}

impl InUse {
    /// Begins to note it for a VM whose guest may run; none if nothing is to come.
    ///
    /// # Errors
    /// When this host has no name.
    pub fn begin(
        vm: &VmFile,
        hydration: Option<&Hydration>,
        disks: Option<&Disks>,
    ) -> Result<Option<Self>, EngineError> {
        let origin = hydration.map(Hydration::origin).or_else(|| disks.map(Disks::origin));
        let Some(origin) = origin else { return Ok(None) };
        let host = nix::unistd::gethostname().context("asking for the host's name");
        let record = ReaderRecord {
            host: host.in_phase(Phase::Attach)?.to_string_lossy().into_owned(),
            vm: vm.name.clone(),
            instance: vm.instance.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let note = Arc::new(Note { origin, record, state: Mutex::new(State::Wanted) });
        let (hydration, disks) = (hydration.cloned(), disks.cloned());
        let is_needed = move || {
            hydration.as_ref().is_some_and(|memory| !memory.is_done())
                || disks.as_ref().is_some_and(|disks| !disks.is_done())
        };
        let task = tokio::spawn(keep(Arc::clone(&note), is_needed)).abort_handle();
        Ok(Some(Self { note, task }))
    }

    /// QEMU has ended, so nothing is needed any more. Takes some seconds if the store does not
    /// answer.
    pub async fn end(&self) {
        self.note.end().await;
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(note: Arc<Note>, is_needed: impl Fn() -> bool) {
    let mut due = Instant::now();
    while is_needed() {
        if Instant::now() >= due {
            let pause = match note.renew().await {
                Ok(()) => RENEWAL,
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "the store has no note that the checkpoint is in use");
                    RETRY
                }
            };
            due = Instant::now() + pause;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    note.end().await;
}

impl Note {
    async fn renew(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        match &*state {
            State::Over => Ok(()),
            State::Noted(reader) => Ok(reader.renew().await?),
            State::Wanted => {
                let Origin { store, vm, checkpoint } = &self.origin;
                let repository = stores::open_existing(store).await?;
                let reader = repository.begin_reading(vm, checkpoint.id, &self.record).await?;
                *state = State::Noted(reader);
                Ok(())
            }
        }
    }

    async fn end(&self) {
        let release = async {
            let ended = std::mem::replace(&mut *self.state.lock().await, State::Over);
            match ended {
                State::Noted(reader) => reader.release().await,
                State::Wanted | State::Over => Ok(()),
            }
        };
        let why = match tokio::time::timeout(RELEASE, release).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {RELEASE:?}"),
        };
        tracing::warn!(why, "the store says for a day that the checkpoint is in use");
    }
}
