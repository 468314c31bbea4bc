//! Ends an adoption that failed, or whose helper was killed: exactly one of the two QEMUs
//! continues.

use super::destination;
use super::finish::finish;
use super::record::{Process, Record, Side, Stage};
use super::steps::stream_socket;
use anyhow::{Context, Error, Result};
use qmp_bridge::Qmp;
use qmp_bridge::migration::{self, MigrationError};
use qmp_bridge::paused::run_state;
use serde_json::Value;
use std::time::Duration;
use vm::error::{EngineError, InPhase, Phase, explain, refused};
use vm::runtime_dir::RuntimeDir;

/// A running QEMU sends its greeting at once, one that loads a state when it has finished.
const ANSWER: Duration = Duration::from_secs(30);

/// Completes or undoes an adoption that an earlier helper of this runtime directory began; does
/// nothing where there is none. To be called by every helper before it attaches to its VM.
///
/// # Errors
/// When the record of the adoption cannot be read, or one of the two QEMUs does not do what it is
/// asked. The record stays, so the next helper tries again.
pub async fn recover(runtime: &RuntimeDir) -> Result<(), EngineError> {
    complete_or_undo(runtime).await.in_phase(Phase::Recover)
}

async fn complete_or_undo(runtime: &RuntimeDir) -> Result<()> {
    let Some(record) = Record::read(runtime)? else { return Ok(()) };
    let destination = record
        .destination
        .filter(|process| process.lives())
        .or_else(|| destination::find(&record.file));
    tracing::warn!(stage = ?record.stage(), ?destination, "an adoption was interrupted");
    match (record.stage().vm(), destination) {
        (Side::Destination, Some(destination)) => complete(record, destination, runtime).await,
        (_, destination) => {
            let source =
                if record.source.lives() { Some(connect_source(&record).await?) } else { None };
            undo(&record, destination, runtime, source.as_ref()).await
        }
    }
}

async fn connect_source(record: &Record) -> Result<Qmp> {
    Qmp::connect(&record.monitor, ANSWER).await.context("connecting to the monitor of the old QEMU")
}

/// The new QEMU is the VM, and it is alive.
async fn complete(mut record: Record, process: Process, runtime: &RuntimeDir) -> Result<()> {
    let source = if record.source.lives() { connect_source(&record).await.ok() } else { None };
    let destination = destination::connect(process, runtime).await?;
    if record.stage() != Stage::Running {
        if let Err(error) = resume(&mut record, runtime, &destination).await {
            return Err(roll_back(&record, runtime, source.as_ref(), error).await);
        }
        record.advance(Stage::Running, runtime)?;
    }
    for note in finish(&record, runtime, source.as_ref(), &destination).await? {
        tracing::warn!(note, "adopted");
    }
    tracing::info!(pid = process.pid, "the adoption is finished");
    Ok(())
}

async fn resume(record: &mut Record, runtime: &RuntimeDir, destination: &Qmp) -> Result<()> {
    if record.stage() == Stage::Decided {
        record.advance(Stage::Resuming, runtime)?;
    }
    if run_state(destination).await? != "running" {
        destination.execute_json("cont", Value::Null).await.context("letting the new QEMU run")?;
    }
    Ok(())
}

/// The adoption failed with `error`: lets the old QEMU continue. The returned error says whether
/// that succeeded.
pub(super) async fn roll_back(
    record: &Record,
    runtime: &RuntimeDir,
    source: Option<&Qmp>,
    error: Error,
) -> Error {
    let error = destination::explain(runtime, error);
    let destination = record.destination.or_else(|| destination::find(&record.file));
    match undo(record, destination, runtime, source).await {
        Ok(()) => {
            error.context(format!("{} was not adopted and continues as it was", record.file.name))
        }
        Err(worse) => worse.context(explain(&error)),
    }
}

/// Ends the new QEMU, then lets the old one continue, as it was.
async fn undo(
    record: &Record,
    destination: Option<Process>,
    runtime: &RuntimeDir,
    source: Option<&Qmp>,
) -> Result<()> {
    if let Some(destination) = destination {
        destination::end(destination).await.context("ending the new QEMU")?;
    }
    for socket in &record.later.sockets {
        // It may not have come so far as to make them.
        let _ = std::fs::remove_file(&socket.waits);
    }
    [runtime.qmp(), runtime.plugin(), stream_socket(runtime)]
        .iter()
        .for_each(|socket| drop(std::fs::remove_file(socket)));
    let gone = || died(record);
    let (Some(source), true) = (source, record.source.lives()) else {
        Record::remove(runtime)?;
        return Err(gone());
    };
    if !record.can_be_undone() {
        // Its guest is older than its disks now.
        destination::end(record.source).await.context("ending the old QEMU")?;
        Record::remove(runtime)?;
        return Err(gone());
    }
    match migration::resume_source(source, Some(&record.found)).await {
        Ok(()) => Record::remove(runtime),
        Err(MigrationError::SourceEnded) => {
            Record::remove(runtime)?;
            Err(gone())
        }
        Err(error) => Err(Error::from(error)
            .context("letting the old QEMU continue; 'stillpoint attach' tries again")),
    }
}

fn died(record: &Record) -> Error {
    let name = &record.file.name;
    refused(format!(
        "{name} died while it was adopted; 'stillpoint restore {name} --store {}' restores its last checkpoint",
        record.file.store
    ))
}
