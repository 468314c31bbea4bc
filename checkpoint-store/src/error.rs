//! What can go wrong in a store: what was tried, on what, and what to do next.

use std::fmt;
use std::time::Duration;

use checkpoint_format::{CheckpointId, Epoch, VmName};
use thiserror::Error;

use crate::path::StorePath;

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// The operation that was tried, as errors, logs and fault rules name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named after the methods of `Store`")]
pub enum Op {
    CreateDirAll,
    CreateDir,
    Put,
    PutExclusive,
    Read,
    ReadRange,
    Stat,
    List,
    RenameDir,
    Remove,
    SetReplication,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::CreateDirAll => "create directories",
            Op::CreateDir => "create directory",
            Op::Put => "put",
            Op::PutExclusive => "put exclusively",
            Op::Read => "read",
            Op::ReadRange => "read a range of",
            Op::Stat => "stat",
            Op::List => "list",
            Op::RenameDir => "rename",
            Op::Remove => "remove",
            Op::SetReplication => "set the replication of",
        })
    }
}

/// An error of a store or of the repository on it. Paths are as the store's URL would name them.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum StoreError {
    #[error("{op} {path}: it, or the directory that should hold it, does not exist")]
    NotFound { op: Op, path: String },

    #[error("{op} {path}: the name is already taken, and nothing in a store is ever overwritten")]
    AlreadyExists { op: Op, path: String },

    #[error(
        "{op} {path}: no progress for {after:?}; the store is hung or unreachable, and whether the operation took \
         effect is unknown. Check the store's health, then try again"
    )]
    Timeout { op: Op, path: String, after: Duration },

    #[error(
        "{op} {path}: the answer was lost ({reason}), and whether the operation took effect is unknown. Look before \
         trying again"
    )]
    Uncertain { op: Op, path: String, reason: String },

    #[error("{op} {path}: the store can't do it now ({reason}); trying again later may help")]
    Unavailable { op: Op, path: String, reason: String },

    #[error(
        "{op} {path}: not permitted ({reason}); give this user the right to it or use another store directory"
    )]
    Denied { op: Op, path: String, reason: String },

    #[error("{op} {path}: no room ({reason}); free space, raise the quota or use another store")]
    Full { op: Op, path: String, reason: String },

    #[error("{op} {path}: failed for good ({reason})")]
    Failed { op: Op, path: String, reason: String },

    #[error(
        "{path}: bytes {offset}..{offset}+{len} were asked for, but the file has {file_len} bytes; it is shorter than \
         what refers to it says"
    )]
    PastEnd { path: String, offset: u64, len: u64, file_len: u64 },

    #[error(
        "{path} has an erasure coding policy; files written so were seen to be damaged after a DataNode died, and they can't be synced. Use \
         a directory with replication: hdfs ec -setPolicy -replicate -path {path} (files that are there keep what they have)"
    )]
    ErasureCoded { path: String },

    #[error("{path}: {what} is {actual}, over the limit of {limit}")]
    Limit { path: String, what: &'static str, actual: u64, limit: u64 },

    #[error("{path}: {reason}; the store's content is damaged or was written by something else")]
    Corrupt { path: String, reason: String },

    #[error(
        "writer epoch {ours} of {vm} is fenced: epoch {newest} was claimed after it, by another instance of this VM, \
         whose checkpoints do not contain this one's state. Only if that instance is surely dead, order it: \
         'stillpoint attach {vm} --take-over'"
    )]
    Fenced { vm: VmName, ours: Epoch, newest: Epoch },

    #[error(
        "checkpoints of {vm} are being written by {holder} (epoch {epoch}), which did not release them; stop it, or \
         take over on purpose if it is surely dead"
    )]
    WriterHeld { vm: VmName, epoch: Epoch, holder: String },

    #[error(
        "checkpoint {id} of {vm} is in use by {reader}; it can be removed when all has arrived \
         there, or a day after that host was lost"
    )]
    InUse { vm: VmName, id: CheckpointId, reader: String },

    #[error(
        "checkpoint {id} of {vm}: the commit was sent but its outcome can't be learned ({reason}). Treat it as not \
         durable and take a later number for the next one"
    )]
    CommitUnknown { vm: VmName, id: CheckpointId, reason: String },

    #[error("{text:?} is no path in a store: {reason}")]
    InvalidPath { text: String, reason: &'static str },

    #[error("{url}: {reason}; give file:///directory or hdfs://namenode:port/directory")]
    InvalidUrl { url: String, reason: String },

    #[error("{url}: {reason}")]
    WrongStore { url: String, reason: String },
}

error_class::classes! {
    StoreError: Usage(InvalidUrl) Refused(Fenced, WriterHeld, InUse, ErasureCoded)
        Damaged(Corrupt, PastEnd)
        Store(NotFound, AlreadyExists, Timeout, Uncertain, Unavailable, Denied, Full, Failed, Limit,
            CommitUnknown, InvalidPath, WrongStore);
}

impl StoreError {
    /// Whether the same call, or one to the same end under a new name, may succeed without any
    /// action of the user.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            StoreError::Timeout { .. }
                | StoreError::Uncertain { .. }
                | StoreError::Unavailable { .. }
        )
    }

    /// Whether the operation may have taken effect in spite of the error.
    pub fn is_ambiguous(&self) -> bool {
        matches!(
            self,
            StoreError::Timeout { .. }
                | StoreError::Uncertain { .. }
                | StoreError::CommitUnknown { .. }
        )
    }

    /// Whether what was asked for is not in the store.
    pub fn is_not_found(&self) -> bool {
        matches!(self, StoreError::NotFound { .. })
    }

    /// Whether the name is taken already.
    pub fn is_already_exists(&self) -> bool {
        matches!(self, StoreError::AlreadyExists { .. })
    }

    /// Whether a newer writer has fenced this one: no retry can help.
    pub fn is_fenced(&self) -> bool {
        matches!(self, StoreError::Fenced { .. })
    }

    pub(crate) fn not_found(op: Op, path: &StorePath) -> Self {
        StoreError::NotFound { op, path: path.to_string() }
    }

    pub(crate) fn already_exists(op: Op, path: &StorePath) -> Self {
        StoreError::AlreadyExists { op, path: path.to_string() }
    }

    pub(crate) fn failed(op: Op, path: &StorePath, reason: impl fmt::Display) -> Self {
        StoreError::Failed { op, path: path.to_string(), reason: reason.to_string() }
    }

    pub(crate) fn unavailable(op: Op, path: &StorePath, reason: impl fmt::Display) -> Self {
        StoreError::Unavailable { op, path: path.to_string(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn one_of_each() -> Vec<StoreError> {
        let (op, path, reason) = (Op::Put, String::from("a/b"), String::from("why"));
        let vm: VmName = "vm".parse().expect("a valid name");
        vec![
            StoreError::NotFound { op, path: path.clone() },
            StoreError::AlreadyExists { op, path: path.clone() },
            StoreError::Timeout { op, path: path.clone(), after: Duration::from_secs(1) },
            StoreError::Uncertain { op, path: path.clone(), reason: reason.clone() },
            StoreError::Unavailable { op, path: path.clone(), reason: reason.clone() },
            StoreError::Denied { op, path: path.clone(), reason: reason.clone() },
            StoreError::Full { op, path: path.clone(), reason: reason.clone() },
            StoreError::Failed { op, path: path.clone(), reason: reason.clone() },
            StoreError::PastEnd { path: path.clone(), offset: 1, len: 2, file_len: 2 },
            StoreError::Limit { path: path.clone(), what: "its length", actual: 2, limit: 1 },
            StoreError::Corrupt { path: path.clone(), reason: reason.clone() },
            StoreError::Fenced { vm: vm.clone(), ours: Epoch(1), newest: Epoch(2) },
            StoreError::WriterHeld { vm: vm.clone(), epoch: Epoch(1), holder: "x".into() },
            StoreError::InUse { vm: vm.clone(), id: CheckpointId(1), reader: "x".into() },
            StoreError::CommitUnknown { vm, id: CheckpointId(1), reason: reason.clone() },
            StoreError::InvalidPath { text: path.clone(), reason: "why" },
            StoreError::InvalidUrl { url: path.clone(), reason: reason.clone() },
            StoreError::WrongStore { url: path, reason },
        ]
    }

    #[test]
    fn texts_are_distinct() {
        let all = one_of_each();
        let texts: HashSet<String> = all.iter().map(StoreError::to_string).collect();
        assert_eq!(texts.len(), all.len());
    }

    #[test]
    fn only_passing_troubles_are_retryable() {
        let retryable = one_of_each().iter().filter(|e| e.is_retryable()).count();
        assert_eq!(retryable, 3);
    }
}
