//! `stillpoint status`: what the helper of a running VM says of it.

use crate::cli::StatusArgs;
use crate::terminal::{out, print_json};
use anyhow::{Context, Result};
use engine::progress::bytes;
use engine::restore::hydration::{HydrationStatus, Trouble};
use engine::restore::lazy_disks::{DiskStatus, DisksStatus};
use helper::client;
use helper::control::Status;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: StatusArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let status = client::status(&runtime).await?;
    if args.json {
        return print_json(&serde_json::to_value(&status).context("encoding the status")?);
    }
    let Status { pid, vm, hydration, disks, rollback, .. } = status;
    match vm {
        Some(vm) => out!(
            "{}: QEMU {} ({}), pid {}, helper {pid}, store {}",
            vm.name,
            vm.qemu_version,
            vm.accelerator,
            vm.qemu_pid,
            vm.store
        ),
        None => out!(
            "{}: helper {pid} is taking a checkpoint, adopting the VM or setting it back",
            args.name
        ),
    }
    match hydration {
        Some(hydration) => show(&hydration),
        None => out!("  memory: all here"),
    }
    if let Some(disks) = disks {
        show_disks(&disks);
    }
    if let Some(rollback) = rollback {
        out!(
            "  NOT COMPLETE: a rollback to {}@{} that began at {}; the guest stays stopped \
             until it is repeated",
            args.name,
            rollback.to,
            rollback.since
        );
    }
    Ok(())
}

fn show_disks(status: &DisksStatus) {
    for DiskStatus { disk, done_bytes, total_bytes } in &status.disks {
        out!(
            "  disk {disk}: {} of {} ({} %) have arrived from {}",
            bytes(*done_bytes),
            bytes(*total_bytes),
            (done_bytes * 100).checked_div(*total_bytes).unwrap_or(100),
            status.store
        );
    }
    show_troubles(status.store_away.as_ref(), status.damaged.as_ref());
}

fn show_troubles(away: Option<&Trouble>, damaged: Option<&Trouble>) {
    if let Some(Trouble { since, message }) = away {
        out!("  store away since {since}: {message}");
    }
    if let Some(Trouble { since, message }) = damaged {
        out!("  DAMAGED since {since}: {message}");
    }
}

fn show(hydration: &HydrationStatus) {
    let (done, total) = (hydration.done_bytes, hydration.total_bytes);
    out!(
        "  memory: {} of {} ({} %) have arrived from {}@{} in {}; the VM has waited for {} pages",
        bytes(done),
        bytes(total),
        (done * 100).checked_div(total).unwrap_or(100),
        hydration.vm,
        hydration.checkpoint,
        hydration.store,
        hydration.faults
    );
    show_troubles(hydration.store_away.as_ref(), hydration.damaged.as_ref());
    if let Some(stopped) = &hydration.stopped {
        out!("  STOPPED since {} until 'cont': {}", stopped.since, stopped.message);
    }
}
