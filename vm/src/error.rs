//! What kind of failure an error is, of what work, and its message with each fact once.
//!
//! Below public functions errors are passed as `anyhow` errors with context. A public function of
//! this crate returns a [`VmError`]; [`InPhase`] makes an [`EngineError`] of it, or of any other,
//! where a phase ends.

use anyhow::Error;
use checkpoint_format::{
    DigestParseError, EncodeError, EnvelopeError, IndexError, LayerError, LineageError,
    ManifestError, NameError, OtherCheckpoint, PackError, WorkingSetError,
};
use checkpoint_store::StoreError;
use dirty_tracker::TrackerError;
pub use error_class::Class;
use error_class::Classified;
use qemu_cmdline::arguments::ArgumentError;
use qemu_cmdline::config::ConfigError;
use qemu_cmdline::size::SizeError;
use qmp_bridge::capture::{BadTag, CaptureError};
use qmp_bridge::device_state::DeviceStateError;
use qmp_bridge::disks::DiskError;
use qmp_bridge::guest_agent::AgentError;
use qmp_bridge::host_finder::HostError;
use qmp_bridge::images::ImageError;
use qmp_bridge::migration::MigrationError;
use qmp_bridge::nbd::NbdError;
use qmp_bridge::nbd::server::ExportError;
use qmp_bridge::qmp::line::LineError;
use qmp_bridge::ramblock::RamBlockError;
use qmp_bridge::run_state::{NoGuest, RunStateError};
use qmp_bridge::stream::StreamError;
use qmp_bridge::stream_reader::StreamReadError;
use qmp_bridge::synthetic_qcow2::SyntheticError;
use qmp_bridge::{JobError, PauseError, QmpError, ServerError};
use serde::{Deserialize, Serialize};
use std::error::Error as StdError;
use std::fmt;

/// The error of a function of this crate: what kind of failure it is, and its cause. What work it
/// was done for is its caller's to say.
///
/// It displays as its outermost cause, and with `{:#}` as all of them; [`StdError::source`] leads
/// to those below.
#[derive(Debug)]
pub struct VmError {
    class: Class,
    cause: Error,
}

impl VmError {
    /// What kind of failure it is.
    pub fn class(&self) -> Class {
        self.class
    }

    /// All causes on one line, each fact once.
    pub fn explain(&self) -> String {
        explain(&self.cause)
    }
}

impl From<Error> for VmError {
    fn from(cause: Error) -> Self {
        Self { class: class_of(&cause), cause }
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl StdError for VmError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.source()
    }
}

/// The error of a phase: what kind of failure it is, of what work, and its cause.
///
/// It displays as its outermost cause; [`StdError::source`] leads to those below.
#[derive(Debug)]
pub struct EngineError {
    class: Class,
    phase: Phase,
    cause: Error,
}

impl EngineError {
    /// Of work in `phase`, whatever the phases of the functions that were called for it.
    pub fn new(phase: Phase, cause: Error) -> Self {
        Self { class: class_of(&cause), phase, cause }
    }

    /// An error of another process, which has told its class and phase.
    pub fn of_other(class: Class, phase: Phase, message: String) -> Self {
        Self { class, phase, cause: Error::msg(message) }
    }

    /// The same error, of the same phase, with what it was needed for.
    pub fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        Self { cause: self.cause.context(what), ..self }
    }

    /// What kind of failure it is.
    pub fn class(&self) -> Class {
        self.class
    }

    /// What was being done.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// All causes on one line, each fact once.
    pub fn explain(&self) -> String {
        explain(&self.cause)
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl StdError for EngineError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.source()
    }
}

/// What was being done, in the words of the phases that a checkpoint and a restore report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// What a request names is opened: a runtime directory, a program, a store.
    Open,
    /// A command asks the VM's helper, or the process that is to be its helper.
    Ask,
    /// A helper attaches to its VM.
    Attach,
    /// What an interrupted adoption left is completed or undone.
    Recover,
    /// Checkpoint: all that can be done before the pause.
    Prepare,
    /// Checkpoint: copies while the guest runs, each after a brief stop.
    PreCopy,
    /// Checkpoint: the guest is paused.
    Pause,
    /// Checkpoint: memory comes by QEMU's migration stream.
    Stream,
    /// Checkpoint: memory is read from QEMU's process. Restore: it is filled.
    Memory,
    /// Checkpoint: what was captured goes to the store.
    Upload,
    /// Checkpoint: the manifest is written, one rename.
    Commit,
    /// Checkpoint: what was claimed is acknowledged.
    Acknowledge,
    /// Restore, adoption, proof: what is in the way is refused; nothing is made.
    Plan,
    /// Restore: layers are fetched.
    Layers,
    /// Restore: disks are made.
    Disks,
    /// Boot, restore, adoption: the new QEMU is started.
    Start,
    /// Restore: the device state is loaded.
    Devices,
    /// Restore: the writer epoch is claimed and the guest may run.
    Resume,
    /// Adoption: local live migration.
    Move,
    /// Adoption: from the pause of the old QEMU's guest to that of the new one's run.
    Switchover,
    /// Adoption: the old QEMU ends, sockets get their names.
    Finish,
    /// Proof: what was restored is compared with what is stored.
    Compare,
    /// Verification: what is stored is read back.
    Verify,
    /// A phase that this version does not know: a helper of another version reported it.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Makes the error of a public function.
pub trait InPhase<T> {
    /// The same result, its error being one of work in `phase`.
    ///
    /// # Errors
    /// That of the result itself.
    fn in_phase(self, phase: Phase) -> Result<T, EngineError>;
}

impl<T, E: Into<Error>> InPhase<T> for Result<T, E> {
    fn in_phase(self, phase: Phase) -> Result<T, EngineError> {
        self.map_err(|error| EngineError::new(phase, error.into()))
    }
}

/// An error whose class is known where it is made.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Stated {
    class: Class,
    message: String,
}

impl Classified for Stated {
    fn class(&self) -> Class {
        self.class
    }
}

impl Classified for VmError {
    fn class(&self) -> Class {
        self.class
    }
}

impl Classified for EngineError {
    fn class(&self) -> Class {
        self.class
    }
}

/// An error of that class.
pub fn classed(class: Class, message: impl Into<String>) -> Error {
    Stated { class, message: message.into() }.into()
}

/// An error of class [`Class::Usage`].
pub fn usage(message: impl Into<String>) -> Error {
    classed(Class::Usage, message)
}

/// An error of class [`Class::Refused`].
pub fn refused(message: impl Into<String>) -> Error {
    classed(Class::Refused, message)
}

/// An error of class [`Class::Damaged`].
pub fn damaged(message: impl Into<String>) -> Error {
    classed(Class::Damaged, message)
}

/// That of the outermost cause which has one.
pub fn class_of(error: &Error) -> Class {
    error.chain().find_map(class_of_cause).unwrap_or(Class::Failed)
}

macro_rules! class_of_cause {
    ($($error:ty),+ $(,)?) => {
        /// None for an error of another origin: it says nothing of its class.
        fn class_of_cause(cause: &(dyn StdError + 'static)) -> Option<Class> {
            $(if let Some(error) = cause.downcast_ref::<$error>() {
                return Some(error.class());
            })+
            None
        }
    };
}

// Every type with a class; a test of the tree finds one that is missing.
class_of_cause! {
    EngineError, VmError, Stated, ArgumentError, SizeError, ConfigError, StoreError, TrackerError,
    EnvelopeError, IndexError, ManifestError, PackError, LayerError, LineageError, EncodeError,
    NameError, DigestParseError, OtherCheckpoint, WorkingSetError,
    QmpError, LineError, AgentError, JobError, ServerError, NbdError, DiskError, CaptureError,
    BadTag, ImageError, NoGuest, RunStateError, PauseError, RamBlockError, HostError,
    MigrationError, StreamReadError, StreamError, DeviceStateError, ExportError, SyntheticError,
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
    use qmp_bridge::migration::MigrationStatus;

    #[test]
    fn class_is_found_below_its_context() {
        let error = Err::<(), _>(refused("it runs elsewhere")).context("restoring m").unwrap_err();
        assert_eq!(class_of(&error), Class::Refused);
        assert_eq!(explain(&error), "restoring m: it runs elsewhere");
        assert_eq!(class_of(&anyhow::anyhow!("x")), Class::Failed);
        for code in 1..=5 {
            assert_eq!(class_of(&classed(Class::of_exit_code(code), "x")).exit_code(), code);
        }
        assert_eq!(Class::of_exit_code(101), Class::Failed);
        let busy = anyhow::Error::from(MigrationError::Busy { status: MigrationStatus::Active });
        assert_eq!(class_of(&busy.context("preparing")), Class::Refused);
    }

    #[test]
    fn engine_error_has_class_phase_and_all_causes() {
        let io = std::io::Error::other("no route to host");
        let source = || TrackerError::Maps { source: std::io::Error::other("no such process") };
        let inner = EngineError::new(Phase::Attach, Error::from(source()).context("attaching"));
        assert_eq!((inner.class(), inner.phase()), (Class::Failed, Phase::Attach));
        assert_eq!(inner.to_string(), "attaching");
        let mut causes = Vec::new();
        let mut next = inner.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        assert_eq!(causes, [source().to_string(), "no such process".to_owned()]);
        assert!(inner.source().is_some_and(|cause| cause.is::<TrackerError>()));
        let shown = inner.explain();

        let outer = EngineError::new(Phase::Plan, Error::from(inner).context("adopting m"));
        assert_eq!((outer.class(), outer.phase()), (Class::Failed, Phase::Plan));
        assert_eq!(outer.explain(), format!("adopting m: {shown}"));
        let store =
            StoreError::Full { op: checkpoint_store::Op::Put, path: text(), reason: text() };
        let full = EngineError::new(Phase::Upload, Error::from(store).context(io));
        assert_eq!((full.class(), full.phase()), (Class::Store, Phase::Upload));
        let full = full.context("measuring");
        assert_eq!((full.class(), full.phase()), (Class::Store, Phase::Upload));
        assert!(full.explain().starts_with("measuring: no route to host: "));
    }

    #[test]
    fn phase_is_named_as_phases_are_reported() {
        assert_eq!(Phase::PreCopy.to_string(), "pre-copy");
        assert_eq!(serde_json::from_str::<Phase>("\"pre-copy\"").unwrap(), Phase::PreCopy);
        assert_eq!(serde_json::from_str::<Phase>("\"a later one\"").unwrap(), Phase::Unknown);
    }

    fn text() -> String {
        "x".to_owned()
    }

    /// What the documented tables call refused is a refusal, wherever it is found out.
    #[test]
    fn class_of_each_refusal_is_refused() {
        let refused_by_qemu = || QmpError::NotQmp { path: "x".into(), why: text() };
        let errors: Vec<anyhow::Error> = vec![
            RamBlockError::Empty.into(),
            DiskError::Unsupported { device: text(), why: text() }.into(),
            DiskError::Inconsistent { device: text(), why: text() }.into(),
            CaptureError::Server(ServerError::InUse { exports: vec![text()] }).into(),
            MigrationError::Busy { status: MigrationStatus::Active }.into(),
            MigrationError::Missing { version: text(), name: text() }.into(),
            MigrationError::MigratedSince.into(),
            QmpError::NoGreeting { path: "x".into(), after: std::time::Duration::ZERO }.into(),
            refused_by_qemu().into(),
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
