//! When a pre-copy stops the guest: the limit begins small and grows only while the passes do not
//! get there.
//!
//! QEMU stops the guest as soon as it believes that the rest can be sent within `downtime-limit`.
//! It measures its speed in windows of 100 ms, and takes a new limit at the next one, so nothing is
//! judged faster than that.

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
        Self {
            limit: first_limit(options),
            max: options.max_pause,
            when_too_fast: options.when_too_fast,
            since: now,
            pass: 1,
        }
    }

    /// What follows from how far it is.
    pub(super) fn judge(
        &mut self,
        progress: &Progress,
        now: Instant,
    ) -> Result<Step, MigrationError> {
        let last = self.limit >= self.max;
        let (trial, passes) =
            if last { (LAST_TRIAL, LAST_TRIAL_PASSES) } else { (TRIAL, TRIAL_PASSES) };
        // The first pass is everything, however long it takes.
        if self.limit >= NO_LIMIT
            || progress.passes < self.pass + passes
            || now.duration_since(self.since) < trial
        {
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

#[cfg(test)]
mod test {
    use super::*;

    fn progress(passes: u64) -> Progress {
        Progress { passes, written_rate: 300 << 20, sent_rate: 100 << 20, ..Progress::default() }
    }

    /// Each pass takes half a second and is not enough.
    fn run(options: &StreamOptions) -> (Vec<u64>, Option<MigrationError>) {
        let start = Instant::now();
        let mut policy = Policy::new(options, start);
        let mut limits = vec![first_limit_ms(options)];
        for pass in 1..100 {
            match policy.judge(&progress(pass), start + Duration::from_millis(500) * pass as u32) {
                Ok(Step::Wait) => {}
                Ok(Step::Raise(limit)) => limits.push(limit),
                Err(error) => return (limits, Some(error)),
            }
        }
        (limits, None)
    }

    #[test]
    fn the_limit_doubles_up_to_the_longest_pause_allowed() {
        let options =
            StreamOptions { max_pause: Duration::from_millis(30), ..StreamOptions::default() };
        let (limits, error) = run(&options);
        assert_eq!(limits, [5, 10, 20, 30]);
        let said = error.expect("too fast").to_string();
        assert!(
            said.contains("300 MiB/s") && said.contains("100 MiB/s") && said.contains("30ms"),
            "{said}"
        );
        let (limits, error) =
            run(&StreamOptions { when_too_fast: WhenTooFast::SwitchOver, ..options });
        assert_eq!((limits, error.is_none()), (vec![5, 10, 20, 30, 2_000_000], true));
    }

    #[test]
    fn a_small_allowance_is_kept_from_the_start() {
        assert_eq!(
            run(&StreamOptions { max_pause: Duration::from_millis(2), ..StreamOptions::default() })
                .0,
            [2]
        );
        assert_eq!(
            run(&StreamOptions { max_pause: Duration::ZERO, ..StreamOptions::default() }).0,
            [1]
        );
        let huge = StreamOptions { max_pause: Duration::MAX, ..StreamOptions::default() };
        assert_eq!(run(&huge).0.last(), Some(&2_000_000));
    }

    #[test]
    fn quick_passes_do_not_raise_it_before_qemu_knows_its_speed() {
        let start = Instant::now();
        let mut policy = Policy::new(&StreamOptions::default(), start);
        for pass in 1..1000 {
            assert_eq!(
                policy.judge(&progress(pass), start + Duration::from_millis(100)).expect("early"),
                Step::Wait
            );
        }
    }

    #[test]
    fn the_first_pass_may_take_for_ever() {
        let start = Instant::now();
        let mut policy = Policy::new(&StreamOptions::default(), start);
        for second in 0..1000 {
            assert_eq!(
                policy.judge(&progress(1), start + Duration::from_secs(second)).expect("first"),
                Step::Wait
            );
        }
    }
}
