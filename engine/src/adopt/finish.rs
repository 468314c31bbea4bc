//! After the decision: the new QEMU is the VM, and the old one is ended. Every step can be
//! repeated.

use super::destination;
use super::line::Later;
use super::record::{Process, Record};
use crate::kill_point;
use anyhow::{Context, Result};
use qmp_bridge::Qmp;
use qmp_bridge::poll::poll_until;
use serde_json::Value;
use std::future::ready;
use std::time::Duration;
use vm::runtime_dir::RuntimeDir;

/// Time for the old QEMU to end in order; it has no guest any more.
const QUIT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// `source`: the old QEMU's monitor, if it still answers. Returns notes on what could not be moved.
pub(super) async fn finish(
    record: &Record,
    runtime: &RuntimeDir,
    source: Option<&Qmp>,
    destination: &Qmp,
) -> Result<Vec<String>> {
    qmp_bridge::vm::announce(destination).await;
    // The kernel's marks are those of another process from now on.
    runtime.forget_exact_marks()?;
    runtime.save_vm(&record.file)?;
    end_source(record.source, source).await?;
    // The owner's settings for migrations replace those of this one.
    if let Err(error) = record.found.give_to(destination).await {
        tracing::warn!(%error, "the new QEMU's migration settings are not those of the old one");
    }
    let notes = take_over(&record.later, destination).await;
    kill_point::point("adopt.done");
    Record::remove(runtime)?;
    Ok(notes)
}

async fn end_source(process: Process, monitor: Option<&Qmp>) -> Result<()> {
    if let Some(monitor) = monitor
        && let Err(error) = monitor.execute_json("quit", Value::Null).await
    {
        tracing::debug!(%error, "quit");
    }
    if monitor.is_some() {
        poll_until(QUIT, POLL_INTERVAL, || ready((!process.lives()).then_some(()))).await;
    }
    // Stopped, and without its disks: nothing of it is needed.
    destination::end(process).await.context("ending the old QEMU")
}

/// Renames sockets and forwards ports, which the old QEMU has released.
async fn take_over(later: &Later, destination: &Qmp) -> Vec<String> {
    let mut notes = Vec::new();
    for socket in later.sockets.iter().filter(|socket| socket.waits.exists()) {
        if let Err(error) = std::fs::rename(&socket.waits, &socket.path) {
            notes.push(format!(
                "{} is still called {}: {error}",
                socket.path.display(),
                socket.waits.display()
            ));
        }
    }
    for forward in &later.forwards {
        let said =
            destination.hmp(&format!("hostfwd_add {} {}", forward.netdev, forward.rule)).await;
        let why = match said {
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => text.trim().to_owned(),
            Err(error) => error.to_string(),
        };
        notes.push(format!(
            "port forwarding {} of {} was not set up again: {why}",
            forward.rule, forward.netdev
        ));
    }
    notes
}
