//! QEMU's events, kept for a caller that has to know whether one of them came.
//!
//! Events and replies of one connection come in order, and the reader notes an event before it
//! hands out the next reply. So when a command has been answered, every event that QEMU sent before
//! that is here; and the time at which each was read tells which came first.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::QmpEvent;

/// Events kept by one watch. What comes after so many adds nothing for a caller that expects none,
/// or one.
const MOST_EVENTS: usize = 64;

/// The events of certain names since [`super::Qmp::watch`].
#[derive(Debug, Clone)]
pub struct EventWatch(pub(super) Arc<Seen>);

#[derive(Debug)]
pub(super) struct Seen {
    names: &'static [&'static str],
    events: Mutex<Vec<QmpEvent>>,
}

impl Seen {
    pub(super) fn of(names: &'static [&'static str]) -> Self {
        Self { names, events: Mutex::default() }
    }

    pub(super) fn note(&self, event: &QmpEvent) {
        if !self.names.contains(&event.name.as_str()) {
            return;
        }
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < MOST_EVENTS {
            events.push(event.clone());
        }
    }
}

impl EventWatch {
    /// Whether none has come yet.
    pub fn is_empty(&self) -> bool {
        self.0.events.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Those that were read after `begin`, oldest first.
    pub fn since(&self, begin: Instant) -> Vec<QmpEvent> {
        let events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| event.at > begin).cloned().collect()
    }
}
