//! Where checkpoints live.
//!
//! [`Store`] is a small tree of immutable files with exactly the promises that a commit protocol
//! needs; [`LocalStore`], [`HdfsStore`] and [`MemoryStore`] keep them, [`FaultyStore`] breaks them
//! on request. [`Repository`] knows the layout on top of it: who may write a VM's checkpoints
//! (writer epochs), what is still partial, and the one rename that makes a checkpoint exist.
//! Manifests and packs are opaque bytes here.
//!
//! # Example
//!
//! ```
//! use checkpoint_format::CheckpointId;
//! use checkpoint_store::{Claim, MemoryStore, Mode, Repository, WriterRecord};
//! use std::sync::Arc;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let repository = Repository::open(Arc::new(MemoryStore::new()), Mode::CreateIfMissing).await?;
//! let record = WriterRecord {
//!     host: "host-a".into(),
//!     boot_id: "c0ffee".into(),
//!     instance: "first-start".into(),
//!     pid: 4711,
//!     claimed_at: "2026-01-01T00:00:00Z".into(),
//!     version: "0.1.0".into(),
//!     hardware: None,
//! };
//! let claim = Claim::Continue { instance: record.instance.clone(), last: None, dead: None };
//! let vm = "web1".parse()?;
//! let writer = repository.claim_writer(&vm, record, claim).await?;
//!
//! let partial = writer.begin(CheckpointId::FIRST).await?;
//! partial.put_pack("ram", vec!["pages".into()]).await?;
//! assert!(repository.checkpoints(&vm).await?.is_empty());
//! partial.commit("manifest".into()).await?;
//! assert_eq!(repository.checkpoints(&vm).await?, [CheckpointId::FIRST]);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs, clippy::missing_errors_doc, clippy::missing_panics_doc)]
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
    Claim, Durable, KeptPartial, LayerOutcome, MAX_MANIFEST_LEN, Mode, PartialCheckpoint,
    PartialLayer, Reader, ReaderInfo, ReaderRecord, Repository, RepositoryOptions, RetryPolicy,
    Sealed, StoredPack, Writer, WriterInfo, WriterRecord,
};
pub use store::{Entry, MAX_READ_LEN, PutOptions, PutReceipt, Stat, Store};
