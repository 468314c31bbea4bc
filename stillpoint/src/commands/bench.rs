//! `stillpoint bench`: measures, and prints the figures for people or as JSON.

use super::prove::prove;
use crate::cli::BenchArgs;
use crate::terminal::{out, print_json, show_updates};
use anyhow::{Context, Result};
use engine::progress::bytes;
use helper::bench::{self, Deltas, Report};
use helper::control::Status;
use helper::statistics::Spread;
use std::time::Duration;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: &BenchArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let interval = Duration::from_millis(args.interval_ms);
    let report = bench::run(&runtime, args.count, interval, show_updates).await?;
    let last = report.last();
    let proof = prove(&runtime, &args.name, last).await;
    if args.json {
        let mut value = serde_json::to_value(&report).context("encoding the result")?;
        value["proof"] = proof.as_ref().ok().cloned().unwrap_or_default();
        print_json(&value)?;
        return proof.map(drop);
    }
    out!("{}", text(&report, args.name.as_str()).trim_end());
    out!("{}", memory(&report.helper).trim_end());
    let proof = proof?;
    out!("{:24} {}@{last} in {} ms", "proven", args.name, proof["total_ms"]);
    Ok(())
}

fn text(report: &Report, name: &str) -> String {
    let kinds: Vec<String> =
        report.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let mut text = format!(
        "{name}: {} checkpoints ({}), one every {} ms\n",
        report.count,
        kinds.join(", "),
        report.interval_ms
    );
    text += &format!("{:24} {:>9} {:>9} {:>9} {:>9}\n", "", "min", "median", "p90", "max");
    text += &line("bare stop and cont, ms", report.bare_pause_ms);
    text += &line("checkpoint pause, ms", report.pause_ms);
    text += &line("pause over bare, pairs", report.pause_over_bare);
    text += &line("pauses of passes, ms", report.brief_stop_ms);
    text += &line("durable after, ms", report.durable_ms);
    text += &stored("stored over changed", &report.deltas);
    text + &stored("  of deltas above 4 MiB", &report.deltas_above_4_mib)
}

/// What the helper has held at most, beside what it may.
fn memory(helper: &Status) -> String {
    let held = |bytes_held: Option<u64>| bytes_held.map_or_else(|| "unknown".to_owned(), bytes);
    format!(
        "{:24} {:>9} of at most {}\n",
        "helper's memory",
        held(helper.vm.as_ref().and_then(|vm| vm.peak_memory_bytes)),
        held(helper.vm.as_ref().map(|vm| vm.memory_limit_bytes))
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ratio_of_deltas_has_its_line() {
        let deltas = Deltas { count: 2, bytes_changed: 10, bytes_stored_raw: 12, bytes_stored: 6 };
        assert!(stored("stored over changed", &deltas).contains("1.2000   2 deltas"));
        assert!(
            stored("stored over changed", &Deltas::default())
                .contains("stored over changed              -")
        );
    }
}
