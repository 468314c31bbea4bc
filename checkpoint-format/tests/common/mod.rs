//! The sample files of the golden and property tests, always the same bytes.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod index;

use std::collections::BTreeMap;

use checkpoint_format::*;

/// Page content by space and page.
pub(crate) type Contents = BTreeMap<(SpaceName, PageIndex), Vec<u8>>;

pub(crate) fn name(text: &str) -> SpaceName {
    text.parse().expect("a good space name")
}

pub(crate) fn range(start: u64, end: u64) -> PageRange {
    PageRange::new(PageIndex(start), PageIndex(end))
}

/// A page that compresses well.
pub(crate) fn dull(seed: u8) -> Vec<u8> {
    (0..PAGE_SIZE).map(|at| seed ^ (at / 256) as u8).collect()
}

/// A page that doesn't compress.
pub(crate) fn noise(seed: u8) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[seed]).finalize_xof().fill(&mut page);
    page
}

pub(crate) fn encode(space: SpaceId, pages: &[(u64, Vec<u8>)]) -> EncodedFrame {
    let digests: Vec<_> =
        pages.iter().map(|(page, content)| (PageIndex(*page), PageDigest::of(content))).collect();
    let raw = pages.iter().flat_map(|(_, content)| content.iter().copied());
    let raw: Vec<u8> = raw.collect();
    EncodedFrame::encode(space, &digests, &raw, ZSTD_LEVEL).expect("good pages")
}

pub(crate) fn bytes(pack: &FinishedPack) -> Vec<u8> {
    pack.chunks.concat()
}

pub(crate) fn sample_spaces() -> SpaceTable {
    SpaceTable::new(["ram:pc.ram", "disk:root", "state:device"].map(name)).expect("three spaces")
}

/// Frames of all kinds, zero runs, and pages that are recorded twice.
pub(crate) fn sample_pack(id: PackId) -> FinishedPack {
    let spaces = sample_spaces();
    let id_of = |space: &str| spaces.id(&name(space)).expect("in the table");
    let (ram, disk) = (id_of("ram:pc.ram"), id_of("disk:root"));
    let mut pack = PackBuilder::new(id, &spaces);
    let add = |pack: &mut PackBuilder, frame| pack.push_frame(frame).expect("room");
    add(&mut pack, encode(ram, &[(0, dull(1)), (1, dull(2)), (5, dull(3)), (6, dull(4))]));
    pack.push_zero(ram, range(6, 16)).expect("room");
    add(&mut pack, encode(disk, &[(7, noise(1))]));
    add(&mut pack, encode(ram, &[(1, dull(9))]));
    pack.push_zero(disk, range(100, 101)).expect("room");
    pack.finish().expect("small")
}

/// What [`sample_pack`] holds.
pub(crate) fn sample_contents() -> Contents {
    let (ram, disk) = (name("ram:pc.ram"), name("disk:root"));
    let zero = || vec![0; PAGE_SIZE];
    let mut all: Contents = (6..16).map(|page| ((ram.clone(), PageIndex(page)), zero())).collect();
    for (page, content) in [(0, dull(1)), (1, dull(9)), (5, dull(3))] {
        all.insert((ram.clone(), PageIndex(page)), content);
    }
    all.insert((disk.clone(), PageIndex(7)), noise(1));
    all.insert((disk, PageIndex(100)), zero());
    all
}

/// Reads a whole pack as a restore would: from its end to its frames.
pub(crate) fn read_pack(file: &[u8]) -> Result<Contents, PackError> {
    let at = |range: std::ops::Range<u64>| {
        let end = (range.end as usize).min(file.len());
        &file[(range.start as usize).min(end)..end]
    };
    let len = file.len() as u64;
    PackHeader::parse(at(0..HEADER_LEN as u64))?;
    let footer = PackFooter::parse(at(len.saturating_sub(FOOTER_LEN as u64)..len))?;
    let index = PackIndex::parse(at(footer.trailer_range()), &footer)?;
    let frames: Result<Vec<_>, _> =
        index.frames().iter().map(|frame| frame.decode(at(frame.byte_range()))).collect();
    Ok(contents(&index, &frames?))
}

fn contents(index: &PackIndex, frames: &[Vec<u8>]) -> Contents {
    let mut all = Contents::new();
    for run in index.runs() {
        for (nth, page) in run.pages.iter().enumerate() {
            let content = match run.source {
                RunSource::Zero => vec![0; PAGE_SIZE],
                RunSource::Frame { frame, first_slot } => {
                    let start = (first_slot.as_usize() + nth) * PAGE_SIZE;
                    frames[frame.as_usize()][start..start + PAGE_SIZE].to_vec()
                }
            };
            all.insert((index.space_name(run.space).clone(), page), content);
        }
    }
    all
}

pub(crate) fn sample_pack_record() -> PackRecord {
    PackRecord {
        name: PackName::new("0000.pack").expect("a good name"),
        info: sample_pack(PackId([0xab; 16])).info,
        replicas: Some(3),
    }
}

pub(crate) fn sample_manifest() -> Manifest {
    let space = |text, bytes| SpaceRecord::new(name(text), ByteLen(bytes));
    Manifest {
        vm: VmName::new("web-1").expect("a good name"),
        id: CheckpointId(7),
        parent: Some(CheckpointId(5)),
        kind: CheckpointKind::Incremental,
        epoch: Epoch(2),
        instance: "6f1e9b52".into(),
        created_at: "2026-01-31T23:59:59.250Z".into(),
        stillpoint_version: "0.1.0".into(),
        vm_record: sample_vm(),
        run_state: None,
        spaces: vec![
            space("ram:pc.ram", 64 << 20),
            space("disk:root", 1 << 30),
            space("state:device", 12345),
        ],
        ram_blocks: vec![RamBlockRecord {
            name: "pc.ram".into(),
            used: ByteLen(64 << 20),
            total: ByteLen(64 << 20),
            page_size: ByteLen(4096),
            shared: true,
        }],
        disks: sample_disks(),
        packs: vec![sample_pack_record()],
        index: None,
        totals: Totals {
            pages_dirty: PageCount(20),
            bytes_changed: ByteLen(81920),
            bytes_stored_raw: ByteLen(30000),
            bytes_stored: ByteLen(5000),
        },
    }
}

fn sample_vm() -> VmRecord {
    VmRecord {
        qemu_version: "10.0.2".into(),
        program: "/usr/bin/qemu-system-x86_64".into(),
        machine_type: "pc-q35-10.0".into(),
        accelerator: "tcg".into(),
        arguments: vec!["-nodefaults".into(), "-name".into(), "a \"quoted\" näme".into()],
        vcpus: 2,
        ram_bytes: ByteLen(64 << 20),
        ram_block: "pc.ram".into(),
        directory: "/srv/vm".into(),
        files: vec![LayerRef {
            digest: ContentDigest::of(b"kernel"),
            form: DigestForm::Content,
            len: ByteLen(8_000_000),
            format: "raw".into(),
            path: "vmlinuz".into(),
        }],
    }
}

fn sample_disks() -> Vec<DiskRecord> {
    let base = LayerRef {
        digest: ContentDigest::of(b"base"),
        form: DigestForm::Content,
        len: ByteLen(196_616),
        format: "qcow2".into(),
        path: "/images/base.qcow2".into(),
    };
    let writable = DiskRecord {
        node: "root".into(),
        space: Some(name("disk:root")),
        read_only: false,
        format: "qcow2".into(),
        virtual_size: ByteLen(1 << 30),
        file: "/images/root.qcow2".into(),
        backing: vec![base.clone()],
        qcow2: None,
    };
    let read_only = DiskRecord {
        node: "cd".into(),
        space: None,
        read_only: true,
        format: "raw".into(),
        virtual_size: ByteLen(2048),
        file: "/images/cd.iso".into(),
        backing: vec![base],
        qcow2: None,
    };
    vec![writable, read_only]
}

/// A layer of four blocks: zero, its own, another layer's, its own and short.
pub(crate) fn sample_layer() -> (LayerManifest, Vec<u8>) {
    let mut table = BlockTableBuilder::new();
    let digest = ContentDigest::of;
    let home = BlockHome { layer: digest(b"another layer"), pack: PackNo(3), frame: FrameNo(14) };
    table.push_zeros(1).expect("room");
    table.push_own(digest(b"one"), PackNo(0), FrameNo(0)).expect("room");
    table.push_shared(digest(b"two"), home).expect("room");
    table.push_own(digest(b"three"), PackNo(0), FrameNo(1)).expect("room");
    let (table, owners) = table.finish();
    let (file, info) = table.encode(DigestForm::Content).expect("small");
    let len = ByteLen(3 * BLOCK_SIZE as u64 + 8);
    let packs = vec![sample_pack_record()];
    (LayerManifest::new(digest(b"base"), len, packs, owners, info), file)
}

/// A layer of version 2: one block of its own and one of another layer in a terabyte and a half of
/// zeros.
pub(crate) fn sample_sparse_layer() -> (LayerManifest, Vec<u8>) {
    let mut table = BlockTableBuilder::new();
    let digest = ContentDigest::of;
    let home = BlockHome { layer: digest(b"another layer"), pack: PackNo(3), frame: FrameNo(14) };
    table.push_zeros(10_000_000).expect("room");
    table.push_own(digest(b"one"), PackNo(0), FrameNo(0)).expect("room");
    table.push_shared(digest(b"two"), home).expect("room");
    table.push_zeros(15_000_000).expect("room");
    let len = ByteLen(table.blocks() * BLOCK_SIZE as u64 - 100);
    let (table, owners) = table.finish();
    let (file, info) = table.encode(DigestForm::Blocks).expect("small");
    let layer =
        LayerManifest::new(table.digest(len), len, vec![sample_pack_record()], owners, info);
    (layer.with_form(DigestForm::Blocks), file)
}

/// Wraps a body as the text files are wrapped, so that what lies behind the digest can be tested.
pub(crate) fn envelope(kind: &str, body: &[u8]) -> Vec<u8> {
    let line = format!("{kind} 1 {} {}\n", ContentDigest::of(body), body.len());
    [line.as_bytes(), body].concat()
}

/// The body behind the header line.
pub(crate) fn body(file: &[u8]) -> &[u8] {
    let end = file.iter().position(|&byte| byte == b'\n').expect("a header line");
    &file[end + 1..]
}

/// The pack with its trailer changed before compression, and every checksum right again.
pub(crate) fn with_trailer(pack: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let footer = PackFooter::parse(&pack[pack.len() - FOOTER_LEN..]).expect("sound");
    let frames_end = footer.trailer_offset.as_usize();
    let trailer = footer.trailer_range();
    let stored = &pack[trailer.start as usize..trailer.end as usize];
    let mut raw = zstd::bulk::decompress(stored, 1 << 20).expect("sound");
    change(&mut raw);
    let stored = zstd::bulk::compress(&raw, 1).expect("small");
    let len = frames_end + stored.len() + FOOTER_LEN;
    let mut file = [&pack[..frames_end], &stored].concat();
    file.extend(footer_bytes(frames_end, &stored, raw.len(), len));
    file
}

/// A footer laid out by hand, as `docs/format.md` has it.
fn footer_bytes(offset: usize, stored: &[u8], raw_len: usize, len: usize) -> Vec<u8> {
    let mut footer = b"STLPFOOT".to_vec();
    footer.extend((offset as u64).to_le_bytes());
    footer.extend((stored.len() as u32).to_le_bytes());
    footer.extend((raw_len as u32).to_le_bytes());
    footer.extend(Checksum::of(stored).0);
    footer.extend((len as u64).to_le_bytes());
    footer.extend(Checksum::of(&footer).0);
    footer
}
