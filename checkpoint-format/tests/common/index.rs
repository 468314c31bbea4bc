//! The sample of a manifest with an index, and damaged ones.

use super::{bytes, name, range, sample_manifest, sample_pack};
use checkpoint_format::*;

pub(crate) fn sample_spaces_now() -> Vec<(SpaceName, PageCount)> {
    [("ram:pc.ram", 16_384), ("disk:root", 262_144), ("state:device", 4)]
        .map(|(space, pages)| (name(space), PageCount(pages)))
        .to_vec()
}

pub(crate) fn sample_index() -> PackIndex {
    let pack = sample_pack(PackId([0xab; 16]));
    let range = pack.info.footer().trailer_range();
    let trailer = &bytes(&pack)[range.start as usize..range.end as usize];
    pack.info.parse_index(trailer).expect("sound")
}

/// Of a checkpoint that grew `disk:root`, and whose parent had no device state: runs of all kinds.
pub(crate) fn sample_segment() -> EncodedSegment {
    let parent = [("ram:pc.ram", 16_384), ("disk:root", 200_000)]
        .map(|(space, pages)| (name(space), PageCount(pages)));
    let place = PackPlace {
        checkpoint: CheckpointId(7),
        name: PackName::new("0000.pack").expect("a good name"),
    };
    let mut records = Records::new(Some(&parent));
    records.begin_checkpoint(&sample_spaces_now());
    records.apply_pack(place, &sample_index()).expect("one pack");
    records.encode().expect("small")
}

pub(crate) fn sample_manifest_with(info: SegmentInfo) -> Manifest {
    let own = SegmentRecord { id: CheckpointId(7), first: CheckpointId(7), at: None, info };
    let older = SegmentRecord {
        id: CheckpointId(5),
        first: CheckpointId(2),
        at: Some(ByteOffset(5_000)),
        info: SegmentInfo {
            directory_len: 100,
            directory_raw_len: 200,
            directory_checksum: Checksum([7; 16]),
            blocks_len: ByteLen(40_000),
        },
    };
    let index = IndexRecord { checkpoints: 3, segments: vec![own, older] };
    Manifest { index: Some(index), ..sample_manifest() }
}

pub(crate) fn sample_manifest_2() -> Manifest {
    sample_manifest_with(sample_segment().info)
}

/// The whole file.
pub(crate) fn sample_file_2() -> Vec<u8> {
    file_of(&sample_segment())
}

pub(crate) fn file_of(segment: &EncodedSegment) -> Vec<u8> {
    let manifest = sample_manifest_with(segment.info).encode().expect("sound");
    [manifest, segment.bytes.clone()].concat()
}

/// Manifest, directory and every block of a file, as a reader reads them.
pub(crate) fn read_file_2(file: &[u8]) -> Result<Vec<PlacedRun>, Box<dyn std::error::Error>> {
    let manifest = Manifest::parse(file)?;
    let head = Manifest::head_len(file).ok_or("no index")?.as_usize();
    let own = manifest.index.as_ref().and_then(IndexRecord::own).ok_or("no index")?;
    let segment = Segment::new(&file[head..], &own.info)?;
    let mut runs = Vec::new();
    for space in segment.directory().spaces() {
        let all = range(0, MAX_SPACE_PAGES);
        for run in segment.runs(space, all) {
            runs.push(run?);
        }
    }
    Ok(runs)
}

/// The sample with its directory or its first block changed before compression, and every length
/// and checksum right again.
pub(crate) fn resealed(
    directory: impl FnOnce(&mut Vec<u8>),
    block: impl FnOnce(&mut Vec<u8>),
) -> EncodedSegment {
    let EncodedSegment { bytes, info } = sample_segment();
    let (stored, blocks) = bytes.split_at(info.directory_len as usize);
    let parsed = IndexDirectory::parse(stored, &info).expect("sound");
    let rows = parsed.blocks();
    let raw = |stored: &[u8]| zstd::bulk::decompress(stored, 1 << 20).expect("sound");
    let of =
        |row: &BlockRow| &blocks[row.byte_range().start as usize..row.byte_range().end as usize];
    let mut first = raw(of(&rows[0]));
    block(&mut first);
    let first_stored = zstd::bulk::compress(&first, 1).expect("small");
    let mut table = raw(stored);
    seal_first_row(&mut table, rows, &first, &first_stored);
    directory(&mut table);
    let stored = zstd::bulk::compress(&table, 1).expect("small");
    let blocks = [&first_stored, &blocks[rows[0].byte_range().end as usize..]].concat();
    let info = SegmentInfo {
        directory_len: stored.len() as u32,
        directory_raw_len: table.len() as u32,
        directory_checksum: Checksum::of(&stored),
        blocks_len: ByteLen(blocks.len() as u64),
    };
    EncodedSegment { bytes: [stored, blocks].concat(), info }
}

/// Stored lengths, lengths and checksums are the last columns of the directory; in the sample each
/// length takes two bytes at most.
fn seal_first_row(table: &mut Vec<u8>, rows: &[BlockRow], raw: &[u8], stored: &[u8]) {
    let varint = |value: u32| match value {
        0..128 => vec![value as u8],
        _ => vec![(value & 0x7f | 0x80) as u8, (value >> 7) as u8],
    };
    let column = |first: u32, others: fn(&BlockRow) -> u32| {
        let lengths = std::iter::once(first).chain(rows[1..].iter().map(others));
        lengths.flat_map(varint).collect::<Vec<u8>>()
    };
    let old: usize =
        rows.iter().map(|row| varint(row.stored_len).len() + varint(row.raw_len).len() + 16).sum();
    table.truncate(table.len() - old);
    table.extend(column(stored.len() as u32, |row| row.stored_len));
    table.extend(column(raw.len() as u32, |row| row.raw_len));
    table.extend(Checksum::of(stored).0);
    rows[1..].iter().for_each(|row| table.extend(row.checksum.0));
}
