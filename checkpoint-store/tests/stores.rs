//! The contract on the stores that need nothing but this host.

mod common;

use std::sync::Arc;

use checkpoint_store::{FaultyStore, LocalStore, MemoryStore, Store, StorePath};

async fn local() -> (Arc<dyn Store>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let store = LocalStore::new(dir.path().join("not/yet/there")).expect("store");
    store.create_dir_all(&StorePath::root()).await.expect("root");
    (Arc::new(store), dir)
}

async fn memory() -> (Arc<dyn Store>, ()) {
    (Arc::new(MemoryStore::with_replicas(3)), ())
}

async fn faulty() -> (Arc<dyn Store>, ()) {
    (Arc::new(FaultyStore::new(Arc::new(MemoryStore::new()))), ())
}

mod on_local {
    crate::store_contract!(super::local);
}

mod on_memory {
    crate::store_contract!(super::memory);
}

mod on_faulty {
    crate::store_contract!(super::faulty);
}
