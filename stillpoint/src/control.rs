//! What the commands and the helper say to each other over the control socket: one JSON request on a line, then lines
//! of progress, then one result. Only the owner of the runtime directory can reach it.

use crate::engine::{EngineChoice, StreamChoice};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// The longest line either side takes.
pub const MAX_LINE: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint; where nothing is chosen, as the machine was attached.
    Checkpoint { engine: Option<EngineChoice>, stream: Option<StreamChoice> },
    /// Move the machine into a QEMU of ours.
    Adopt { qemu: Option<PathBuf> },
    /// What machine is this, and what is it doing.
    Status,
    /// Time a bare `stop` and `cont`, the least that any pause costs.
    BarePause,
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
