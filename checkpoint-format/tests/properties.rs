//! Random input against naive oracles, and hostile input against everything that parses.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use checkpoint_format::*;
use common::index::{file_of, read_file_2, resealed, sample_file_2};
use common::*;
use proptest::prelude::*;

const SIZE: u64 = 300;

#[derive(Clone, Debug)]
enum SetOp {
    Insert(PageRange),
    Remove(PageRange),
    Union(Vec<u64>),
    Subtract(Vec<u64>),
    Intersect(Vec<u64>),
    Clear,
}

fn any_range(size: u64) -> impl Strategy<Value = PageRange> {
    (0..=size, 0..=size).prop_map(|(start, end)| range(start, end))
}

fn any_set_op() -> impl Strategy<Value = SetOp> {
    let pages = || prop::collection::vec(0..SIZE, 0..200);
    prop_oneof![
        4 => any_range(SIZE).prop_map(SetOp::Insert),
        3 => any_range(2 * SIZE).prop_map(SetOp::Remove),
        1 => pages().prop_map(SetOp::Union),
        1 => pages().prop_map(SetOp::Subtract),
        1 => pages().prop_map(SetOp::Intersect),
        1 => Just(SetOp::Clear),
    ]
}

fn page_set(pages: &[u64]) -> PageSet {
    let mut set = PageSet::new(PageCount(SIZE));
    pages.iter().for_each(|&page| set.insert(PageIndex(page)));
    set
}

fn apply(op: &SetOp, set: &mut PageSet, naive: &mut BTreeSet<u64>) {
    match op {
        SetOp::Insert(range) => {
            set.insert_range(*range);
            naive.extend(range.iter().map(PageIndex::get));
        }
        SetOp::Remove(range) => {
            set.remove_range(*range);
            naive.retain(|&page| !range.contains(PageIndex(page)));
        }
        SetOp::Union(pages) => {
            set.union_with(&page_set(pages));
            naive.extend(pages);
        }
        SetOp::Subtract(pages) => {
            set.subtract(&page_set(pages));
            naive.retain(|page| !pages.contains(page));
        }
        SetOp::Intersect(pages) => {
            set.intersect_with(&page_set(pages));
            naive.retain(|page| pages.contains(page));
        }
        SetOp::Clear => {
            set.clear();
            naive.clear();
        }
    }
}

proptest! {
    #[test]
    fn a_page_set_is_a_set(ops in prop::collection::vec(any_set_op(), 0..20)) {
        let mut set = PageSet::new(PageCount(SIZE));
        let mut naive = BTreeSet::new();
        for op in &ops {
            apply(op, &mut set, &mut naive);
            let pages: Vec<_> = set.iter().map(PageIndex::get).collect();
            prop_assert_eq!(&pages, &naive.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count().0, naive.len() as u64);
            prop_assert_eq!(set.is_empty(), naive.is_empty());
            prop_assert!((0..2 * SIZE).all(|page| set.contains(PageIndex(page)) == naive.contains(&page)));
            // Ranges are maximal: two never touch.
            let ranges: Vec<_> = set.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}

/// One step in the filling of a pack.
#[derive(Clone, Debug)]
enum Record {
    Zero { space: usize, pages: PageRange },
    Frame { space: usize, pages: BTreeMap<u64, u8> },
}

const SPACES: [&str; 3] = ["ram:a", "ram:b", "disk:c"];

fn any_record() -> impl Strategy<Value = Record> {
    let space = 0..SPACES.len();
    let pages = prop::collection::btree_map(0..SIZE, any::<u8>(), 1..=FRAME_PAGES);
    prop_oneof![
        (space.clone(), any_range(SIZE)).prop_map(|(space, pages)| Record::Zero { space, pages }),
        (space, pages).prop_map(|(space, pages)| Record::Frame { space, pages }),
    ]
}

fn any_pack() -> impl Strategy<Value = Vec<Record>> {
    prop::collection::vec(any_record(), 0..6)
}

fn content(seed: u8) -> Vec<u8> {
    if seed.is_multiple_of(4) { noise(seed) } else { dull(seed) }
}

fn build(records: &[Record]) -> FinishedPack {
    let spaces = SpaceTable::new(SPACES.map(name)).expect("three spaces");
    let id = |space: &usize| spaces.id(&name(SPACES[*space])).expect("in the table");
    let mut pack = PackBuilder::new(PackId([3; 16]), &spaces);
    for record in records {
        match record {
            Record::Zero { space, pages } => pack.push_zero(id(space), *pages).expect("room"),
            Record::Frame { space, pages } => {
                let pages: Vec<_> =
                    pages.iter().map(|(&page, &seed)| (page, content(seed))).collect();
                pack.push_frame(encode(id(space), &pages)).expect("room");
            }
        }
    }
    pack.finish().expect("small")
}

/// What the records say, one page at a time: `None` stands for zeros.
fn replay(records: &[Record], state: &mut BTreeMap<(usize, u64), Option<u8>>) {
    for record in records {
        match record {
            Record::Zero { space, pages } => {
                state.extend(pages.iter().map(|page| ((*space, page.0), None)));
            }
            Record::Frame { space, pages } => {
                state.extend(pages.iter().map(|(&page, &seed)| ((*space, page), Some(seed))));
            }
        }
    }
}

fn expected_content(seed: Option<u8>) -> Vec<u8> {
    seed.map_or_else(|| vec![0; PAGE_SIZE], content)
}

fn index_of(pack: &FinishedPack) -> PackIndex {
    pack.info.parse_index(&pack.chunks[pack.chunks.len() - 2]).expect("sound")
}

proptest! {
    #[test]
    fn pack_returns_the_records_put_into_it(records in any_pack()) {
        let pack = build(&records);
        let file = bytes(&pack);
        prop_assert_eq!(file.len() as u64, pack.info.len.0);
        let mut naive = BTreeMap::new();
        replay(&records, &mut naive);
        let expected: Contents = naive
            .into_iter()
            .map(|((space, page), seed)| ((name(SPACES[space]), PageIndex(page)), expected_content(seed)))
            .collect();
        prop_assert!(read_pack(&file).expect("sound") == expected);
    }

    #[test]
    fn each_data_page_has_the_digest_of_its_content(records in any_pack()) {
        let pack = build(&records);
        let index = index_of(&pack);
        for run in index.runs() {
            let RunSource::Frame { frame, first_slot } = run.source else { continue };
            let entry = index.frame(frame).expect("a frame of the pack");
            // Frame n is chunk n + 1, behind the header.
            let raw = entry.decode(&pack.chunks[frame.as_usize() + 1]).expect("sound");
            let pages = raw.chunks(PAGE_SIZE).skip(first_slot.as_usize());
            for (digest, page) in index.run_digests(run).iter().zip(pages) {
                prop_assert_eq!(*digest, PageDigest::of(page));
            }
        }
    }

    #[test]
    fn raw_bytes_are_what_no_compression_would_cost(records in any_pack()) {
        let pack = build(&records);
        let frames = index_of(&pack).frames().to_vec();
        let content: usize = frames.iter().map(|frame| frame.raw_len() + FRAME_HEADER_LEN).sum();
        let fixed = HEADER_LEN + FOOTER_LEN + pack.info.trailer_raw_len as usize;
        prop_assert_eq!(pack.info.raw_bytes.0, (content + fixed) as u64);
    }

    /// The headline: the map over a lineage restores what a page-by-page replay gives, sizes
    /// changing on the way.
    #[test]
    fn a_page_map_is_a_replay(
        lineage in prop::collection::vec((any_pack(), 1..SIZE), 1..6),
    ) {
        let packs: Vec<_> = lineage.iter().map(|(records, _)| build(records)).collect();
        let mut map = PageMap::new(name(SPACES[0]), PageCount(lineage[0].1));
        let mut naive: BTreeMap<(usize, u64), Option<u8>> = BTreeMap::new();
        let mut size = lineage[0].1;
        for (number, ((records, new_size), pack)) in (0..).zip(lineage.iter().zip(&packs)) {
            map.resize(PageCount(*new_size));
            naive.retain(|&(space, page), _| space == 0 && page < *new_size);
            naive.extend((size..*new_size).map(|page| ((0, page), None)));
            size = *new_size;
            map.apply_pack(PackNo(number), &index_of(pack)).expect("in order");
            replay(records, &mut naive);
            naive.retain(|&(space, page), _| space == 0 && page < size);
        }
        prop_assert!(restored(&map, &packs) == naive_pages(&naive, size));
        let covered: u64 = map.runs().map(|run| run.pages.len().0).sum();
        prop_assert_eq!(covered, size);
    }
}

fn naive_pages(naive: &BTreeMap<(usize, u64), Option<u8>>, size: u64) -> Vec<Option<Vec<u8>>> {
    (0..size).map(|page| naive.get(&(0, page)).map(|&seed| expected_content(seed))).collect()
}

/// Restores a space as the binary does: zeros, then each frame once. Checks that no page is written
/// twice.
fn restored(map: &PageMap, packs: &[FinishedPack]) -> Vec<Option<Vec<u8>>> {
    let mut pages = vec![None; map.size().as_usize()];
    let mut put = |page: PageIndex, content: Vec<u8>| {
        let before = pages[page.as_usize()].replace(content);
        assert!(before.is_none(), "page {page} is written twice");
    };
    for page in map.zeros().flat_map(PageRange::iter) {
        put(page, vec![0; PAGE_SIZE]);
    }
    let mut seen = BTreeSet::new();
    for read in map.frame_reads() {
        assert!(seen.insert((read.pack, read.frame)), "{read:?} is read twice");
        let pack = &packs[read.pack.as_usize()];
        let entry = *index_of(pack).frame(read.frame).expect("a frame of the pack");
        let raw = entry.decode(&pack.chunks[read.frame.as_usize() + 1]).expect("sound");
        for part in read.parts {
            let content = raw.chunks(PAGE_SIZE).skip(part.first_slot.as_usize());
            for (page, content) in part.pages.iter().zip(content) {
                put(page, content.to_vec());
            }
        }
    }
    pages
}

/// A byte string with a few places overwritten.
fn mutate(bytes: &mut [u8], changes: &[(prop::sample::Index, u8)]) {
    for (at, value) in changes {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    // Zeros and ones are where counts, kinds and limits break.
    let value = prop_oneof![any::<u8>(), Just(0), Just(1), Just(0xff), Just(b'"'), Just(b'9')];
    prop::collection::vec((any::<prop::sample::Index>(), value), 1..6)
}

/// What is said about a parsed manifest must also hold when it is written and read again.
fn parse_everything(bytes: &[u8]) {
    let _ = PackHeader::parse(bytes);
    let _ = PackFooter::parse(bytes);
    let _ = read_pack(bytes);
    if let Ok(manifest) = Manifest::parse(bytes) {
        let again = manifest.encode().expect("what was read can be written");
        assert_eq!(Manifest::parse(&again).expect("and read"), manifest);
    }
    let _ = read_file_2(bytes);
    let (layer, _) = sample_layer();
    let _ = layer.parse_table(bytes);
    if let Ok(layer) = LayerManifest::parse(bytes) {
        layer.encode().expect("what was read can be written");
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        parse_everything(&bytes);
    }

    #[test]
    fn changed_files_never_panic(changes in changes(), cut in any::<prop::sample::Index>()) {
        let (layer, blocks) = sample_layer();
        let files = [
            bytes(&sample_pack(PackId([5; 16]))),
            sample_manifest().encode().expect("sound"),
            sample_file_2(),
            layer.encode().expect("sound"),
            blocks,
        ];
        for mut file in files {
            mutate(&mut file, &changes);
            parse_everything(&file);
            parse_everything(&file[..cut.index(file.len())]);
        }
    }

    /// Behind a right checksum, where the parser itself has to stand.
    #[test]
    fn changed_trailers_never_panic(changes in changes(), cut in prop::option::of(any::<prop::sample::Index>())) {
        let good = bytes(&sample_pack(PackId([5; 16])));
        let bad = with_trailer(&good, |raw| {
            mutate(raw, &changes);
            if let Some(cut) = cut {
                raw.truncate(cut.index(raw.len()));
            }
        });
        let footer = PackFooter::parse(&bad[bad.len() - FOOTER_LEN..]).expect("sound");
        let trailer = footer.trailer_range();
        let trailer = &bad[trailer.start as usize..trailer.end as usize];
        if let Ok(index) = PackIndex::parse(trailer, &footer) {
            let mut map = PageMap::new(name("ram:pc.ram"), PageCount(1000));
            map.apply_pack(PackNo(0), &index).expect("in order");
            prop_assert!(map.frame_reads().iter().all(|read| index.frame(read.frame).is_some()));
            let mut table = DigestTable::dense(PageCount(1000));
            table.apply_pack(&name("ram:pc.ram"), &index);
        }
    }

    /// The directory or a block of an index behind right checksums.
    #[test]
    fn changed_segments_never_panic(changes in changes(), in_block in any::<bool>()) {
        let change = |raw: &mut Vec<u8>| mutate(raw, &changes);
        let segment = if in_block { resealed(|_| (), change) } else { resealed(change, |_| ()) };
        let _ = read_file_2(&file_of(&segment));
        if let Ok(segment) = Segment::new(&segment.bytes, &segment.info) {
            let spaces = [(name("disk:root"), PageCount(262_144)), (name("ram:pc.ram"), PageCount(9))];
            let _ = merge_segments(&[segment.clone(), segment], &spaces, false);
        }
    }

    #[test]
    fn changed_bodies_never_panic(changes in changes()) {
        let (layer, _) = sample_layer();
        let files = [
            ("stillpoint-manifest", sample_manifest().encode().expect("sound")),
            ("stillpoint-layer", layer.encode().expect("sound")),
        ];
        for (kind, file) in files {
            let mut body = body(&file).to_vec();
            mutate(&mut body, &changes);
            parse_everything(&envelope(kind, &body));
        }
    }

    /// The columns of a block table behind right digests, with a manifest that is right about them.
    #[test]
    fn changed_block_tables_never_panic(changes in changes()) {
        for (mut layer, file) in [sample_layer(), sample_sparse_layer()] {
            let mut raw = zstd::bulk::decompress(&file[8..], 1 << 20).expect("sound");
            mutate(&mut raw, &changes);
            let stored = zstd::bulk::compress(&raw, 1).expect("small");
            let bad = [&file[..8], &stored].concat();
            layer.table.len = ByteLen(bad.len() as u64);
            layer.table.digest = ContentDigest::of(&bad);
            if let Ok(table) = layer.parse_table(&bad) {
                prop_assert!(table.stored().all(|(_, at)| layer.owner(at.owner).is_some()));
                prop_assert!(table.stored().all(|(number, _)| number < layer.blocks()));
            }
        }
    }
}
