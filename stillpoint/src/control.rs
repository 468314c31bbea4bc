//! What the commands and the helper say to each other over the control socket: one JSON request on
//! a line, then lines of progress, then one result. Only the owner of the runtime directory can
//! reach it.

use engine::checkpoint::Choice;
use engine::progress::Update;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;
use vm::runtime_dir::Failure;

/// The longest answer that a command takes, in bytes.
pub const MAX_LINE: usize = 1 << 20;
/// The longest request that the helper takes, in bytes: a few words and a path.
pub const MAX_REQUEST: u64 = 32 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint; where nothing is chosen, as the VM was attached.
    Checkpoint(Choice),
    /// Move the VM into a QEMU of ours.
    Adopt { qemu: Option<PathBuf> },
    /// What VM is this, and what is it doing.
    Status,
    /// Time a bare `stop` and `cont`, the least that any pause costs.
    BarePause,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Progress(Update),
    Done(Value),
    Failed(Failure),
}
