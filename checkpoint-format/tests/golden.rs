//! Files of format version 1, kept for ever: sound ones must be read and written byte for byte,
//! damaged ones must be refused with the right words.
//!
//! `STILLPOINT_BLESS=1 cargo test -p checkpoint-format --test golden` writes the files again. That
//! is right only while no release has written the version. Afterwards a changed encoding gets a new
//! version and new files, and these stay. (A new zstd may pack otherwise without any change of
//! ours: then only the byte-for-byte test may be adapted.)

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use checkpoint_format::*;
use common::*;

const PACK: &str = "pack-v1.bin";
const MANIFEST: &str = "manifest-v1.txt";
const LAYER: &str = "layer-v1.txt";
const BLOCKS: &str = "layer-v1.blocks";
const LAYER_2: &str = "layer-v2.txt";
const BLOCKS_2: &str = "layer-v2.blocks";

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)
}

fn read(file: &str) -> Vec<u8> {
    fs::read(path(file)).unwrap_or_else(|error| panic!("read {file}: {error}"))
}

fn flipped(file: &[u8], at: usize) -> Vec<u8> {
    let mut bad = file.to_vec();
    bad[at] ^= 1;
    bad
}

/// The version field with its checksum right: what a later program might write.
fn later_pack(file: &[u8]) -> Vec<u8> {
    let mut later = file.to_vec();
    later[8] = 2;
    let checksum = Checksum::of(&later[..48]);
    later[48..64].copy_from_slice(&checksum.0);
    later
}

fn replaced(file: &[u8], kind: &str, from: &str, to: &str) -> Vec<u8> {
    let text = std::str::from_utf8(body(file)).expect("JSON is text");
    assert!(text.contains(from), "the sample has no {from}");
    envelope(kind, text.replacen(from, to, 1).as_bytes())
}

struct Damaged {
    file: &'static str,
    bytes: Vec<u8>,
    /// Words that the error must hold.
    error: &'static str,
}

fn damaged(file: &'static str, bytes: Vec<u8>, error: &'static str) -> Damaged {
    Damaged { file, bytes, error }
}

fn sound() -> [(&'static str, Vec<u8>); 6] {
    let (layer, blocks) = sample_layer();
    let (sparse, sparse_blocks) = sample_sparse_layer();
    [
        (PACK, bytes(&sample_pack(PackId([0xab; 16])))),
        (MANIFEST, sample_manifest().encode().expect("sound")),
        (LAYER, layer.encode().expect("sound")),
        (BLOCKS, blocks),
        (LAYER_2, sparse.encode().expect("sound")),
        (BLOCKS_2, sparse_blocks),
    ]
}

/// Offsets into the raw trailer of the sample: after the id and the three spaces come the frames,
/// then the runs.
const SPACES_AT: usize = 16;
const FRAMES_AT: usize = SPACES_AT + 4 + (2 + 10) + (2 + 9) + (2 + 12);
const RUNS_AT: usize = FRAMES_AT + 4 + 3 * 32;
const DIGESTS_AT: usize = RUNS_AT + 4 + 6 * 16;

fn damaged_packs() -> Vec<Damaged> {
    let good = bytes(&sample_pack(PackId([0xab; 16])));
    let end = good.len();
    let footer = PackFooter::parse(&good[end - FOOTER_LEN..]).expect("sound");
    let trailer = footer.trailer_offset.as_usize();
    let raw = |at: usize, value: &[u8]| {
        let value = value.to_vec();
        with_trailer(&good, move |raw| raw[at..at + value.len()].copy_from_slice(&value))
    };
    vec![
        damaged("pack-v1-empty.bin", vec![], "read the pack header: got 0 bytes, expected 64"),
        damaged(
            "pack-v1-header-magic.bin",
            flipped(&good, 0),
            "read the pack header: it begins with",
        ),
        damaged(
            "pack-v1-header-later.bin",
            later_pack(&good),
            "format version 2, this program reads version 1",
        ),
        damaged("pack-v1-header-id.bin", flipped(&good, 16), "verify the pack header: checksum is"),
        damaged(
            "pack-v1-frame-header.bin",
            flipped(&good, 64 + 6),
            "verify the frame at byte 64 of the pack: checksum is",
        ),
        damaged(
            "pack-v1-frame-content.bin",
            flipped(&good, 64 + 40),
            "verify the frame at byte 64 of the pack: checksum is",
        ),
        damaged(
            "pack-v1-trailer.bin",
            flipped(&good, trailer + 5),
            "verify the pack trailer: checksum is",
        ),
        damaged(
            "pack-v1-footer.bin",
            flipped(&good, end - 50),
            "verify the pack footer: checksum is",
        ),
        damaged(
            "pack-v1-cut.bin",
            good[..end - 1].to_vec(),
            "read the pack footer: it begins with",
        ),
        damaged(
            "pack-v1-spaces-count.bin",
            raw(SPACES_AT, &[0xff; 4]),
            "check the pack trailer: spaces is 4294967295, the limit is",
        ),
        damaged(
            "pack-v1-space-name.bin",
            raw(SPACES_AT + 6, b"cpu"),
            "space 0 has an unusable name",
        ),
        damaged(
            "pack-v1-frame-gap.bin",
            raw(FRAMES_AT + 4, &[65]),
            "entry 0 of the frame table: it doesn't begin where the last one ends",
        ),
        damaged(
            "pack-v1-frame-codec.bin",
            raw(FRAMES_AT + 4 + 15, &[7]),
            "entry 0 of the frame table: unknown codec",
        ),
        damaged(
            "pack-v1-frame-pages.bin",
            raw(FRAMES_AT + 4 + 14, &[65]),
            "it has no pages or more than a frame can",
        ),
        damaged(
            "pack-v1-run-space.bin",
            raw(RUNS_AT + 4 + 12, &[9]),
            "entry 0 of the run table: it names a space that is not in the space table",
        ),
        damaged(
            "pack-v1-run-other-space.bin",
            raw(RUNS_AT + 4 + 12, &[1]),
            "entry 0 of the run table: its frame is of another space",
        ),
        damaged(
            "pack-v1-run-long.bin",
            raw(RUNS_AT + 4 + 8, &[200]),
            "entry 0 of the run table: its frame is of another space",
        ),
        damaged(
            "pack-v1-run-far.bin",
            raw(RUNS_AT + 4 + 7, &[1]),
            "it reaches beyond the largest space",
        ),
        damaged("pack-v1-run-kind.bin", raw(RUNS_AT + 4 + 14, &[2]), "unknown kind of run"),
        damaged(
            "pack-v1-frame-long.bin",
            raw(FRAMES_AT + 4 + 8, &[0xff, 0xff, 0xff]),
            "entry 0 of the frame table: compressed, but not shorter for it",
        ),
        damaged(
            "pack-v1-run-empty.bin",
            raw(RUNS_AT + 4 + 2 * 16 + 8, &[0]),
            "entry 2 of the run table: it covers no page",
        ),
        damaged(
            "pack-v1-run-pages.bin",
            raw(RUNS_AT + 4 + 2 * 16 + 8, &[0xff; 4]),
            "pages covered by the runs is 4294967299, the limit is 4294967296",
        ),
        damaged(
            "pack-v1-digests-few.bin",
            with_trailer(&good, |raw| {
                raw[DIGESTS_AT] -= 1;
                raw.truncate(raw.len() - 16);
            }),
            "number of digests is 5, expected 6",
        ),
        damaged(
            "pack-v1-trailer-cut.bin",
            with_trailer(&good, |raw| raw.truncate(raw.len() - 1)),
            "check the pack trailer: data pages is 6, the limit is 5",
        ),
        damaged(
            "pack-v1-trailer-more.bin",
            with_trailer(&good, |raw| raw.push(0)),
            "bytes behind the last table is 1",
        ),
    ]
}

fn damaged_manifests() -> Vec<Damaged> {
    const KIND: &str = "stillpoint-manifest";
    let good = sample_manifest().encode().expect("sound");
    let with = |from, to| replaced(&good, KIND, from, to);
    let later = [b"stillpoint-manifest 2".as_slice(), &good[KIND.len() + 2..]].concat();
    vec![
        damaged("manifest-v1-later.txt", later, "format version 2, this program reads version 1"),
        damaged(
            "manifest-v1-body.txt",
            flipped(&good, good.len() - 10),
            "verify the stillpoint-manifest: the body's digest is",
        ),
        damaged(
            "manifest-v1-cut.txt",
            good[..good.len() - 1].to_vec(),
            "cut short or was added to",
        ),
        damaged("manifest-v1-json.txt", with("{", "["), "parse the body of the manifest"),
        damaged(
            "manifest-v1-parent.txt",
            with("\"parent\": 5", "\"parent\": 7"),
            "parent is not an earlier checkpoint",
        ),
        damaged(
            "manifest-v1-no-parent.txt",
            with("\"parent\": 5", "\"parent\": null"),
            "parent is missing though",
        ),
        damaged(
            "manifest-v1-vm.txt",
            with("\"web-1\"", "\"../web\""),
            "parse the body of the manifest",
        ),
        damaged(
            "manifest-v1-space-kind.txt",
            with("\"kind\": \"ram\"", "\"kind\": \"disk\""),
            "ram:pc.ram is of another kind than its name",
        ),
        damaged(
            "manifest-v1-ram-block.txt",
            with("\"ram_block\": \"pc.ram\"", "\"ram_block\": \"other\""),
            "machine.ram_block is not among the RAM blocks",
        ),
        damaged(
            "manifest-v1-disk-space.txt",
            with("\"space\": \"disk:root\"", "\"space\": \"disk:toor\""),
            "disk root is kept in a space that is not there",
        ),
        damaged(
            "manifest-v1-pack-len.txt",
            with("\"trailer_offset\": ", "\"trailer_offset\": 1"),
            "the record of pack 0000.pack is wrong",
        ),
    ]
}

fn damaged_layers() -> Vec<Damaged> {
    const KIND: &str = "stillpoint-layer";
    let (layer, _) = sample_layer();
    let good = layer.encode().expect("sound");
    let with = |from, to| replaced(&good, KIND, from, to);
    vec![
        damaged(
            "layer-v1-body.txt",
            flipped(&good, good.len() - 10),
            "verify the stillpoint-layer: the body's digest is",
        ),
        damaged(
            "layer-v1-is-manifest.txt",
            sample_manifest().encode().expect("sound"),
            "it begins with",
        ),
        damaged("layer-v1-block-size.txt", with("65536", "65537"), "block_size is not 65536"),
        damaged(
            "layer-v1-blocks.txt",
            with("\"blocks\": 4", "\"blocks\": 5"),
            "table.blocks is another number than the length gives",
        ),
        damaged(
            "layer-v3-later.txt",
            later_layer(),
            "format version 3, this program reads version 2",
        ),
        damaged("layer-v2-huge.txt", huge_sparse_layer(), "table is of more stored blocks"),
        damaged(
            "layer-v1-huge.txt",
            with("\"len\": 196616", "\"len\": 18446744073709551615"),
            "too high",
        ),
    ]
}

/// The sparse sample's body, wrapped as another version.
fn sparse_as(version: u32, change: impl Fn(&str) -> String) -> Vec<u8> {
    let (layer, _) = sample_sparse_layer();
    let file = layer.encode().expect("sound");
    let text = change(std::str::from_utf8(body(&file)).expect("JSON is text"));
    let line = format!(
        "stillpoint-layer {version} {} {}\n",
        ContentDigest::of(text.as_bytes()),
        text.len()
    );
    [line.as_bytes(), text.as_bytes()].concat()
}

fn later_layer() -> Vec<u8> {
    sparse_as(3, str::to_owned)
}

fn huge_sparse_layer() -> Vec<u8> {
    sparse_as(2, |text| text.replacen("\"stored_blocks\": 2", "\"stored_blocks\": 16777217", 1))
}

fn damaged_blocks() -> Vec<Damaged> {
    let (_, good) = sample_layer();
    vec![
        damaged("layer-v1-flipped.blocks", flipped(&good, 20), "verify the block table: digest is"),
        damaged(
            "layer-v1-cut.blocks",
            good[..good.len() - 1].to_vec(),
            "read the block table: it is",
        ),
    ]
}

fn all_files() -> Vec<(&'static str, Vec<u8>)> {
    let damaged = [damaged_packs(), damaged_manifests(), damaged_layers(), damaged_blocks()];
    let damaged = damaged.into_iter().flatten().map(|d| (d.file, d.bytes));
    sound().into_iter().chain(damaged).collect()
}

/// Everything that follows from an error's text: each link of the chain.
fn chain(error: &dyn std::error::Error) -> String {
    let links = std::iter::successors(Some(error), |error| error.source());
    links.map(|error| error.to_string()).collect::<Vec<_>>().join(": ")
}

fn assert_refused<T: std::fmt::Debug, E: std::error::Error + 'static>(
    damaged: &Damaged,
    parse: impl Fn(&[u8]) -> Result<T, E>,
) {
    let error = parse(&read(damaged.file)).expect_err(damaged.file);
    let text = chain(&error);
    assert!(text.contains(damaged.error), "{}: {text:?}", damaged.file);
}

#[test]
fn encoding_gives_the_files_byte_for_byte() {
    let bless = std::env::var_os("STILLPOINT_BLESS").is_some();
    for (file, bytes) in all_files() {
        if bless {
            fs::write(path(file), &bytes).expect("the golden files can be written");
        }
        assert!(read(file) == bytes, "{file} is encoded differently now");
    }
}

#[test]
fn every_golden_file_is_tested() {
    let listed: BTreeSet<_> = all_files().into_iter().map(|(file, _)| file.to_string()).collect();
    let present: BTreeSet<_> = fs::read_dir(path(""))
        .expect("the golden files")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("ASCII"))
        .collect();
    assert_eq!(present, listed);
}

#[test]
fn the_sound_pack_holds_what_was_written() {
    assert_eq!(read_pack(&read(PACK)).expect("sound"), sample_contents());
}

#[test]
fn the_sound_manifest_says_what_was_written() {
    assert_eq!(Manifest::parse(&read(MANIFEST)).expect("sound"), sample_manifest());
}

#[test]
fn the_sound_layer_says_what_was_written() {
    let (expected, _) = sample_layer();
    let layer = LayerManifest::parse(&read(LAYER)).expect("sound");
    assert_eq!(layer, expected);
    let table = layer.parse_table(&read(BLOCKS)).expect("sound");
    let stored: Vec<_> =
        table.stored().map(|(number, at)| (number, layer.owner(at.owner))).collect();
    let (own, other) = (Some(layer.digest), Some(ContentDigest::of(b"another layer")));
    assert_eq!(stored, [(1, own), (2, other), (3, own)]);
}

#[test]
fn the_sound_sparse_layer_says_what_was_written() {
    let (expected, _) = sample_sparse_layer();
    let layer = LayerManifest::parse(&read(LAYER_2)).expect("sound");
    assert_eq!(layer, expected);
    let table = layer.parse_table(&read(BLOCKS_2)).expect("sound");
    assert_eq!(
        table.stored().map(|(number, _)| number).collect::<Vec<_>>(),
        [10_000_000, 10_000_001]
    );
}

#[test]
fn damaged_packs_are_refused() {
    for damaged in damaged_packs() {
        assert_refused(&damaged, read_pack);
    }
}

#[test]
fn damaged_manifests_are_refused() {
    for damaged in damaged_manifests() {
        assert_refused(&damaged, Manifest::parse);
    }
}

#[test]
fn damaged_layers_are_refused() {
    for damaged in damaged_layers() {
        assert_refused(&damaged, LayerManifest::parse);
    }
    let (layer, _) = sample_layer();
    for damaged in damaged_blocks() {
        assert_refused(&damaged, |bytes| layer.parse_table(bytes));
    }
}

#[test]
fn damages_have_distinct_messages() {
    let kinds = [
        damaged_packs()
            .iter()
            .map(|d| chain(&read_pack(&d.bytes).expect_err(d.file)))
            .collect::<Vec<_>>(),
        damaged_manifests()
            .iter()
            .map(|d| chain(&Manifest::parse(&d.bytes).expect_err(d.file)))
            .collect(),
        damaged_layers()
            .iter()
            .map(|d| chain(&LayerManifest::parse(&d.bytes).expect_err(d.file)))
            .collect(),
    ];
    for texts in kinds {
        let distinct: BTreeSet<_> = texts.iter().collect();
        // A frame's header and its content are under one checksum; a run may stray into a foreign
        // frame in two ways.
        assert!(texts.len() - distinct.len() <= 1, "{texts:#?}");
    }
}
