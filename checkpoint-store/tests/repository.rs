//! The repository on the stores that need nothing but this host.

mod common;

use std::sync::Arc;

use checkpoint_store::{LocalStore, MemoryStore, Store};

async fn local() -> (Arc<dyn Store>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("temporary directory");
    (Arc::new(LocalStore::new(dir.path().join("store")).expect("store")), dir)
}

async fn memory() -> (Arc<dyn Store>, ()) {
    (Arc::new(MemoryStore::with_replicas(3)), ())
}

mod on_local {
    crate::repository_contract!(super::local);
}

mod on_memory {
    crate::repository_contract!(super::memory);
}
