//! `stillpoint bench`: what checkpoints of a running VM cost, beside the least that a pause of it
//! can cost.
//!
//! Bare pauses (`stop` and `cont`, nothing in between) and checkpoints take turns, half an interval
//! apart, so that each pair sees the same host and guest: the ratio is of pairs, not of two runs.

mod report;
mod statistics;

use crate::cli::BenchArgs;
use crate::commands::prove;
use crate::control::Request;
use crate::helper::client::ask;
use crate::terminal::{out, print_json};
use anyhow::{Context, Result};
use engine::checkpoint::Choice;
use engine::checkpoint::outcome::Outcome;
use report::Report;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use vm::runtime_dir::RuntimeDir;

/// A bare pause and the checkpoint after it.
#[derive(Clone, Debug)]
struct Pair {
    bare_ms: f64,
    checkpoint: Outcome,
}

pub async fn run(args: &BenchArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    // Not counted: it may be a full one, and every counted one is then a delta since about one
    // interval.
    let first =
        checkpoint(&runtime).await.context("taking the first checkpoint, which is not counted")?;
    let interval = Duration::from_millis(args.interval_ms);
    let pairs = measure(&runtime, args.count, interval).await?;
    let status = ask(&runtime, &Request::Status).await?;
    let report = Report::new(&pairs);
    let last = pairs.last().map_or(first.id, |pair| pair.checkpoint.id);
    let proof = prove::prove(&runtime, &args.name, last).await;
    if args.json {
        let mut value = report.json(&status, &first, &pairs, interval);
        value["proof"] = proof.as_ref().ok().cloned().unwrap_or_default();
        print_json(&value)?;
        return proof.map(drop);
    }
    out!("{}", report.text(args.name.as_str(), interval).trim_end());
    out!("{}", report::memory(&status).trim_end());
    let proof = proof?;
    out!("{:24} {}@{last} in {} ms", "proven", args.name, proof["total_ms"]);
    Ok(())
}

async fn measure(runtime: &RuntimeDir, count: u32, interval: Duration) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    let mut due = Instant::now() + interval / 2;
    for number in 1..=count {
        sleep_until(due).await;
        let bare_ms =
            bare_pause(runtime).await.with_context(|| format!("bare pause {number} of {count}"))?;
        sleep(interval / 2).await;
        let checkpoint =
            checkpoint(runtime).await.with_context(|| format!("checkpoint {number} of {count}"))?;
        tracing::info!(
            number,
            bare_ms,
            pause_ms = checkpoint.pause_ms,
            changed = checkpoint.bytes_changed,
            "measured"
        );
        pairs.push(Pair { bare_ms, checkpoint });
        // Checkpoints that take longer than the interval follow each other at once.
        due = (due + interval).max(Instant::now());
    }
    Ok(pairs)
}

async fn checkpoint(runtime: &RuntimeDir) -> Result<Outcome> {
    let result = ask(runtime, &Request::Checkpoint(Choice::default())).await?;
    serde_json::from_value(result).context("the helper's answer is not understood")
}

async fn bare_pause(runtime: &RuntimeDir) -> Result<f64> {
    let result = ask(runtime, &Request::BarePause).await?;
    result["pause_ms"].as_f64().context("the helper's answer names no pause")
}
