//! `stillpoint status`: what the helper of a running VM says of it.

use crate::cli::StatusArgs;
use crate::terminal::{out, print_json};
use anyhow::{Context, Result};
use engine::progress::bytes;
use engine::restore::hydration::HydrationStatus;
use helper::client;
use helper::control::Status;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: StatusArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let status = client::status(&runtime).await?;
    if args.json {
        return print_json(&serde_json::to_value(&status).context("encoding the status")?);
    }
    let Status { pid, vm, hydration, .. } = status;
    match vm {
        Some(vm) => out!(
            "{}: QEMU {} ({}), pid {}, helper {pid}, store {}",
            vm.name,
            vm.qemu_version,
            vm.accelerator,
            vm.qemu_pid,
            vm.store
        ),
        None => out!("{}: helper {pid} is taking a checkpoint or adopting the VM", args.name),
    }
    match hydration {
        Some(hydration) => show(&hydration),
        None => out!("  memory: all here"),
    }
    Ok(())
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
    if let Some(away) = &hydration.store_away {
        out!("  store away since {}: {}", away.since, away.message);
    }
    if let Some(damaged) = &hydration.damaged {
        out!("  DAMAGED since {}: {}", damaged.since, damaged.message);
    }
}
