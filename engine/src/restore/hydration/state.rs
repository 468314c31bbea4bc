//! How far a hydration is, and what is in its way.

use super::record::Record;
use crate::progress::bytes;
use checkpoint_format::{CheckpointId, PageIndex};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
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
    /// The guest waited for a page until the deadline, and was stopped for that. It stays so until
    /// `cont`, also when the page has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Trouble>,
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
    stopped: Option<Trouble>,
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
            stopped: troubles.stopped.clone(),
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
        note(trouble, message, &self.record);
        is_damaged
    }

    /// A thread has waited until the deadline; what is in its way is said again.
    pub(super) fn overdue(&self, page: PageIndex, deadline: Duration) -> String {
        let mut troubles = self.troubles();
        let cause = troubles.damaged.as_ref().or(troubles.away.as_ref());
        let cause = cause.map_or("the store has not answered yet", |cause| &cause.message);
        let message = format!(
            "the guest waited for page {page} for {deadline:?}, which comes from {}: {cause}",
            self.record.store
        );
        troubles.stopped = Some(Trouble::now(message.clone()));
        message
    }

    /// A read takes so long that the store may not answer at all.
    pub(super) fn slow(&self) {
        let message = "the store has not answered yet".to_owned();
        note(&mut self.troubles().away, message, &self.record);
    }

    pub(super) fn succeeded(&self) {
        if let Some(trouble) = self.troubles().away.take() {
            let store = &self.record.store;
            tracing::info!(store, since = trouble.since, "the store answers again");
        }
    }

    fn troubles(&self) -> MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trouble {
    pub(in crate::restore) fn now(message: String) -> Self {
        let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Self { since, message }
    }
}

fn note(trouble: &mut Option<Trouble>, message: String, record: &Record) {
    match trouble {
        Some(trouble) => trouble.message = message,
        None => {
            let store = &record.store;
            tracing::warn!(store, error = message, "memory that is still to come cannot be read");
            *trouble = Some(Trouble::now(message));
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::anyhow;
    use checkpoint_format::CheckpointIdentity;
    use vm::error::damaged;

    fn state() -> State {
        State::new(Record {
            instance: "one".into(),
            store: "file:///s".into(),
            vm: "m".parse().unwrap(),
            checkpoint: CheckpointIdentity::new(CheckpointId(7), b"manifest"),
            block: "pc.ram".into(),
            host_address: 0,
            bytes: 0,
            total_bytes: 0,
            deadline: None,
        })
    }

    #[test]
    fn hydration_status_says_what_is_in_the_way_and_since_when() {
        let state = state();
        assert!(!state.failed(&anyhow!("no route")));
        let first = state.status().store_away.unwrap();
        assert!(!state.failed(&anyhow!("still no route")));
        let later = state.status().store_away.unwrap();
        assert_eq!((&later.since, later.message.as_str()), (&first.since, "still no route"));
        let said = state.overdue(PageIndex(5), Duration::from_secs(3));
        assert!(said.contains("file:///s") && said.contains("still no route"), "{said}");
        state.succeeded();
        let status = state.status();
        assert_eq!((status.store_away, status.stopped.unwrap().message), (None, said));
        assert!(state.failed(&damaged("0-1.pack: frame 3")));
        assert_eq!(state.status().damaged.unwrap().message, "0-1.pack: frame 3");
        state.finish();
        let status = state.status();
        assert_eq!((status.store_away, status.damaged, status.stopped), (None, None, None));
    }
}
