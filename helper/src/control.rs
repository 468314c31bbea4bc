//! What the commands and the helper say to each other over the control socket: one JSON request on
//! a line, then lines of progress, then one result. Only the owner of the runtime directory can
//! reach it.

use anyhow::{Context, Result};
use checkpoint_format::VmName;
use engine::checkpoint::Choice;
use engine::progress::Update;
use engine::restore::hydration::HydrationStatus;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;
use vm::runtime_dir::Failure;

/// The longest answer that a command takes, in bytes.
pub const MAX_LINE: usize = 1 << 20;
/// The longest request that the helper takes, in bytes: a few words and a path.
pub const MAX_REQUEST: u64 = 32 << 10;

/// What a command asks of a helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint; where nothing is chosen, as the VM was attached.
    Checkpoint(Choice),
    /// Move the VM into a QEMU of ours.
    Adopt {
        /// Its program; none for the one that runs the VM.
        qemu: Option<PathBuf>,
    },
    /// What VM is this, and what is it doing.
    Status,
    /// Time a bare `stop` and `cont`, the least that any pause costs.
    BarePause,
}

impl Request {
    /// Reads the line of a command.
    ///
    /// # Errors
    /// When it is none of these requests.
    pub fn parse(line: &str) -> Result<Self> {
        serde_json::from_str(line)
            .context("the request cannot be parsed; are command and helper of the same version?")
    }
}

/// A line of the helper's answer; the last one is `Done` or `Failed`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// How far the work is.
    Progress(Update),
    /// The result, as the request's documentation has it.
    Done(Value),
    /// Why there is none.
    Failed(Failure),
}

impl Reply {
    /// Reads a line of a helper.
    ///
    /// # Errors
    /// When it is none of these replies.
    pub fn parse(line: &str) -> Result<Self> {
        serde_json::from_str(line).context("the helper's answer cannot be parsed")
    }
}

/// The result of [`Request::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The helper's process.
    pub pid: u32,
    /// A checkpoint or an adoption is under way; then nothing is said of the VM.
    pub busy: bool,
    /// The VM, unless the helper is busy.
    #[serde(flatten)]
    pub vm: Option<VmStatus>,
    /// Memory that is still to come from the store; absent when all of it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hydration: Option<HydrationStatus>,
}

/// A VM and what its helper holds of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name in the store.
    pub name: VmName,
    /// The store's URL.
    pub store: String,
    /// This life of its QEMU: a restored VM is another instance.
    pub instance: String,
    /// QEMU's process.
    pub qemu_pid: u32,
    /// As `MAJOR.MINOR.MICRO`.
    pub qemu_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The most memory that the helper was seen to need for a checkpoint, in bytes; none if the
    /// kernel does not say.
    pub peak_memory_bytes: Option<u64>,
    /// The most that it may need, in bytes.
    pub memory_limit_bytes: u64,
}

/// The result of [`Request::BarePause`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct BarePause {
    /// From `stop` to `cont`, in milliseconds.
    pub pause_ms: f64,
}
