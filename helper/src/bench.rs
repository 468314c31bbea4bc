//! What checkpoints of a running VM cost, beside the least that a pause of it can cost.
//!
//! Bare pauses (`stop` and `cont`, nothing in between) and checkpoints take turns, half an interval
//! apart, so that each pair sees the same host and guest: the ratio is of pairs, not of two runs.

use crate::client;
use crate::control::Status;
use crate::statistics::Spread;
use checkpoint_format::CheckpointId;
use engine::checkpoint::Choice;
use engine::checkpoint::outcome::{Kind, Outcome};
use engine::progress::Update;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use vm::error::EngineError;
use vm::runtime_dir::RuntimeDir;

/// From here on a delta is more than its metadata.
const LARGE_DELTA_BYTES: u64 = 4 << 20;

/// A bare pause and the checkpoint after it.
#[derive(Clone, Debug)]
struct Pair {
    bare_ms: f64,
    checkpoint: Outcome,
}

/// The same with what `bench --json` says of it.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// As [`Outcome::id`].
    pub id: CheckpointId,
    /// As [`Outcome::kind`].
    pub kind: Kind,
    /// The bare pause before it: from `stop` to `cont`, in milliseconds.
    pub bare_pause_ms: f64,
    /// As [`Outcome::pause_ms`].
    pub pause_ms: f64,
    /// As [`Outcome::brief_stops_ms`].
    pub brief_stops_ms: Vec<f64>,
    /// As [`Outcome::durable_ms`].
    pub durable_ms: f64,
    /// As [`Outcome::pages_dirty`].
    pub pages_dirty: u64,
    /// As [`Outcome::bytes_changed`].
    pub bytes_changed: u64,
    /// As [`Outcome::bytes_stored_raw`].
    pub bytes_stored_raw: u64,
    /// As [`Outcome::bytes_stored`].
    pub bytes_stored: u64,
}

/// Checkpoints that stored something on a parent, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Deltas {
    /// How many.
    pub count: u64,
    /// Pages that differed from the parent's, in bytes.
    pub bytes_changed: u64,
    /// What was stored, metadata included, before compression, in bytes.
    pub bytes_stored_raw: u64,
    /// What was stored, as the store holds it, in bytes.
    pub bytes_stored: u64,
}

/// What was measured. As JSON it is what `stillpoint bench --json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The helper that was measured, and its VM.
    #[serde(rename = "machine")]
    pub helper: Status,
    /// Checkpoints in the figures.
    pub count: usize,
    /// From the beginning of one checkpoint to that of the next, in milliseconds; more where they
    /// took longer.
    pub interval_ms: u64,
    /// Bare pauses: from `stop` to `cont`, in milliseconds.
    pub bare_pause_ms: Option<Spread>,
    /// Pauses of the checkpoints, in milliseconds.
    pub pause_ms: Option<Spread>,
    /// Ratio of each checkpoint's pause to the bare pause before it.
    pub pause_over_bare: Option<Spread>,
    /// The brief stops of pre-copy passes, all of them, in milliseconds.
    pub brief_stop_ms: Option<Spread>,
    /// From each request until its checkpoint was durable, in milliseconds.
    pub durable_ms: Option<Spread>,
    /// [`Deltas::stored_over_changed`] of `deltas`.
    pub stored_over_changed: Option<f64>,
    /// The same of `deltas_above_4_mib`, in which metadata counts less.
    pub stored_over_changed_above_4_mib: Option<f64>,
    /// All incremental checkpoints.
    pub deltas: Deltas,
    /// Incremental checkpoints with more than 4 MiB of changed pages.
    pub deltas_above_4_mib: Deltas,
    /// How many checkpoints were `full`, `incremental` and `unchanged`.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Median time of each phase, in milliseconds.
    pub phases_median_ms: BTreeMap<String, f64>,
    /// Before the samples, and in no figure: it may be a full one.
    pub first: Outcome,
    /// Each checkpoint in the figures, in the order in which they were taken.
    pub samples: Vec<Sample>,
}

/// Takes `count` checkpoints, one each `interval`, and one before them. `show` is called for each
/// of them, and what it returns shows how far that one is.
///
/// # Errors
/// When a checkpoint fails, or no helper answers.
pub async fn run<S: Fn(&Update)>(
    runtime: &RuntimeDir,
    count: u32,
    interval: Duration,
    show: impl Fn() -> S,
) -> Result<Report, EngineError> {
    // Not counted: it may be a full one, and every counted one is then a delta since about one
    // interval.
    let first = checkpoint(runtime, show())
        .await
        .map_err(|error| error.context("taking the first checkpoint, which is not counted"))?;
    let pairs = measure(runtime, count, interval, &show).await?;
    let status = client::status(runtime).await?;
    Ok(Report::new(status, first, &pairs, interval))
}

async fn measure<S: Fn(&Update)>(
    runtime: &RuntimeDir,
    count: u32,
    interval: Duration,
    show: impl Fn() -> S,
) -> Result<Vec<Pair>, EngineError> {
    let mut pairs = Vec::new();
    let mut due = Instant::now() + interval / 2;
    for number in 1..=count {
        sleep_until(due).await;
        let bare = client::bare_pause(runtime).await;
        let bare =
            bare.map_err(|error| error.context(format!("bare pause {number} of {count}")))?;
        sleep(interval / 2).await;
        let checkpoint = checkpoint(runtime, show())
            .await
            .map_err(|error| error.context(format!("checkpoint {number} of {count}")))?;
        tracing::info!(
            number,
            bare_ms = bare.pause_ms,
            pause_ms = checkpoint.pause_ms,
            changed = checkpoint.bytes_changed,
            "measured"
        );
        pairs.push(Pair { bare_ms: bare.pause_ms, checkpoint });
        // Checkpoints that take longer than the interval follow each other at once.
        due = (due + interval).max(Instant::now());
    }
    Ok(pairs)
}

async fn checkpoint(runtime: &RuntimeDir, show: impl Fn(&Update)) -> Result<Outcome, EngineError> {
    client::decode(client::checkpoint(runtime, Choice::default(), show).await?)
}

impl Deltas {
    fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Self {
        outcomes.fold(Self::default(), |sum, one| Self {
            count: sum.count + 1,
            bytes_changed: sum.bytes_changed + one.bytes_changed,
            bytes_stored_raw: sum.bytes_stored_raw + one.bytes_stored_raw,
            bytes_stored: sum.bytes_stored + one.bytes_stored,
        })
    }

    /// Bytes stored, before compression, for each byte that changed; none if nothing changed.
    pub fn stored_over_changed(&self) -> Option<f64> {
        (self.bytes_changed > 0).then(|| self.bytes_stored_raw as f64 / self.bytes_changed as f64)
    }
}

impl Report {
    fn new(helper: Status, first: Outcome, pairs: &[Pair], interval: Duration) -> Self {
        let outcomes = || pairs.iter().map(|pair| &pair.checkpoint);
        let incremental = || outcomes().filter(|outcome| outcome.kind == Kind::Incremental);
        let deltas = Deltas::of(incremental());
        let large =
            Deltas::of(incremental().filter(|outcome| outcome.bytes_changed > LARGE_DELTA_BYTES));
        Self {
            helper,
            count: pairs.len(),
            interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
            bare_pause_ms: Spread::of(pairs.iter().map(|pair| pair.bare_ms)),
            pause_ms: Spread::of(outcomes().map(|outcome| outcome.pause_ms)),
            pause_over_bare: Spread::of(
                pairs
                    .iter()
                    .filter(|pair| pair.bare_ms > 0.0)
                    .map(|pair| pair.checkpoint.pause_ms / pair.bare_ms),
            ),
            brief_stop_ms: Spread::of(
                outcomes().flat_map(|outcome| outcome.brief_stops_ms.iter().copied()),
            ),
            durable_ms: Spread::of(outcomes().map(|outcome| outcome.durable_ms)),
            stored_over_changed: deltas.stored_over_changed(),
            stored_over_changed_above_4_mib: large.stored_over_changed(),
            deltas,
            deltas_above_4_mib: large,
            kinds: kinds(outcomes()),
            phases_median_ms: phases(outcomes()),
            first,
            samples: pairs.iter().map(sample).collect(),
        }
    }

    /// The last checkpoint that was taken.
    pub fn last(&self) -> CheckpointId {
        self.samples.last().map_or(self.first.id, |sample| sample.id)
    }
}

fn kinds<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> BTreeMap<&'static str, u64> {
    let mut kinds = BTreeMap::new();
    for outcome in outcomes {
        let kind = match outcome.kind {
            Kind::Full => "full",
            Kind::Incremental => "incremental",
            Kind::Unchanged => "unchanged",
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

fn phases<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> BTreeMap<String, f64> {
    let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (phase, time) in outcomes.flat_map(|outcome| &outcome.phases) {
        samples.entry(phase.clone()).or_default().push(*time);
    }
    samples
        .into_iter()
        .filter_map(|(phase, times)| Some((phase, Spread::of(times)?.median)))
        .collect()
}

fn sample(pair: &Pair) -> Sample {
    let outcome = &pair.checkpoint;
    Sample {
        id: outcome.id,
        kind: outcome.kind,
        bare_pause_ms: pair.bare_ms,
        pause_ms: outcome.pause_ms,
        brief_stops_ms: outcome.brief_stops_ms.clone(),
        durable_ms: outcome.durable_ms,
        pages_dirty: outcome.pages_dirty,
        bytes_changed: outcome.bytes_changed,
        bytes_stored_raw: outcome.bytes_stored_raw,
        bytes_stored: outcome.bytes_stored,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::Scene;
    use vm::error::{Class, Phase};

    fn pair(bare_ms: f64, pause_ms: f64, kind: Kind, changed: u64, stored: u64) -> Pair {
        let checkpoint = Outcome {
            kind,
            pause_ms,
            bytes_changed: changed,
            bytes_stored_raw: stored,
            bytes_stored: stored / 2,
            durable_ms: 10.0,
            ..Outcome::default()
        };
        Pair { bare_ms, checkpoint }
    }

    fn report(pairs: &[Pair]) -> Report {
        let status =
            Status { pid: 1, busy: true, vm: None, hydration: None, disks: None, rollback: None };
        Report::new(status, Outcome::default(), pairs, Duration::from_secs(1))
    }

    #[test]
    fn ratios_are_of_pairs_and_of_deltas_only() {
        let mib = 1 << 20;
        let pairs = [
            pair(1.0, 3.0, Kind::Incremental, mib, 2 * mib),
            pair(2.0, 4.0, Kind::Incremental, 9 * mib, 10 * mib),
            pair(4.0, 4.0, Kind::Unchanged, 0, 0),
            pair(1.0, 9.0, Kind::Full, 100 * mib, 900 * mib),
        ];
        let report = report(&pairs);
        // Pairs: 3, 2, 1, 9. The medians of each alone, 4 and 1.5, would give 2.7.
        assert_eq!(report.pause_over_bare.unwrap().median, 2.5);
        assert_eq!(report.stored_over_changed, Some(1.2));
        assert_eq!(report.stored_over_changed_above_4_mib, Some(10.0 / 9.0));
        assert_eq!(
            report.kinds,
            BTreeMap::from([("full", 1), ("incremental", 2), ("unchanged", 1)])
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["pause_over_bare"]["median"], 2.5);
        assert_eq!(json["samples"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn bench_figures_are_of_all_samples_and_of_each_phase() {
        let mut pairs = [
            pair(1.0, 3.0, Kind::Incremental, 1, 1),
            pair(0.0, 5.0, Kind::Incremental, 1, 1),
            pair(2.0, 4.0, Kind::Incremental, 1, 1),
        ];
        for (number, Pair { checkpoint, .. }) in pairs.iter_mut().enumerate() {
            checkpoint.id = CheckpointId(10 + number as u64);
            checkpoint.brief_stops_ms = vec![0.5; number];
            checkpoint.phases.insert("upload".to_owned(), 10.0 * number as f64);
        }
        pairs[1].checkpoint.phases.insert("commit".to_owned(), 7.0);
        let report = report(&pairs);
        assert_eq!(report.last(), CheckpointId(12));
        assert_eq!(report.bare_pause_ms.unwrap().max, 2.0);
        // A pause that was not measured is in no ratio.
        let over_bare = report.pause_over_bare.unwrap();
        assert_eq!((over_bare.min, over_bare.max), (2.0, 3.0));
        assert_eq!(report.brief_stop_ms.unwrap().median, 0.5);
        let phases = [("commit".to_owned(), 7.0), ("upload".to_owned(), 10.0)];
        assert_eq!(report.phases_median_ms, BTreeMap::from(phases));
        assert_eq!(report.samples[1].brief_stops_ms, [0.5]);
    }

    #[test]
    fn bench_without_samples_has_its_first_checkpoint_and_no_figures() {
        let first = Outcome { id: CheckpointId(3), ..Outcome::default() };
        let status =
            Status { pid: 1, busy: true, vm: None, hydration: None, disks: None, rollback: None };
        let report = Report::new(status, first, &[], Duration::from_secs(1));
        assert_eq!((report.last(), report.count), (CheckpointId(3), 0));
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["pause_ms"].is_null() && json["stored_over_changed"].is_null());
    }

    /// Beside a scripted VM: the first checkpoint is in no figure, then pauses and checkpoints take
    /// turns.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn bench_takes_turns() {
        let scene = Scene::new();
        scene.server().await;
        let shown = std::cell::Cell::new(0);
        let show = || {
            shown.set(shown.get() + 1);
            |_: &Update| ()
        };
        let interval = Duration::from_millis(4);
        let report = run(&scene.runtime(), 2, interval, show).await.unwrap();
        assert_eq!((report.first.kind, report.count, shown.get()), (Kind::Full, 2, 3));
        assert_eq!(report.helper.vm.as_ref().unwrap().qemu_pid, scene.body.pid());
        assert!(report.bare_pause_ms.unwrap().min > 0.0);
        let orders = scene.qemu.orders();
        // A bare pause is the only one with nothing in it.
        let bare = orders.windows(2).filter(|pair| *pair == ["stop", "cont"]).count();
        let checkpoints = orders.iter().filter(|order| *order == "xen-save-devices-state").count();
        assert_eq!((bare >= 2, checkpoints), (true, 3), "{orders:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn bench_says_which_measurement_failed_and_of_what_class() {
        let scene = Scene::new();
        scene.server().await;
        let show = || |_: &Update| ();
        scene.qemu.refuse("xen-save-devices-state", "scripted refusal");
        let failed = run(&scene.runtime(), 1, Duration::ZERO, show).await.unwrap_err();
        assert_eq!((failed.class(), failed.phase()), (Class::Failed, Phase::Pause));
        let said = failed.explain();
        assert!(said.starts_with("taking the first checkpoint, which is not counted: "), "{said}");
        assert!(said.contains("scripted refusal"), "{said}");
    }

    #[test]
    fn nothing_changed_gives_no_ratio() {
        let report = report(&[pair(1.0, 3.0, Kind::Unchanged, 0, 0)]);
        assert_eq!(report.stored_over_changed, None);
    }
}
