//! The manifest of a layer and its table of blocks.
//!
//! An input is the manifest's file, a NUL byte, and the table: its magic and its columns before
//! compression.

use crate::sealing::{compressed, envelope, sealed};
use checkpoint_format::{
    BlockIndex, BlockTable, ByteLen, ContentDigest, DigestForm, LAYER_VERSION, LayerError,
    LayerManifest, OwnerIndex,
};

const MAGIC_LEN: usize = 8;

/// Reads manifest and table as they are, and with lengths and digests put right; whether they
/// are a layer's.
pub(crate) fn check(input: &[u8]) -> bool {
    let split = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let (file, table) = (&input[..split], input.get(split + 1..).unwrap_or_default());
    read(file, table);
    let Some(manifest) = read(&sealed(file), table) else { return false };
    let Some((magic, columns)) = table.split_at_checked(MAGIC_LEN) else { return false };
    let table = [magic, &compressed(columns)].concat();
    let Some(manifest) = naming(manifest, &table) else { return false };
    assert_table(&manifest, &table)
}

fn read(file: &[u8], table: &[u8]) -> Option<LayerManifest> {
    let manifest = LayerManifest::parse(file).ok()?;
    let written = manifest.encode().expect("what was read can be written");
    assert_eq!(LayerManifest::parse(&written).expect("what was written can be read"), manifest);
    let _ = manifest.parse_table(table);
    Some(manifest)
}

/// The manifest that speaks of this table, and whose name is the digest of its blocks.
fn naming(manifest: LayerManifest, table: &[u8]) -> Option<LayerManifest> {
    let mut named = manifest;
    named.table.len = ByteLen(table.len() as u64);
    named.table.digest = ContentDigest::of(table);
    if let Err(LayerError::BlocksDigest { found, .. }) = named.parse_table(table) {
        named.digest = found;
    }
    let version = if named.form == DigestForm::Content { 1 } else { LAYER_VERSION };
    let body = serde_json::to_vec(&named).expect("a manifest is JSON");
    LayerManifest::parse(&envelope("stillpoint-layer", version, &body)).ok()
}

fn assert_table(manifest: &LayerManifest, bytes: &[u8]) -> bool {
    let Ok(table) = manifest.parse_table(bytes) else { return false };
    assert_eq!(table.blocks(), manifest.blocks());
    assert_blocks(manifest, &table);
    let (written, info) = table.encode(manifest.form).expect("what was read can be written");
    assert_eq!(info.stored_blocks, manifest.table.stored_blocks);
    let again = LayerManifest { table: info, ..manifest.clone() };
    assert_eq!(again.parse_table(&written).expect("what was written can be read"), table);
    true
}

fn assert_blocks(manifest: &LayerManifest, table: &BlockTable) {
    let mut next = 0;
    let mut own = 0;
    for (nth, (number, at)) in table.stored().enumerate() {
        assert!((next..table.blocks()).contains(&number), "block {number} after {next}");
        assert_eq!(table.get(nth), Some((number, *at)));
        assert!(manifest.owner(at.owner).is_some(), "an owner that is not in the manifest");
        if at.owner == OwnerIndex::OWN {
            let pack = &manifest.packs[at.pack.as_usize()];
            assert!(at.frame.0 < pack.info.frames, "a frame that its pack does not have");
            own += 1;
        }
        next = number + 1;
    }
    let mut index = BlockIndex::new();
    index.add_layer(manifest, table);
    assert!(index.len() <= own);
}
