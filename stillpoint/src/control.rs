//! What the commands and the helper say to each other over the control socket: one JSON request on a line, then lines
//! of progress, then one result. Only the owner of the runtime directory can reach it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The longest line either side takes.
pub const MAX_LINE: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint.
    Checkpoint,
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
