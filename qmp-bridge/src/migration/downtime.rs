//! When QEMU may stop the guest for the rest of its memory: the limit begins small and grows only
//! while the passes do not get there.
//!
//! QEMU (7.2 and 10.0) stops the guest as soon as it believes that the rest can be sent within
//! `downtime-limit`. It measures its speed in windows of 100 ms, and takes a new limit at the next
//! one, so nothing is judged faster than that, however quickly passes follow each other.

use std::iter::successors;
use std::time::{Duration, Instant};

use super::{MigrationError, Progress, StreamOptions, WhenTooFast};

/// QEMU's largest `downtime-limit`, in milliseconds: the guest is stopped after this pass.
const NO_LIMIT_MS: u64 = 2_000_000;
/// The first limit of a stream: a guest that writes little never waits longer.
const FIRST_STREAM_MS: u64 = 5;
/// The limits of a move to another QEMU. The last is QEMU's own default.
const MOVE_MS: [u64; 5] = [10, 30, 80, 150, 300];

/// How much a limit gets before it is not enough: both of these.
#[derive(Debug, Clone, Copy)]
struct Trial {
    time: Duration,
    /// Passes over memory.
    passes: u64,
}

const fn trial(milliseconds: u64, passes: u64) -> Trial {
    Trial { time: Duration::from_millis(milliseconds), passes }
}

#[derive(Debug)]
pub(super) struct DowntimePolicy {
    /// Milliseconds, at least 1: with 0 QEMU would wait for a guest that writes nothing at all.
    limits: Vec<u64>,
    step: usize,
    /// Of each limit, and of the last.
    trials: [Trial; 2],
    /// When the present limit was set, and the pass then under way.
    since: Instant,
    pass: u64,
    /// What to do when the guest writes too fast.
    advice: &'static str,
}

impl DowntimePolicy {
    /// Of a stream that the helper reads: each limit is twice the one before.
    pub(super) fn of_stream(options: &StreamOptions, now: Instant) -> Self {
        let max = u64::try_from(options.max_pause.as_millis()).unwrap_or(u64::MAX);
        let max = max.clamp(1, NO_LIMIT_MS);
        let double = |limit: &u64| (*limit < max).then(|| (limit * 2).min(max));
        let mut limits: Vec<u64> = successors(Some(FIRST_STREAM_MS.min(max)), double).collect();
        if options.when_too_fast == WhenTooFast::SwitchOver {
            limits.push(NO_LIMIT_MS);
        }
        let trials = [trial(250, 2), trial(1500, 4)];
        let advice = "allow a longer pause, or try again when it writes less";
        Self { limits, step: 0, trials, since: now, pass: 1, advice }
    }

    /// Of a move to another QEMU, whose own migration would begin with the last limit.
    pub(super) fn of_move(now: Instant) -> Self {
        let trials = [trial(250, 7), trial(1500, 31)];
        let advice = "try again when it writes less";
        Self { limits: MOVE_MS.to_vec(), step: 0, trials, since: now, pass: 1, advice }
    }

    /// The `downtime-limit` now, in milliseconds.
    pub(super) fn limit_ms(&self) -> u64 {
        self.limits[self.step]
    }

    /// The next `downtime-limit`, in milliseconds, if it is time for one.
    pub(super) fn judge(
        &mut self,
        progress: &Progress,
        now: Instant,
    ) -> Result<Option<u64>, MigrationError> {
        let is_last = self.step + 1 == self.limits.len();
        let trial = self.trials[usize::from(is_last)];
        let ram = &progress.ram;
        // The first pass is everything, however long it takes.
        if self.limit_ms() >= NO_LIMIT_MS
            || ram.passes < self.pass + trial.passes
            || now.duration_since(self.since) < trial.time
        {
            return Ok(None);
        }
        if is_last {
            return Err(MigrationError::TooFast {
                written: ram.written_rate() >> 20,
                sent: ram.sent_rate() >> 20,
                limit: Duration::from_millis(self.limit_ms()),
                advice: self.advice,
            });
        }
        (self.step, self.since, self.pass) = (self.step + 1, now, ram.passes);
        Ok(Some(self.limit_ms()))
    }
}

#[cfg(test)]
mod test {
    use super::super::status::RamProgress;
    use super::*;

    fn progress(passes: u64) -> Progress {
        let mbps = f64::from(100 << 20) * 8.0 / 1e6;
        let ram = RamProgress::at_rates(passes, 300 << 20, mbps);
        Progress { ram, ..Progress::default() }
    }

    /// Each pass takes half a second and is not enough.
    fn run(options: &StreamOptions) -> (Vec<u64>, Option<MigrationError>) {
        let start = Instant::now();
        let mut policy = DowntimePolicy::of_stream(options, start);
        let mut limits = vec![policy.limit_ms()];
        for pass in 1..100 {
            match policy.judge(&progress(pass), start + Duration::from_millis(500) * pass as u32) {
                Ok(None) => {}
                Ok(Some(limit)) => limits.push(limit),
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
        let mut policy = DowntimePolicy::of_stream(&StreamOptions::default(), start);
        for pass in 1..1000 {
            assert_eq!(
                policy.judge(&progress(pass), start + Duration::from_millis(100)).expect("early"),
                None
            );
        }
    }

    #[test]
    fn the_first_pass_may_take_for_ever() {
        let start = Instant::now();
        let mut policy = DowntimePolicy::of_stream(&StreamOptions::default(), start);
        for second in 0..1000 {
            assert_eq!(
                policy.judge(&progress(1), start + Duration::from_secs(second)).expect("first"),
                None
            );
        }
    }

    #[test]
    fn limit_of_a_move_grows_with_the_passes_and_ends() {
        let start = Instant::now();
        let mut policy = DowntimePolicy::of_move(start);
        let mut judge = |passes: u64| {
            policy.judge(&progress(passes), start + Duration::from_millis(500) * passes as u32)
        };
        for (pass, limit) in [(7, None), (8, Some(30)), (9, None), (15, Some(80)), (22, Some(150))]
        {
            assert_eq!(judge(pass).expect("not too fast yet"), limit, "pass {pass}");
        }
        assert_eq!(judge(29).expect("the last limit"), Some(300));
        assert_eq!(judge(59).expect("its trial"), None);
        assert!(matches!(judge(60), Err(MigrationError::TooFast { .. })));
        assert_eq!(DowntimePolicy::of_move(start).limit_ms(), 10);
    }
}
