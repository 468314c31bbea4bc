//! What the commands and the helper say to each other over the control socket: one JSON request on a line, then lines
//! of progress, then one result. Only the owner of the runtime directory can reach it.

use crate::checkpoint::Choice;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// The longest answer that a command takes, in bytes.
pub const MAX_LINE: usize = 1 << 20;
/// The longest request that the helper takes, in bytes: a few words and a path.
pub const MAX_REQUEST: u64 = 32 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint; where nothing is chosen, as the machine was attached.
    Checkpoint(Choice),
    /// Move the machine into a QEMU of ours.
    Adopt { qemu: Option<PathBuf> },
    /// What machine is this, and what is it doing.
    Status,
    /// Time a bare `stop` and `cont`, the least that any pause costs.
    BarePause,
}

/// What `stillpoint adopt --json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adopted {
    pub adopted: bool,
    /// From the old QEMU's STOP to the new one's RESUME.
    pub downtime_ms: f64,
    /// As the old QEMU counts, which does not know the new one's part.
    pub qemu_downtime_ms: Option<f64>,
    /// From the request on.
    pub total_ms: f64,
    pub source_pid: u32,
    pub pid: u32,
    /// What the owner should know though all went well.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Progress(Progress),
    Done(Value),
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub phase: String,
    pub done: u64,
    pub total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub message: String,
    pub exit_code: u8,
}
