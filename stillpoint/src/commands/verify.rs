//! `stillpoint verify`: reads back what is stored, or (`--restore`) proves that it restores.

use crate::cli::VerifyArgs;
use crate::terminal::{Terminal, out, print_json};
use anyhow::{Context, Result};
use engine::progress::bytes;
use engine::proof;
use engine::verify::{self, Report};
use std::sync::Arc;
use vm::error::damaged;

pub(crate) async fn read_back(args: &VerifyArgs) -> Result<()> {
    let report = verify::run(&args.store.store, &args.checkpoint, &Terminal).await?;
    if args.json {
        let mut value = serde_json::to_value(&report).context("encoding the result")?;
        value["ok"] = report.problems.is_empty().into();
        print_json(&value)?;
    } else {
        let Report { checkpoints, packs, frames, pages, layers, .. } = report;
        out!(
            "read back {checkpoints} checkpoints, {packs} packs, {frames} frames, {pages} pages, {layers} layers"
        );
        report.problems.iter().for_each(|problem| out!("  damaged: {problem}"));
    }
    match report.problems.len() {
        0 => Ok(()),
        count => Err(damaged(format!(
            "{count} of the parts of {} cannot be restored",
            args.checkpoint.vm
        ))),
    }
}

/// In the process inside the sandbox's process namespace.
pub(crate) async fn prove(args: VerifyArgs) -> Result<()> {
    let json = args.json;
    let request = proof::Request {
        checkpoint: args.checkpoint,
        store: args.store.store,
        qemu: args.qemu,
        run: args.run,
        map: args.map,
        allow: args.allow,
        progress: Arc::new(Terminal),
    };
    print(json, &proof::run(&request).await?)
}

fn print(json: bool, report: &proof::Report) -> Result<()> {
    if json {
        print_json(&report.json())?;
    } else {
        report.differences.iter().for_each(|difference| out!("  differs: {difference}"));
        report
            .ran
            .iter()
            .flat_map(|ran| &ran.trouble)
            .for_each(|trouble| out!("  after its start: {trouble}"));
        report.excused.iter().for_each(|(section, why)| out!("  may differ: {section}: {why}"));
    }
    let name = format!("{}@{}", report.vm, report.id);
    if report.is_proven() {
        if !json {
            out!(
                "{name} is proven: restored with QEMU {}, {} of memory and {} of disks compared, {} device sections, {:.1} s",
                report.qemu_version,
                bytes(report.memory_bytes),
                bytes(report.disk_bytes),
                report.sections,
                report.total.as_secs_f64()
            );
        }
        return Ok(());
    }
    let troubles = report.ran.iter().flat_map(|ran| &ran.trouble).cloned();
    let all: Vec<String> =
        report.differences.iter().map(ToString::to_string).chain(troubles).collect();
    let more = if all.len() > 1 { format!(" (and {} more)", all.len() - 1) } else { String::new() };
    Err(damaged(format!(
        "{name} does not restore as it was: {}{more}",
        all.first().cloned().unwrap_or_default()
    )))
}
