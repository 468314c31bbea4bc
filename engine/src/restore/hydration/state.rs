//! How far a hydration is, and what is in its way.

use super::record::Record;
use crate::progress::bytes;
use checkpoint_format::CheckpointId;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::watch;
use vm::error::{Class, class_of, explain};

/// What is known of a hydration under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrationStatus {
    /// The VM whose checkpoint it is.
    pub vm: String,
    /// The checkpoint that memory comes from.
    pub checkpoint: CheckpointId,
    /// The URL of the store that has it.
    pub store: String,
    /// Of the pages that are not zero, those that are here.
    pub done_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
    /// Pages that the VM has waited for, or waits for now.
    pub faults: u64,
    /// The store does not answer; threads that wait for a page continue to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_away: Option<Trouble>,
    /// What the store has is damaged. A guest that needed it was stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<Trouble>,
}

/// What is in the way, and since when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// As RFC 3339 has it, in UTC.
    pub since: String,
    /// The message of the last failure.
    pub message: String,
}

/// What the tasks of a hydration share with who asks for its status.
pub(super) struct State {
    record: Record,
    done: AtomicU64,
    faults: AtomicU64,
    troubles: Mutex<Troubles>,
    waiting: watch::Sender<usize>,
    is_done: AtomicBool,
}

#[derive(Default)]
struct Troubles {
    away: Option<Trouble>,
    damaged: Option<Trouble>,
}

/// A thread of QEMU waits for a page as long as this lives.
pub(super) struct Waiting<'a>(&'a State);

impl State {
    pub(super) fn new(record: Record) -> Self {
        Self {
            record,
            done: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            troubles: Mutex::default(),
            waiting: watch::Sender::new(0),
            is_done: AtomicBool::new(false),
        }
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    pub(super) fn is_done(&self) -> bool {
        self.is_done.load(Ordering::Acquire)
    }

    pub(super) fn status(&self) -> HydrationStatus {
        let Record { vm, checkpoint, store, total_bytes, .. } = &self.record;
        let troubles = self.troubles();
        HydrationStatus {
            vm: vm.to_string(),
            checkpoint: checkpoint.id,
            store: store.clone(),
            done_bytes: self.done.load(Ordering::Relaxed).min(*total_bytes),
            total_bytes: *total_bytes,
            faults: self.faults.load(Ordering::Relaxed),
            store_away: troubles.away.clone(),
            damaged: troubles.damaged.clone(),
        }
    }

    pub(super) fn add_done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn finish(&self) {
        self.done.store(self.record.total_bytes, Ordering::Relaxed);
        *self.troubles() = Troubles::default();
        self.is_done.store(true, Ordering::Release);
        tracing::info!(
            memory = bytes(self.record.total_bytes),
            faults = self.faults.load(Ordering::Relaxed),
            "all memory has arrived"
        );
    }

    pub(super) fn begin_waiting(&self) -> Waiting<'_> {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.waiting.send_modify(|count| *count += 1);
        Waiting(self)
    }

    /// Until no thread waits for a page.
    pub(super) async fn no_thread_waits(&self) {
        let _ = self.waiting.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Whether what the store has is the trouble, not whether it answers.
    pub(super) fn failed(&self, error: &anyhow::Error) -> bool {
        let message = explain(error);
        let is_damaged = class_of(error) == Class::Damaged;
        let mut troubles = self.troubles();
        let trouble = if is_damaged { &mut troubles.damaged } else { &mut troubles.away };
        note(trouble, message);
        is_damaged
    }

    /// A read takes so long that the store may not answer at all.
    pub(super) fn slow(&self) {
        note(&mut self.troubles().away, "the store has not answered yet".to_owned());
    }

    pub(super) fn succeeded(&self) {
        if let Some(trouble) = self.troubles().away.take() {
            tracing::info!(since = trouble.since, "the store answers again");
        }
    }

    fn troubles(&self) -> MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn note(trouble: &mut Option<Trouble>, message: String) {
    match trouble {
        Some(trouble) => trouble.message = message,
        None => {
            tracing::warn!(error = message, "memory that is still to come cannot be read");
            let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
            *trouble = Some(Trouble { since, message });
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_modify(|count| *count -= 1);
    }
}
