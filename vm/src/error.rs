//! How a command ends: the message (printed once, each fact once) and the exit code.

use checkpoint_store::StoreError;
use dirty_tracker::TrackerError;
use qmp_bridge::PauseError;
use qmp_bridge::QmpError;
use qmp_bridge::capture::CaptureError;
use qmp_bridge::disks::DiskError;
use qmp_bridge::handover::HandoverError;
use qmp_bridge::machine::MachineError;
use qmp_bridge::migration::MigrationError;
use qmp_bridge::ramblock::RamBlockError;
use qmp_bridge::run_state::RunStateError;
use qmp_bridge::stream_reader::StreamReadError;
use std::process::ExitCode;

/// See `stillpoint --help`.
pub const FAILED: u8 = 1;
pub const REFUSED: u8 = 3;
pub const STORE: u8 = 4;
pub const DAMAGED: u8 = 5;

/// An error whose exit code is known where it is made.
#[derive(Debug)]
pub struct Coded {
    code: u8,
    message: String,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Coded {}

pub fn coded(code: u8, message: impl Into<String>) -> anyhow::Error {
    Coded { code, message: message.into() }.into()
}

pub fn refused(message: impl Into<String>) -> anyhow::Error {
    coded(REFUSED, message)
}

pub fn damaged(message: impl Into<String>) -> anyhow::Error {
    coded(DAMAGED, message)
}

pub fn code_of(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of_cause).unwrap_or(FAILED)
}

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(coded) = cause.downcast_ref::<Coded>() {
        return Some(coded.code);
    }
    if let Some(store) = cause.downcast_ref::<StoreError>() {
        return Some(store_code(store));
    }
    let damaged = cause.is::<checkpoint_format::PackError>() || cause.is::<checkpoint_format::ManifestError>();
    if damaged || cause.is::<checkpoint_format::LayerError>() {
        return Some(DAMAGED);
    }
    is_refusal(cause).then_some(REFUSED)
}

/// The VM, its QEMU or this host is not in a state in which it can be done: nothing has failed, and the message says what to change.
fn is_refusal(cause: &(dyn std::error::Error + 'static)) -> bool {
    let disk = |error: &DiskError| error.is_refusal() || matches!(error, DiskError::Inconsistent { .. });
    let capture = CaptureError::is_refusal;
    let migration = |error: &MigrationError| {
        matches!(error, MigrationError::Busy { .. } | MigrationError::Unsupported { .. } | MigrationError::Pause(PauseError::NoGuest(_)))
    };
    let handover = |error: &HandoverError| matches!(error, HandoverError::Busy { .. } | HandoverError::Missing { .. });
    let stream = |error: &StreamReadError| matches!(error, StreamReadError::Unsupported { .. } | StreamReadError::NoDescription { .. });
    let qmp = |error: &QmpError| matches!(error, QmpError::NoGreeting { .. } | QmpError::NotQmp { .. });
    let machine = |error: &MachineError| matches!(error, MachineError::UnknownType { .. } | MachineError::NoDefault);
    is(cause, disk)
        || is(cause, capture)
        || is(cause, migration)
        || is(cause, handover)
        || is(cause, stream)
        || is(cause, qmp)
        || is(cause, machine)
        || is(cause, cannot_track)
        || is(cause, |error: &RunStateError| matches!(error, RunStateError::NoGuest(_)))
        || is(cause, |error: &PauseError| matches!(error, PauseError::NoGuest(_)))
        || is(cause, |error: &RamBlockError| matches!(error, RamBlockError::Empty))
}

fn cannot_track(error: &TrackerError) -> bool {
    matches!(
        error,
        TrackerError::NotThePlugin { .. } | TrackerError::Version { .. } | TrackerError::MissingHandle { .. } | TrackerError::Region { .. }
    )
}

fn is<E: std::error::Error + 'static>(cause: &(dyn std::error::Error + 'static), which: impl FnOnce(&E) -> bool) -> bool {
    cause.downcast_ref::<E>().is_some_and(which)
}

fn store_code(error: &StoreError) -> u8 {
    match error {
        StoreError::Fenced { .. } | StoreError::WriterHeld { .. } | StoreError::ErasureCoded { .. } => REFUSED,
        StoreError::Corrupt { .. } | StoreError::PastEnd { .. } => DAMAGED,
        _ => STORE,
    }
}

pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(code_of(error))
}

/// The chain on one line, without a cause that its context already quotes.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::Context;
    use qmp_bridge::ServerError;

    #[test]
    fn a_code_is_found_below_its_context() {
        let error = Err::<(), _>(refused("it runs elsewhere")).context("restoring m").unwrap_err();
        assert_eq!(code_of(&error), REFUSED);
        assert_eq!(explain(&error), "restoring m: it runs elsewhere");
        assert_eq!(code_of(&anyhow::anyhow!("x")), FAILED);
        let busy = anyhow::Error::from(MigrationError::Busy { status: "active".to_owned() });
        assert_eq!(code_of(&busy.context("preparing")), REFUSED);
    }

    /// What the documented tables call refused is exit code 3, wherever it is found out.
    #[test]
    fn exit_code_of_each_refusal_is_3() {
        let text = || "x".to_owned();
        let refused_by_qemu = || QmpError::NotQmp { path: "x".into(), why: text() };
        let errors: Vec<anyhow::Error> = vec![
            RamBlockError::Empty.into(),
            DiskError::Unsupported { device: text(), why: text() }.into(),
            DiskError::Inconsistent { device: text(), why: text() }.into(),
            CaptureError::Server(ServerError::InUse { exports: vec![text()] }).into(),
            MigrationError::Busy { status: text() }.into(),
            HandoverError::Missing { version: text(), name: "x" }.into(),
            HandoverError::Busy { status: text() }.into(),
            QmpError::NoGreeting { path: "x".into(), after: std::time::Duration::ZERO }.into(),
            refused_by_qemu().into(),
            MachineError::NoDefault.into(),
            TrackerError::Region { region: text(), reason: text() }.into(),
            TrackerError::Version { path: "x".into(), plugin: 1, ours: 2 }.into(),
        ];
        for error in errors {
            let shown = format!("{error:?}");
            assert_eq!(code_of(&error.context("preparing")), REFUSED, "{shown}");
        }
        let failed = CaptureError::Broken { node: text(), why: text() };
        assert_eq!(code_of(&failed.into()), FAILED);
    }
}
