//! What the integration tests share.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod cluster;
pub(crate) mod contract;
pub(crate) mod repository;

use bytes::Bytes;
use checkpoint_store::{StorePath, WriterRecord};

pub(crate) fn path(text: &str) -> StorePath {
    StorePath::new(text).expect("a valid path")
}

pub(crate) fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// Bytes that differ from block to block, the same for the same seed.
pub(crate) fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed | 1;
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(len);
    data.into()
}

pub(crate) fn record(instance: &str) -> WriterRecord {
    WriterRecord {
        host: "test-host".to_owned(),
        boot_id: "boot".to_owned(),
        instance: instance.to_owned(),
        pid: 1,
        claimed_at: "2026-01-01T00:00:00Z".to_owned(),
        version: "test".to_owned(),
        hardware: None,
    }
}
