//! The figures of a benchmark, for people and as JSON.

use super::Pair;
use super::statistics::Spread;
use engine::checkpoint::outcome::{Kind, Outcome};
use engine::progress::bytes;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// From here on a delta is more than its metadata.
const LARGE_DELTA_BYTES: u64 = 4 << 20;

/// Checkpoints that stored something on a parent, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Deltas {
    count: u64,
    bytes_changed: u64,
    /// Metadata included, before compression.
    bytes_stored_raw: u64,
    /// As the store holds them.
    bytes_stored: u64,
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

    /// How much more than what changed is stored; compression apart.
    fn stored_over_changed(&self) -> Option<f64> {
        (self.bytes_changed > 0).then(|| self.bytes_stored_raw as f64 / self.bytes_changed as f64)
    }
}

pub struct Report {
    bare: Option<Spread>,
    pause: Option<Spread>,
    /// The brief stops of pre-copy passes, all of them.
    passes: Option<Spread>,
    durable: Option<Spread>,
    ratio: Option<Spread>,
    deltas: Deltas,
    large: Deltas,
    kinds: BTreeMap<&'static str, u64>,
    phases: BTreeMap<String, f64>,
}

impl Report {
    pub fn new(pairs: &[Pair]) -> Self {
        let outcomes = || pairs.iter().map(|pair| &pair.checkpoint);
        let deltas = || outcomes().filter(|outcome| outcome.kind == Kind::Incremental);
        Self {
            bare: Spread::of(pairs.iter().map(|pair| pair.bare_ms)),
            pause: Spread::of(outcomes().map(|outcome| outcome.pause_ms)),
            passes: Spread::of(
                outcomes().flat_map(|outcome| outcome.brief_stops_ms.iter().copied()),
            ),
            durable: Spread::of(outcomes().map(|outcome| outcome.durable_ms)),
            ratio: Spread::of(
                pairs
                    .iter()
                    .filter(|pair| pair.bare_ms > 0.0)
                    .map(|pair| pair.checkpoint.pause_ms / pair.bare_ms),
            ),
            deltas: Deltas::of(deltas()),
            large: Deltas::of(deltas().filter(|outcome| outcome.bytes_changed > LARGE_DELTA_BYTES)),
            kinds: kinds(outcomes()),
            phases: phases(outcomes()),
        }
    }

    pub fn json(
        &self,
        status: &Value,
        first: &Outcome,
        pairs: &[Pair],
        interval: Duration,
    ) -> Value {
        json!({
            "machine": status,
            "count": pairs.len(),
            "interval_ms": interval.as_millis() as u64,
            "bare_pause_ms": self.bare,
            "pause_ms": self.pause,
            "pause_over_bare": self.ratio,
            "brief_stop_ms": self.passes,
            "durable_ms": self.durable,
            "stored_over_changed": self.deltas.stored_over_changed(),
            "stored_over_changed_above_4_mib": self.large.stored_over_changed(),
            "deltas": self.deltas,
            "deltas_above_4_mib": self.large,
            "kinds": self.kinds,
            "phases_median_ms": self.phases,
            "first": first,
            "samples": pairs.iter().map(sample).collect::<Vec<_>>(),
        })
    }

    pub fn text(&self, name: &str, interval: Duration) -> String {
        let count: u64 = self.kinds.values().sum();
        let kinds: Vec<String> =
            self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let mut text = format!(
            "{name}: {count} checkpoints ({}), one every {} ms\n",
            kinds.join(", "),
            interval.as_millis()
        );
        text += &format!("{:24} {:>9} {:>9} {:>9} {:>9}\n", "", "min", "median", "p90", "max");
        text += &line("bare stop and cont, ms", self.bare);
        text += &line("checkpoint pause, ms", self.pause);
        text += &line("pause over bare, pairs", self.ratio);
        text += &line("pauses of passes, ms", self.passes);
        text += &line("durable after, ms", self.durable);
        text += &stored("stored over changed", &self.deltas);
        text + &stored("  of deltas above 4 MiB", &self.large)
    }
}

/// What the helper has held at most, beside what it may.
pub fn memory(status: &Value) -> String {
    let held = |key: &str| status[key].as_u64().map_or_else(|| "unknown".to_owned(), bytes);
    format!(
        "{:24} {:>9} of at most {}\n",
        "helper's memory",
        held("peak_memory_bytes"),
        held("memory_limit_bytes")
    )
}

fn line(what: &str, spread: Option<Spread>) -> String {
    match spread {
        Some(Spread { min, median, p90, max }) => {
            format!("{what:24} {min:>9.2} {median:>9.2} {p90:>9.2} {max:>9.2}\n")
        }
        None => format!("{what:24} {:>9} {:>9} {:>9} {:>9}\n", "-", "-", "-", "-"),
    }
}

fn stored(what: &str, deltas: &Deltas) -> String {
    let ratio =
        deltas.stored_over_changed().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.4}"));
    let (changed, raw, packed) =
        (bytes(deltas.bytes_changed), bytes(deltas.bytes_stored_raw), bytes(deltas.bytes_stored));
    format!(
        "{what:24} {ratio:>9}   {} deltas: {changed} changed, {raw} to store, {packed} compressed\n",
        deltas.count
    )
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

fn sample(pair: &Pair) -> Value {
    let outcome = &pair.checkpoint;
    json!({
        "id": outcome.id,
        "kind": outcome.kind,
        "bare_pause_ms": pair.bare_ms,
        "pause_ms": outcome.pause_ms,
        "brief_stops_ms": outcome.brief_stops_ms,
        "durable_ms": outcome.durable_ms,
        "pages_dirty": outcome.pages_dirty,
        "bytes_changed": outcome.bytes_changed,
        "bytes_stored_raw": outcome.bytes_stored_raw,
        "bytes_stored": outcome.bytes_stored,
    })
}

#[cfg(test)]
mod test {
    use super::*;

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

    #[test]
    fn ratios_are_of_pairs_and_of_deltas_only() {
        let mib = 1 << 20;
        let pairs = [
            pair(1.0, 3.0, Kind::Incremental, mib, 2 * mib),
            pair(2.0, 4.0, Kind::Incremental, 9 * mib, 10 * mib),
            pair(4.0, 4.0, Kind::Unchanged, 0, 0),
            pair(1.0, 9.0, Kind::Full, 100 * mib, 900 * mib),
        ];
        let report = Report::new(&pairs);
        // Pairs: 3, 2, 1, 9. The medians of each alone, 4 and 1.5, would give 2.7.
        assert_eq!(report.ratio.unwrap().median, 2.5);
        assert_eq!(report.deltas.stored_over_changed(), Some(1.2));
        assert_eq!(report.large.stored_over_changed(), Some(10.0 / 9.0));
        assert_eq!(
            report.kinds,
            BTreeMap::from([("full", 1), ("incremental", 2), ("unchanged", 1)])
        );
        let json = report.json(&Value::Null, &Outcome::default(), &pairs, Duration::from_secs(1));
        assert_eq!(json["pause_over_bare"]["median"], 2.5);
        assert_eq!(json["samples"].as_array().unwrap().len(), 4);
        assert!(report.text("m", Duration::from_secs(1)).contains("1.2000   2 deltas"));
    }

    #[test]
    fn nothing_changed_gives_no_ratio() {
        let report = Report::new(&[pair(1.0, 3.0, Kind::Unchanged, 0, 0)]);
        assert_eq!(report.deltas.stored_over_changed(), None);
        assert!(
            report.text("m", Duration::from_secs(1)).contains("stored over changed              -")
        );
    }
}
