//! Where checkpoints live.
//!
//! [`Store`] is a small tree of immutable files with exactly the promises that a commit protocol needs;
//! [`LocalStore`], [`HdfsStore`] and [`MemoryStore`] keep them, [`FaultyStore`] breaks them on request.
//! [`Repository`] knows the layout on top of it: who may write a machine's checkpoints (writer epochs), what
//! is still partial, and the one rename that makes a checkpoint exist. Manifests and packs are opaque bytes here.

#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod error;
mod faulty;
mod hdfs;
mod local;
mod memory;
mod nonce;
mod open;
mod path;
mod repository;
mod store;

pub use error::{Op, Result, StoreError};
pub use faulty::{Fault, FaultRule, FaultyStore};
pub use hdfs::{HdfsOptions, HdfsStore};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use open::{StoreOptions, open};
pub use path::StorePath;
pub use repository::{
    Claim, Durable, LayerOutcome, MAX_MANIFEST_LEN, Mode, PartialCheckpoint, PartialLayer, Repository, RepositoryOptions, RetryPolicy,
    StoredPack, Writer, WriterInfo, WriterRecord,
};
pub use store::{Entry, MAX_READ_LEN, PutOptions, PutReceipt, Stat, Store};
