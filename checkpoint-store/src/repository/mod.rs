//! The layout on top of a store, and who may change it.
//!
//! ```text
//! store.json                                        format version, store id
//! layers/<digest>/                                  a committed layer
//! layers/<digest>.<nonce>.partial/                  one being stored
//! vms/<vm>/writers/<epoch>                          claimed exclusively; the highest is the writer
//! vms/<vm>/writers/<epoch>.released                 its writer ended in order
//! vms/<vm>/checkpoints/<seq>.<epoch>-<try>.partial/ packs, then manifest.json
//! vms/<vm>/checkpoints/<seq>/                       the same directory after the one rename: a checkpoint
//! vms/<vm>/readers/<seq>.<key>-<number>             the checkpoint, and all before it, are in use
//! vms/<vm>/proofs/<seq>.<key>.json                  a note that it was restored and compared; for people
//! vms/<vm>/working-set                              what its guest needed first; a hint
//! ```

mod bounded;
mod durable;
mod identity;
mod layers;
mod layout;
mod partial;
mod proofs;
mod readers;
mod reading;
mod record;
mod retry;
mod working_set;
mod writer;

use std::sync::Arc;
use std::time::Duration;

pub use durable::Durable;
pub use identity::Mode;
pub use layers::{LayerOutcome, PartialLayer};
pub use partial::{KeptPartial, PartialCheckpoint, Sealed};
pub use readers::{Reader, ReaderInfo, ReaderRecord};
pub use reading::MAX_MANIFEST_LEN;
pub use record::{WriterInfo, WriterRecord};
pub use retry::{RetryPolicy, StoredPack};
pub use writer::{Claim, Writer};

use crate::error::Result;
use crate::store::Store;
use bounded::Bounded;
use retry::Retry;

/// Options of a [`Repository`].
#[derive(Debug, Clone)]
pub struct RepositoryOptions {
    /// How files are stored that the store did not take at once.
    pub retry: RetryPolicy,
    /// Copies wanted of every file; `None`: what the store gives to files by default.
    pub replicas: Option<u16>,
    /// The longest that one call to the store may take, whatever the store's own limits are. A put
    /// or a read may take longer by a second per MiB.
    pub call_limit: Duration,
    /// An upload of a layer that stored nothing for so long, by the store's clock, is taken for
    /// abandoned.
    pub abandoned_after: Duration,
    /// A reader that was not renewed for so long, by the store's clock, does not protect its
    /// checkpoint any more.
    pub readers_expire_after: Duration,
}

/// A day: the upload of a layer stores a pack every few seconds, but may first read an image of
/// which the store has nearly all.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A day: a reader is renewed every half hour, but its host may be cut off from the store, and its
/// guest waits for it then.
const READERS_EXPIRE_AFTER: Duration = Duration::from_secs(24 * 3600);

impl Default for RepositoryOptions {
    fn default() -> Self {
        RepositoryOptions {
            retry: RetryPolicy::default(),
            replicas: None,
            call_limit: Duration::from_secs(120),
            abandoned_after: ABANDONED_AFTER,
            readers_expire_after: READERS_EXPIRE_AFTER,
        }
    }
}

/// A store of checkpoints. Cheap to clone; clones share everything.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Arc<Bounded>,
    retry: Arc<Retry>,
    id: Arc<str>,
    abandoned_after: Duration,
    readers_expire_after: Duration,
}

impl Repository {
    /// Opens the repository in `store`. An empty or missing directory becomes one with
    /// [`Mode::CreateIfMissing`]; a directory of something else, or a newer format, is refused.
    ///
    /// # Errors
    /// When the store cannot be reached, is no repository of a known version, or does not exist
    /// ([`Mode::MustExist`]).
    pub async fn open(store: Arc<dyn Store>, mode: Mode) -> Result<Self> {
        Self::open_with(store, mode, RepositoryOptions::default()).await
    }

    /// The same with options.
    ///
    /// # Errors
    /// As for [`Repository::open`].
    pub async fn open_with(
        store: Arc<dyn Store>,
        mode: Mode,
        options: RepositoryOptions,
    ) -> Result<Self> {
        let store = Bounded::new(store, options.call_limit);
        let id = identity::establish(&store, mode, &options.retry).await?;
        let kept = store.stat(&layout::identity()).await?.and_then(|stat| stat.replicas);
        let wanted = kept.map(|kept| options.replicas.unwrap_or(kept));
        let retry = Arc::new(Retry::new(options.retry, wanted));
        Ok(Repository {
            store: Arc::new(store),
            retry,
            id: id.into(),
            abandoned_after: options.abandoned_after,
            readers_expire_after: options.readers_expire_after,
        })
    }

    /// The id given to the store when it was created.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the store at this URL is still the one that was opened, and no other that took its
    /// place.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn is_unchanged(&self) -> Result<bool> {
        match identity::read(&self.store).await {
            Ok(id) => Ok(*id == *self.id),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The URL of the store.
    pub fn url(&self) -> &str {
        self.store.url()
    }

    /// Refuses a store whose files would not survive what they must (`ErasureCoded`). For a caller
    /// that is about to write checkpoints: what is there can be read all the same.
    ///
    /// # Errors
    /// When the store cannot keep the replicas that a commit needs, or cannot be asked.
    pub async fn check_redundancy(&self) -> Result<()> {
        self.store.check_redundancy().await
    }

    /// The store below; for what the repository does not offer.
    pub fn store(&self) -> Arc<dyn Store> {
        self.store.inner()
    }
}
