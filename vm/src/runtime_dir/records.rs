//! What the files of a runtime directory say.

use super::RuntimeDir;
use crate::error::{Class, EngineError, Phase};
use crate::memory_source::{EngineChoice, StreamChoice};
use checkpoint_format::{CheckpointId, CheckpointIdentity, VmName, VmRecord};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What was launched, in the words of `launch`: enough to attach to it and to start it again
/// elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFile {
    /// [`VmFile::FORMAT`] of the version that wrote it.
    pub format: u32,
    /// The VM.
    pub name: VmName,
    /// The URL of its store.
    pub store: String,
    /// One life of one QEMU process; a restored VM is a new instance.
    pub instance: String,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// QEMU's process, where the launcher knows it: a helper does not wait for one that is gone.
    pub pid: Option<u32>,
    /// As `MAJOR.MINOR.MICRO`.
    pub qemu_version: String,
    /// Versioned.
    pub machine_type: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Main memory, in bytes.
    pub ram_bytes: u64,
    /// Main memory's RAM block.
    pub ram_block: String,
    /// The user's options, normalized: no readconfig, every drive named, the machine type
    /// versioned.
    pub arguments: Vec<String>,
    /// QEMU's working directory.
    pub directory: PathBuf,
    /// Directory for temporary fleecing overlays.
    #[serde(rename = "scratch")]
    pub fleecing: PathBuf,
    /// The checkpoint that this instance was restored from.
    pub restored_from: Option<CheckpointId>,
    /// The process of an external VM; none for a managed VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(rename = "unprepared")]
    pub external: Option<External>,
}

/// What a restore chooses of a [`VmFile`]; the rest is as the checkpoint recorded it.
#[expect(missing_docs, reason = "the fields are those of `VmFile`")]
pub struct RestoreTarget {
    pub name: VmName,
    pub store: String,
    pub instance: String,
    pub qemu: PathBuf,
    pub qemu_version: String,
    pub arguments: Vec<String>,
    pub directory: PathBuf,
    pub fleecing: PathBuf,
    pub restored_from: Option<CheckpointId>,
}

/// How a helper reaches an external VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// Its monitor, ours alone while a helper is attached.
    pub monitor: PathBuf,
    /// Where the plugin listens, if its owner put it into that QEMU.
    pub plugin: Option<PathBuf>,
    /// When the process began, in the kernel's ticks since boot: a later one may get the same pid.
    pub started: u64,
    /// What its owner chose for it.
    pub engine: EngineChoice,
    /// The same of the stream engine.
    pub stream: StreamChoice,
}

/// Why a helper ended, for the command that started it and for those that ask it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// All causes on one line.
    pub message: String,
    /// Of the command that asked; it derives from the class.
    pub exit_code: u8,
    /// Absent from helpers of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Class>,
    /// What was being done; absent like the class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

impl Failure {
    /// An error as it is sent to another process of ours.
    pub fn of(error: &EngineError) -> Self {
        Self {
            message: error.explain(),
            exit_code: error.class().exit_code(),
            class: Some(error.class()),
            phase: Some(error.phase()),
        }
    }
}

/// The error that another process of ours reported.
impl From<Failure> for EngineError {
    fn from(failure: Failure) -> Self {
        let class = failure.class.unwrap_or_else(|| Class::of_exit_code(failure.exit_code));
        Self::of_other(class, failure.phase.unwrap_or(Phase::Unknown), failure.message)
    }
}

impl VmFile {
    /// The format that this version writes and reads.
    pub const FORMAT: u32 = 1;

    /// A managed VM that continues the recorded one.
    pub fn restored(record: &VmRecord, target: RestoreTarget) -> Self {
        Self {
            format: Self::FORMAT,
            name: target.name,
            store: target.store,
            instance: target.instance,
            qemu: target.qemu,
            pid: None,
            qemu_version: target.qemu_version,
            machine_type: record.machine_type.clone(),
            accelerator: record.accelerator.clone(),
            ram_bytes: record.ram_bytes.0,
            ram_block: record.ram_block.clone(),
            arguments: target.arguments,
            directory: target.directory,
            fleecing: target.fleecing,
            restored_from: target.restored_from,
            external: None,
        }
    }

    /// The plugin's socket, if there is a plugin.
    pub fn plugin(&self, runtime: &RuntimeDir) -> Option<PathBuf> {
        self.external.as_ref().map_or_else(|| Some(runtime.plugin()), |there| there.plugin.clone())
    }
}

/// What the marks of written pages count from. They outlive a helper: the kernel's in the guest's
/// page tables, the disks' as dirty bitmaps in QEMU. They say nothing of any checkpoint that does
/// not descend from `since`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// The disks' bitmaps record at least since this checkpoint.
    pub since: CheckpointIdentity,
    /// So do the kernel's marks of the guest's memory.
    pub is_exact: bool,
}

impl Marks {
    /// These marks, if they are of use for a checkpoint that adds to `lineage`.
    pub fn of(self, lineage: &[CheckpointIdentity]) -> Option<Self> {
        lineage.contains(&self.since).then_some(self)
    }
}
