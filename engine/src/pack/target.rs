//! Where packs go: a checkpoint under way, or a layer.

use anyhow::Result;
use bytes::Bytes;
use checkpoint_store::{PartialCheckpoint, PartialLayer, StoredPack};
use futures::future::BoxFuture;

pub(crate) trait PackTarget: Send + Sync {
    fn put_pack<'a>(
        &'a self,
        stem: &'a str,
        chunks: Vec<Bytes>,
    ) -> BoxFuture<'a, Result<StoredPack>>;
}

impl PackTarget for PartialCheckpoint {
    fn put_pack<'a>(
        &'a self,
        stem: &'a str,
        chunks: Vec<Bytes>,
    ) -> BoxFuture<'a, Result<StoredPack>> {
        Box::pin(async move { Ok(PartialCheckpoint::put_pack(self, stem, chunks).await?) })
    }
}

impl PackTarget for PartialLayer {
    fn put_pack<'a>(
        &'a self,
        stem: &'a str,
        chunks: Vec<Bytes>,
    ) -> BoxFuture<'a, Result<StoredPack>> {
        Box::pin(async move { Ok(PartialLayer::put_pack(self, stem, chunks).await?) })
    }
}
