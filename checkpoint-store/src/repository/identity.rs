//! store.json: that this directory is ours, and in which format.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::bounded::Bounded;
use super::layout;
use super::retry::{Retry, RetryPolicy, store_exclusive};
use crate::error::{Result, StoreError};
use crate::nonce::nonce;
use crate::path::StorePath;
use crate::store::PutOptions;

const FORMAT: &str = "stillpoint-store";
const VERSION: u32 = 1;
const MAX_IDENTITY_LEN: u64 = 64 << 10;

/// Whether opening may create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Initialize the store if it has no `store.json`.
    CreateIfMissing,
    /// A store without `store.json` is an error.
    MustExist,
}

/// What every version can be read as.
#[derive(Debug, Deserialize)]
struct Header {
    format: String,
    version: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    format: String,
    version: u32,
    id: String,
}

/// Finds or creates the store's identity; its id.
pub(crate) async fn establish(store: &Bounded, mode: Mode, policy: &RetryPolicy) -> Result<String> {
    match read(store).await {
        Err(error) if error.is_not_found() => {}
        other => return other,
    }
    match mode {
        Mode::CreateIfMissing => create(store, policy).await,
        Mode::MustExist => Err(wrong(store, "there is no store here (store.json is missing)")),
    }
}

pub(crate) async fn read(store: &Bounded) -> Result<String> {
    let path = layout::identity();
    let bytes = store.read(&path, MAX_IDENTITY_LEN).await?;
    let corrupt = |error: serde_json::Error| StoreError::Corrupt {
        path: path.to_string(),
        reason: error.to_string(),
    };
    let header: Header = serde_json::from_slice(&bytes).map_err(corrupt)?;
    if header.format != FORMAT {
        return Err(wrong(store, "store.json belongs to something else"));
    }
    if header.version > VERSION {
        let reason = format!(
            "the store has format version {}, this Stillpoint knows up to {VERSION}; use a newer one",
            header.version
        );
        return Err(wrong(store, &reason));
    }
    let identity: Identity = serde_json::from_slice(&bytes).map_err(corrupt)?;
    Ok(identity.id)
}

async fn create(store: &Bounded, policy: &RetryPolicy) -> Result<String> {
    store.create_dir_all(&StorePath::root()).await?;
    let found = store.list(&StorePath::root()).await?;
    if found.iter().any(|entry| !entry.name.starts_with(PROBE)) {
        // Another process may have created the store since the check above; otherwise these are not
        // Stillpoint's files.
        return read(store).await.map_err(|error| match error {
            StoreError::NotFound { .. } => wrong(
                store,
                "the directory is not empty and not a store; give an empty or a new one",
            ),
            other => other,
        });
    }
    store.check_redundancy().await?;
    let identity = Identity { format: FORMAT.to_owned(), version: VERSION, id: nonce() };
    let text = serde_json::to_vec_pretty(&identity).expect("strings and a number are always JSON");
    let text = Bytes::from(text);
    let path = layout::identity();
    // Its number of copies is what the repository will want for all files, so it ends with the
    // store's own number, even if fewer can be written just now.
    let retry = Retry::new(policy.clone(), default_replicas(store).await?);
    match store_exclusive(store, &retry, &path, &text).await {
        Ok(()) => {}
        Err(error) if error.is_already_exists() || error.is_ambiguous() => {}
        Err(error) => return Err(error),
    }
    // Whichever process won, all processes use what is there.
    read(store).await
}

/// Prefix of the empty files that a process makes here for a moment while it creates the store.
const PROBE: &str = "probe-";

/// The copies that the store gives a file by itself: those of an empty file, which no DataNode has
/// to take.
async fn default_replicas(store: &Bounded) -> Result<Option<u16>> {
    let path = StorePath::new(&format!("{PROBE}{}", nonce()))?;
    let receipt = store.put(&path, Vec::new(), PutOptions::default()).await;
    store.remove(&path).await?;
    Ok(receipt?.replicas)
}

fn wrong(store: &Bounded, reason: &str) -> StoreError {
    StoreError::WrongStore { url: store.url().to_owned(), reason: reason.to_owned() }
}
