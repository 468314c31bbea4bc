//! Read-only files of a VM (base images, backing files, kernels): found by content, stored once for
//! all VMs, taken from a local copy at restore when its digest matches.

pub mod digest;
mod fetch;
pub mod image;
mod known;
mod read;
mod upload;

pub use fetch::provide;
pub use known::Known;
pub use read::{Content, StoredLayer};
pub use upload::ensure;

/// Files of a layer in the store, besides its packs.
const MANIFEST_FILE: &str = "layer.json";
const TABLE_FILE: &str = "blocks.table";

#[cfg(test)]
mod test;
