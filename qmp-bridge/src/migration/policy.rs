//! When a pre-copy stops the guest: the limit begins small and grows only while the passes do not get there.
//!
//! QEMU stops the guest as soon as it believes that the rest can be sent within `downtime-limit`. It measures its speed
//! in windows of 100 ms, and takes a new limit at the next one, so nothing is judged faster than that.

use std::time::{Duration, Instant};

use super::{MigrationError, Progress, StreamOptions, WhenTooFast};

/// The first limit: a guest that writes little never waits longer.
const FIRST_LIMIT: Duration = Duration::from_millis(5);
/// A limit has this long, and this many passes over memory, to be enough.
const TRIAL: Duration = Duration::from_millis(250);
const TRIAL_PASSES: u64 = 2;
/// The last limit has more.
const LAST_TRIAL: Duration = Duration::from_millis(1500);
const LAST_TRIAL_PASSES: u64 = 4;
/// QEMU's largest `downtime-limit`: the guest is stopped after this pass.
const NO_LIMIT: Duration = Duration::from_secs(2000);

#[derive(Debug)]
pub(super) struct Policy {
    limit: Duration,
    max: Duration,
    when_too_fast: WhenTooFast,
    /// When the present limit was set, and the pass then under way.
    since: Instant,
    pass: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Wait,
    /// Set this `downtime-limit`, in milliseconds.
    Raise(u64),
}

impl Policy {
    pub(super) fn new(options: &StreamOptions, now: Instant) -> Self {
        Self { limit: first_limit(options), max: options.max_pause, when_too_fast: options.when_too_fast, since: now, pass: 1 }
    }

    /// What follows from how far it is.
    pub(super) fn judge(&mut self, progress: &Progress, now: Instant) -> Result<Step, MigrationError> {
        let last = self.limit >= self.max;
        let (trial, passes) = if last { (LAST_TRIAL, LAST_TRIAL_PASSES) } else { (TRIAL, TRIAL_PASSES) };
        // The first pass is everything, however long it takes.
        if self.limit >= NO_LIMIT || progress.passes < self.pass + passes || now.duration_since(self.since) < trial {
            return Ok(Step::Wait);
        }
        self.since = now;
        self.pass = progress.passes;
        if last && self.when_too_fast == WhenTooFast::Fail {
            let mebibytes = |rate: u64| rate >> 20;
            return Err(MigrationError::TooFast {
                written: mebibytes(progress.written_rate),
                read: mebibytes(progress.sent_rate),
                limit: self.max,
            });
        }
        self.limit = if last { NO_LIMIT } else { (self.limit * 2).min(self.max) };
        Ok(Step::Raise(milliseconds(self.limit)))
    }
}

/// The `downtime-limit` to start with, in milliseconds.
pub(super) fn first_limit_ms(options: &StreamOptions) -> u64 {
    milliseconds(first_limit(options))
}

fn first_limit(options: &StreamOptions) -> Duration {
    FIRST_LIMIT.min(options.max_pause)
}

/// At least 1: with 0 QEMU would wait for a guest that writes nothing at all.
fn milliseconds(limit: Duration) -> u64 {
    u64::try_from(limit.min(NO_LIMIT).as_millis()).unwrap_or(u64::MAX).max(1)
}
