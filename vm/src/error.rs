//! What kind of failure an error is, and its message with each fact once.

use checkpoint_store::StoreError;
use dirty_tracker::TrackerError;
use qemu_cmdline::arguments::ArgumentError;
use qemu_cmdline::size::SizeError;
use qmp_bridge::PauseError;
use qmp_bridge::QmpError;
use qmp_bridge::capture::CaptureError;
use qmp_bridge::disks::DiskError;
use qmp_bridge::local_migration::LocalMigrationError;
use qmp_bridge::migration::MigrationError;
use qmp_bridge::ramblock::RamBlockError;
use qmp_bridge::run_state::RunStateError;
use qmp_bridge::stream_reader::StreamReadError;
use qmp_bridge::vm::MachineTypeError;

/// What kind of failure an error is; the exit code of a command derives from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Anything else.
    Failed,
    /// What the user wrote cannot be meant, whatever the VM, host and store are.
    Usage,
    /// The VM, its QEMU, this host or the store is not in a state in which it may be done; the
    /// message says what to change.
    Refused,
    /// Store I/O failed.
    Store,
    /// The store holds damaged content.
    Damaged,
}

/// An error whose class is known where it is made.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub class: Class,
    pub message: String,
}

pub fn classed(class: Class, message: impl Into<String>) -> anyhow::Error {
    EngineError { class, message: message.into() }.into()
}

pub fn usage(message: impl Into<String>) -> anyhow::Error {
    classed(Class::Usage, message)
}

pub fn refused(message: impl Into<String>) -> anyhow::Error {
    classed(Class::Refused, message)
}

pub fn damaged(message: impl Into<String>) -> anyhow::Error {
    classed(Class::Damaged, message)
}

/// That of the outermost cause which has one.
pub fn class_of(error: &anyhow::Error) -> Class {
    error.chain().find_map(class_of_cause).unwrap_or(Class::Failed)
}

/// None for an error that says nothing of its class.
pub fn class_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Class> {
    if let Some(error) = cause.downcast_ref::<EngineError>() {
        return Some(error.class);
    }
    if let Some(store) = cause.downcast_ref::<StoreError>() {
        return Some(class_of_store(store));
    }
    if cause.is::<ArgumentError>() || cause.is::<SizeError>() {
        return Some(Class::Usage);
    }
    let damaged = cause.is::<checkpoint_format::PackError>()
        || cause.is::<checkpoint_format::ManifestError>();
    if damaged || cause.is::<checkpoint_format::LayerError>() {
        return Some(Class::Damaged);
    }
    is_refusal(cause).then_some(Class::Refused)
}

/// The VM, its QEMU or this host is not in a state in which it can be done: nothing has failed, and
/// the message says what to change.
fn is_refusal(cause: &(dyn std::error::Error + 'static)) -> bool {
    let disk =
        |error: &DiskError| error.is_refusal() || matches!(error, DiskError::Inconsistent { .. });
    let capture = CaptureError::is_refusal;
    let migration = |error: &MigrationError| {
        matches!(
            error,
            MigrationError::Busy { .. }
                | MigrationError::Unsupported { .. }
                | MigrationError::Pause(PauseError::NoGuest(_))
        )
    };
    let local_migration = |error: &LocalMigrationError| {
        matches!(error, LocalMigrationError::Busy { .. } | LocalMigrationError::Missing { .. })
    };
    let stream = |error: &StreamReadError| {
        matches!(error, StreamReadError::Unsupported { .. } | StreamReadError::NoDescription { .. })
    };
    let qmp =
        |error: &QmpError| matches!(error, QmpError::NoGreeting { .. } | QmpError::NotQmp { .. });
    let vm = |error: &MachineTypeError| {
        matches!(error, MachineTypeError::UnknownType { .. } | MachineTypeError::NoDefault)
    };
    is(cause, disk)
        || is(cause, capture)
        || is(cause, migration)
        || is(cause, local_migration)
        || is(cause, stream)
        || is(cause, qmp)
        || is(cause, vm)
        || is(cause, cannot_track)
        || is(cause, |error: &RunStateError| matches!(error, RunStateError::NoGuest(_)))
        || is(cause, |error: &PauseError| matches!(error, PauseError::NoGuest(_)))
        || is(cause, |error: &RamBlockError| matches!(error, RamBlockError::Empty))
}

fn cannot_track(error: &TrackerError) -> bool {
    matches!(
        error,
        TrackerError::NotThePlugin { .. }
            | TrackerError::Version { .. }
            | TrackerError::MissingHandle { .. }
            | TrackerError::TrackedBlock { .. }
    )
}

fn is<E: std::error::Error + 'static>(
    cause: &(dyn std::error::Error + 'static),
    which: impl FnOnce(&E) -> bool,
) -> bool {
    cause.downcast_ref::<E>().is_some_and(which)
}

fn class_of_store(error: &StoreError) -> Class {
    match error {
        StoreError::Fenced { .. }
        | StoreError::WriterHeld { .. }
        | StoreError::ErasureCoded { .. } => Class::Refused,
        StoreError::InvalidUrl { .. } => Class::Usage,
        StoreError::Corrupt { .. } | StoreError::PastEnd { .. } => Class::Damaged,
        _ => Class::Store,
    }
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
    fn class_is_found_below_its_context() {
        let error = Err::<(), _>(refused("it runs elsewhere")).context("restoring m").unwrap_err();
        assert_eq!(class_of(&error), Class::Refused);
        assert_eq!(explain(&error), "restoring m: it runs elsewhere");
        assert_eq!(class_of(&anyhow::anyhow!("x")), Class::Failed);
        let busy = anyhow::Error::from(MigrationError::Busy { status: "active".to_owned() });
        assert_eq!(class_of(&busy.context("preparing")), Class::Refused);
    }

    /// What the documented tables call refused is a refusal, wherever it is found out.
    #[test]
    fn class_of_each_refusal_is_refused() {
        let text = || "x".to_owned();
        let refused_by_qemu = || QmpError::NotQmp { path: "x".into(), why: text() };
        let errors: Vec<anyhow::Error> = vec![
            RamBlockError::Empty.into(),
            DiskError::Unsupported { device: text(), why: text() }.into(),
            DiskError::Inconsistent { device: text(), why: text() }.into(),
            CaptureError::Server(ServerError::InUse { exports: vec![text()] }).into(),
            MigrationError::Busy { status: text() }.into(),
            LocalMigrationError::Missing { version: text(), name: "x" }.into(),
            LocalMigrationError::Busy { status: text() }.into(),
            QmpError::NoGreeting { path: "x".into(), after: std::time::Duration::ZERO }.into(),
            refused_by_qemu().into(),
            MachineTypeError::NoDefault.into(),
            TrackerError::TrackedBlock { block: text(), reason: text() }.into(),
            TrackerError::Version { path: "x".into(), plugin: 1, ours: 2 }.into(),
        ];
        for error in errors {
            let shown = format!("{error:?}");
            assert_eq!(class_of(&error.context("preparing")), Class::Refused, "{shown}");
        }
        let failed = CaptureError::Broken { node: text(), why: text() };
        assert_eq!(class_of(&failed.into()), Class::Failed);
    }
}
