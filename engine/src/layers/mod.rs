//! Read-only files of a VM (base images, backing files, kernels): found by content, stored once for
//! all VMs, taken from a local copy at restore when its digest matches.

pub(crate) mod digest;
mod fetch;
pub(crate) mod image;
mod known;
mod read;
mod upload;

pub use digest::{FileDigest, of_file};
pub(crate) use fetch::provide;
pub(crate) use known::Known;
pub(crate) use read::{Content, StoredLayer};
pub use upload::ensure;

/// Files of a layer in the store, besides its packs.
const MANIFEST_FILE: &str = "layer.json";
const TABLE_FILE: &str = "blocks.table";

#[cfg(test)]
mod test;
