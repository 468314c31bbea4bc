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
use common::index::*;
use common::*;

const PACK: &str = "pack-v1.bin";
const MANIFEST: &str = "manifest-v1.txt";
const LAYER: &str = "layer-v1.txt";
const BLOCKS: &str = "layer-v1.blocks";
const LAYER_2: &str = "layer-v2.txt";
const BLOCKS_2: &str = "layer-v2.blocks";
const MANIFEST_2: &str = "manifest-v2.bin";

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

fn sound() -> [(&'static str, Vec<u8>); 7] {
    let (layer, blocks) = sample_layer();
    let (sparse, sparse_blocks) = sample_sparse_layer();
    [
        (PACK, bytes(&sample_pack(PackId([0xab; 16])))),
        (MANIFEST, sample_manifest().encode().expect("sound")),
        (LAYER, layer.encode().expect("sound")),
        (BLOCKS, blocks),
        (LAYER_2, sparse.encode().expect("sound")),
        (BLOCKS_2, sparse_blocks),
        (MANIFEST_2, sample_file_2()),
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
        damaged("manifest-v1-later.txt", later, "index is missing though the version has one"),
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

/// Of version 2: header line, body and their parts.
fn damaged_manifests_2() -> Vec<Damaged> {
    const KIND: &str = "stillpoint-manifest";
    let good = sample_file_2();
    let head = Manifest::head_len(&good).expect("an index").as_usize();
    let (text, segment) = good.split_at(head);
    let with = |from: &str, to: &str| {
        let text = std::str::from_utf8(body(text)).expect("JSON is text");
        assert!(text.contains(from), "the sample has no {from}");
        let text = text.replacen(from, to, 1);
        let digest = ContentDigest::of(text.as_bytes());
        let line = format!("{KIND} 2 {digest} {}\n", text.len());
        [line.as_bytes(), text.as_bytes(), segment].concat()
    };
    let later = [b"stillpoint-manifest 3".as_slice(), &good[KIND.len() + 2..]].concat();
    let directory = sample_segment().info.directory_len as usize;
    vec![
        damaged("manifest-v3-later.bin", later, "format version 3, this program reads version 2"),
        damaged(
            "manifest-v2-body.bin",
            flipped(&good, head - 10),
            "verify the stillpoint-manifest: the body's digest is",
        ),
        damaged("manifest-v2-head-cut.bin", good[..head - 1].to_vec(), "the file is cut short"),
        damaged(
            "manifest-v2-gap.bin",
            with("5,\n        \"first\"", "4,\n        \"first\""),
            "index is with a gap between its segments",
        ),
        damaged(
            "manifest-v2-order.bin",
            with("\"first\": 2", "\"first\": 6"),
            "index is of segments that don't follow one another",
        ),
        damaged(
            "manifest-v2-no-place.bin",
            with("\"at\": 5000", "\"at\": null"),
            "index is with a segment of which no place is given",
        ),
        damaged(
            "manifest-v2-checkpoints.bin",
            with("\"checkpoints\": 3", "\"checkpoints\": 8"),
            "index.checkpoints is a number that the lineage can't have",
        ),
        damaged(
            "manifest-v2-long.bin",
            with("\"blocks_len\": 40000", "\"blocks_len\": 1099511627776"),
            "index is with a segment that is longer than any",
        ),
        damaged(
            "manifest-v2-directory.bin",
            flipped(&good, head + 10),
            "verify the index directory: checksum is",
        ),
        damaged(
            "manifest-v2-block.bin",
            flipped(&good, head + directory + 10),
            "verify the index block 0: checksum is",
        ),
        damaged("manifest-v2-cut.bin", good[..good.len() - 1].to_vec(), "read the index directory"),
    ]
}

/// Offsets into the raw directory of the sample: names of three spaces, of one pack, then the
/// columns of three blocks.
const INDEX_PACKS_AT: usize = 4 + (2 + 9) + (2 + 10) + (2 + 12);
const INDEX_BLOCKS_AT: usize = INDEX_PACKS_AT + 4 + 1 + (2 + 9);

/// Of version 2: the directory, behind right checksums.
fn damaged_directories() -> Vec<Damaged> {
    let with = |at: usize, value: &'static [u8]| {
        file_of(&resealed(|raw| raw[at..at + value.len()].copy_from_slice(value), |_| ()))
    };
    vec![
        damaged(
            "manifest-v2-spaces-count.bin",
            with(0, &[0xff; 4]),
            "check the index directory: spaces is 4294967295, the limit is",
        ),
        damaged(
            "manifest-v2-space-name.bin",
            with(6, b"cpu"),
            "entry 0 of the space table has an unusable name",
        ),
        damaged(
            "manifest-v2-packs-count.bin",
            with(INDEX_PACKS_AT, &[0xff; 4]),
            "check the index directory: packs is 4294967295, the limit is",
        ),
        damaged(
            "manifest-v2-pack-name.bin",
            with(INDEX_PACKS_AT + 7, b"/"),
            "entry 0 of the pack table has an unusable name",
        ),
        damaged(
            "manifest-v2-blocks-count.bin",
            with(INDEX_BLOCKS_AT, &[0xff; 4]),
            "check the index directory: blocks is 4294967295, the limit is",
        ),
        damaged(
            "manifest-v2-block-space.bin",
            with(INDEX_BLOCKS_AT + 5, &[9]),
            "entry 1 of the block table: its space is not in the list",
        ),
        damaged(
            "manifest-v2-directory-more.bin",
            file_of(&resealed(|raw| raw.push(0), |_| ())),
            "bytes behind the last column is 1",
        ),
        damaged(
            "manifest-v2-directory-short.bin",
            file_of(&resealed(|raw| raw.truncate(raw.len() - 1), |_| ())),
            "parse the index directory: it ends before",
        ),
    ]
}

/// Of version 2: the first block, behind right checksums. It has a page of data, a zero page, and
/// the zeros that its space grew by; its fields are counted from the end.
fn damaged_index_blocks() -> Vec<Damaged> {
    let from_end = |back: usize, value: u8| {
        file_of(&resealed(
            |_| (),
            |raw| {
                let at = raw.len() - back;
                raw[at] = value;
            },
        ))
    };
    let with = |change: fn(&mut Vec<u8>)| file_of(&resealed(|_| (), change));
    vec![
        damaged(
            "manifest-v2-frames-count.bin",
            with(|raw| raw[..4].fill(0xff)),
            "check the index block 0: frames is 4294967295, the limit is 4096",
        ),
        damaged(
            "manifest-v2-runs-count.bin",
            with(|raw| raw[4..8].fill(0xff)),
            "check the index block 0: runs is 4294967295, the limit is 16384",
        ),
        damaged(
            "manifest-v2-frame-pack.bin",
            with(|raw| raw[8] = 1),
            "its pack is not in the list",
        ),
        damaged(
            "manifest-v2-frame-codec.bin",
            from_end(32, 7),
            "entry 0 of the frame table: unknown codec",
        ),
        damaged(
            "manifest-v2-frame-unused.bin",
            from_end(5, 1),
            "entry 0 of the frame table: no run is in it",
        ),
        damaged(
            "manifest-v2-run-kind.bin",
            from_end(4, 9),
            "entry 1 of the run table: unknown kind of run",
        ),
        damaged(
            "manifest-v2-run-frame.bin",
            from_end(2, 5),
            "entry 0 of the run table: it has no frame",
        ),
        damaged(
            "manifest-v2-run-slot.bin",
            from_end(1, 1),
            "entry 0 of the run table: it reaches beyond its frame",
        ),
        damaged(
            "manifest-v2-run-far.bin",
            from_end(14, 100),
            "entry 2 of the run table: it reaches beyond its block",
        ),
        damaged(
            "manifest-v2-run-first.bin",
            with(|raw| {
                let at = raw.len() - 15;
                raw[at] = 1;
                raw[at + 1] -= 1;
            }),
            "entry 3 of the run table: the runs don't fill the block",
        ),
        damaged(
            "manifest-v2-block-more.bin",
            with(|raw| raw.push(0)),
            "check the index block 0: bytes behind the last column is 1",
        ),
        damaged(
            "manifest-v2-block-short.bin",
            with(|raw| raw.truncate(raw.len() - 1)),
            "parse the index block 0: it ends before",
        ),
    ]
}

fn damaged_files_2() -> Vec<Damaged> {
    [damaged_manifests_2(), damaged_directories(), damaged_index_blocks()]
        .into_iter()
        .flatten()
        .collect()
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
    let damaged = [
        damaged_packs(),
        damaged_manifests(),
        damaged_files_2(),
        damaged_layers(),
        damaged_blocks(),
    ];
    let damaged = damaged.into_iter().flatten().map(|d| (d.file, d.bytes));
    sound().into_iter().chain(damaged).collect()
}

/// Everything that follows from an error's text: each link of the chain.
fn chain(error: &dyn std::error::Error) -> String {
    let links = std::iter::successors(Some(error), |error| error.source());
    links.map(|error| error.to_string()).collect::<Vec<_>>().join(": ")
}

fn assert_refused<T: std::fmt::Debug, E: Into<Box<dyn std::error::Error>>>(
    damaged: &Damaged,
    parse: impl Fn(&[u8]) -> Result<T, E>,
) {
    let error = parse(&read(damaged.file)).err().map(Into::into).expect(damaged.file);
    let text = chain(&*error);
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
fn the_sound_index_says_what_was_written() {
    let file = read(MANIFEST_2);
    assert_eq!(Manifest::parse(&file).expect("sound"), sample_manifest_2());
    let frames: Vec<u64> = sample_index().frames().iter().map(|frame| frame.offset.0).collect();
    let at = |run: &PlacedRun| (run.pages.start.0, run.pages.end.0);
    let places: Vec<_> = read_file_2(&file)
        .expect("sound")
        .iter()
        .map(|run| match run.content {
            Placed::Unknown => (at(run), "unknown", 0, 0),
            Placed::Zero => (at(run), "zero", 0, 0),
            Placed::Data { frame, first_slot, .. } => {
                (at(run), "data", frame.offset.0, first_slot.0)
            }
        })
        .collect();
    assert_eq!(
        places,
        [
            ((7, 8), "data", frames[1], 0),
            ((100, 101), "zero", 0, 0),
            ((200_000, 262_144), "zero", 0, 0),
            ((0, 1), "data", frames[0], 0),
            ((1, 2), "data", frames[2], 0),
            ((5, 6), "data", frames[0], 2),
            ((6, 16), "zero", 0, 0),
            ((0, 4), "unknown", 0, 0),
        ]
    );
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
fn damaged_indexes_are_refused() {
    for damaged in damaged_files_2() {
        assert_refused(&damaged, read_file_2);
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
        damaged_files_2()
            .iter()
            .map(|d| chain(&*read_file_2(&d.bytes).expect_err(d.file)))
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
