use proptest::prelude::*;

use super::builder::SegmentBuilder;
use super::merge::merge_into;
use super::*;
use crate::lineage::{PageLocation, PageMap};
use crate::names::{PackName, SpaceName};
use crate::pack::testing::{BarePack, Recorded};
use crate::pack::{PackIndex, SpaceTable};
use crate::units::{CheckpointId, PackNo, PageCount, PageIndex, PageRange, Slot};

type Spaces = Vec<(SpaceName, PageCount)>;

/// Where a page is, whatever numbers packs and frames have.
type Place = Option<(PackPlace, u64, Slot)>;

/// What is known of a page: `None` when nothing is, `Some(None)` when it is zero.
type Known = Option<Place>;

/// Spaces of a few blocks each, when a block has few runs.
const SIZE: u64 = 40;
const NAMES: [&str; 3] = ["ram:a", "disk:b", "disk:c"];

fn name(text: &str) -> SpaceName {
    text.parse().expect("a good name")
}

/// Of all the spaces that a checkpoint can have, so that numbers stay the same.
fn table() -> SpaceTable {
    SpaceTable::new(NAMES.map(name)).expect("three spaces")
}

/// A checkpoint as it is made up: the size of each space, none for one that is not there; and its
/// packs, those of failed tries first.
#[derive(Clone, Debug)]
struct Made {
    sizes: [Option<u64>; 3],
    packs: Vec<Vec<Recorded>>,
}

fn any_recorded() -> impl Strategy<Value = Recorded> {
    let space = (0..3_usize).prop_map(|at| table().id(&name(NAMES[at])).expect("in the table"));
    let zeros = (space.clone(), 0..SIZE, 1..SIZE);
    let pages = prop::collection::btree_set(0..SIZE, 1..12);
    prop_oneof![
        1 => zeros.prop_map(|(space, start, len)| {
            Recorded::Zero(space, PageRange::of_len(PageIndex(start), PageCount(len)))
        }),
        3 => (space, pages)
            .prop_map(|(space, pages)| Recorded::Frame(space, pages.into_iter().collect())),
    ]
}

/// Mostly of its full size, so that spaces shrink, grow, go and come.
fn any_size() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![6 => Just(Some(SIZE)), 3 => (0..=SIZE).prop_map(Some), 1 => Just(None)]
}

fn any_checkpoint() -> impl Strategy<Value = Made> {
    let sizes = [any_size(), any_size(), any_size()];
    let pack = prop::collection::vec(any_recorded(), 0..4);
    (sizes, prop::collection::vec(pack, 0..3)).prop_map(|(sizes, packs)| Made { sizes, packs })
}

/// A checkpoint as it is in a store.
struct Stored {
    spaces: Spaces,
    packs: Vec<(PackPlace, PackIndex)>,
}

fn stored(lineage: &[Made]) -> Vec<Stored> {
    let of = |(nth, made): (usize, &Made)| {
        let checkpoint = CheckpointId(nth as u64 + 1);
        let spaces = NAMES.iter().zip(made.sizes);
        let spaces = spaces.filter_map(|(text, size)| Some((name(text), PageCount(size?))));
        let packs = made.packs.iter().enumerate().map(|(number, records)| {
            let file = format!("{number:04}.pack");
            let pack = BarePack::new(&table(), &format!("{nth}/{file}"), records);
            let name = PackName::new(file).expect("a good name");
            (PackPlace { checkpoint, name }, pack.index())
        });
        Stored { spaces: spaces.collect(), packs: packs.collect() }
    };
    lineage.iter().enumerate().map(of).collect()
}

/// What a space holds: all packs applied one after another, as it was done without an index.
fn naive(lineage: &[Stored], space: &SpaceName) -> Vec<Known> {
    let mut map: Option<PageMap> = None;
    let mut packs = Vec::new();
    for checkpoint in lineage {
        let first = packs.len();
        packs.extend(&checkpoint.packs);
        let Some((_, size)) = checkpoint.spaces.iter().find(|(name, _)| name == space) else {
            map = None;
            continue;
        };
        let map = map.get_or_insert_with(|| PageMap::new(space.clone(), *size));
        map.resize(*size);
        for (number, (_, index)) in packs.iter().enumerate().skip(first) {
            map.apply_pack(PackNo(number as u32), index).expect("in order");
        }
    }
    let map = map.expect("the newest checkpoint has the space");
    let known = |page| match map.get(PageIndex(page)) {
        PageLocation::Unknown => None,
        PageLocation::Zero => Some(None),
        PageLocation::Data { pack, frame, slot } => {
            let (place, index) = packs[pack.as_usize()];
            let entry = index.frame(frame).expect("a frame of the pack");
            Some(Some((place.clone(), entry.offset.0, slot)))
        }
    };
    (0..map.size().0).map(known).collect()
}

/// What these checkpoints recorded.
fn records(checkpoints: &[Stored], parent: Option<&Stored>) -> Records {
    let mut records = Records::new(parent.map(|parent| &parent.spaces[..]));
    for checkpoint in checkpoints {
        records.begin_checkpoint(&checkpoint.spaces);
        for (place, index) in &checkpoint.packs {
            records.apply_pack(place.clone(), index).expect("few packs");
        }
    }
    records
}

/// The index of a lineage, and how it is written.
struct Index {
    policy: MergePolicy,
    /// Most runs and frames of a block.
    limits: (usize, usize),
    /// The newest first, with the first checkpoint that each covers.
    segments: Vec<(CheckpointId, Segment<Vec<u8>>)>,
}

impl Index {
    fn builder(&self) -> SegmentBuilder {
        SegmentBuilder::with_blocks_of(self.limits.0, self.limits.1)
    }

    /// One segment for the first `covered` checkpoints, then one for each.
    fn add(&mut self, checkpoints: &[Stored], parent: Option<&Stored>, first: CheckpointId) {
        let records = records(checkpoints, parent);
        let own = records.encode_into(self.builder()).expect("small");
        let own = Segment::new(own.bytes, &own.info).expect("sound");
        let spaces = &checkpoints.last().expect("a checkpoint").spaces;
        self.insert(first, own, spaces);
    }

    fn insert(&mut self, first: CheckpointId, own: Segment<Vec<u8>>, spaces: &Spaces) {
        let len = |segment: &Segment<Vec<u8>>| segment.len();
        let older: Vec<u64> = self.segments.iter().map(|(_, segment)| len(segment)).collect();
        let taken = self.policy.merged(len(&own), &older, MAX_SEGMENT_LEN);
        self.segments.insert(0, (first, own));
        if taken == 0 {
            return;
        }
        let is_oldest = taken + 1 == self.segments.len();
        let (firsts, merged): (Vec<_>, Vec<_>) = self.segments.drain(..=taken).unzip();
        let new = merge_into(self.builder(), &merged, spaces, is_oldest).expect("small");
        let new = Segment::new(new.bytes, &new.info).expect("sound");
        let first = firsts.into_iter().min().expect("two at least");
        self.segments.insert(0, (first, new));
    }

    /// Each segment says what its checkpoints recorded, however it was merged.
    fn check_segments(&self, lineage: &[Stored]) {
        let mut end = lineage.len();
        for (first, segment) in &self.segments {
            let start = first.0 as usize - 1;
            let parent = start.checked_sub(1).map(|parent| &lineage[parent]);
            let own = records(&lineage[start..end], parent).encode().expect("small");
            let own = Segment::new(own.bytes, &own.info).expect("sound");
            let differ = first_difference(&own, segment, &lineage[end - 1].spaces);
            assert_eq!(differ.expect("sound"), None, "checkpoints {start}..{end}");
            end = start;
        }
    }

    /// What it knows of these pages of a space.
    fn known(&self, space: &SpaceName, pages: PageRange) -> Vec<Known> {
        let mut known = vec![None; pages.len().as_usize()];
        let lists = self.segments.iter().map(|(_, segment)| segment.runs(space, pages));
        let mut last = pages.start;
        for piece in Overlay::new(lists) {
            let (number, run) = piece.expect("sound");
            assert!(last <= run.pages.start && run.pages.start < run.pages.end, "{run:?}");
            last = run.pages.end;
            let packs = self.segments[number].1.directory().packs();
            for (nth, page) in run.pages.iter().enumerate() {
                known[(page.0 - pages.start.0) as usize] = match run.content {
                    Placed::Unknown => None,
                    Placed::Zero => Some(None),
                    Placed::Data { pack, frame, first_slot } => {
                        let place = packs[pack.as_usize()].clone();
                        Some(Some((place, frame.offset.0, Slot(first_slot.0 + nth as u8))))
                    }
                };
            }
        }
        assert!(last <= pages.end);
        known
    }
}

fn any_policy() -> impl Strategy<Value = MergePolicy> {
    (1..6_usize, prop::sample::select(vec![0, 25, 100, 200, 1000, 100_000]))
        .prop_map(|(most, percent)| MergePolicy { most, percent })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Of every page, after every checkpoint, whatever is merged when. The first checkpoints may
    /// have been made before there was an index.
    #[test]
    fn index_is_the_naive_map(
        made in prop::collection::vec(any_checkpoint(), 1..14),
        before in 1..6_usize,
        policy in any_policy(),
        limits in (1..9_usize, 1..5_usize),
        part in (0..SIZE, 0..SIZE),
    ) {
        let lineage = stored(&made);
        let mut index = Index { policy, limits, segments: Vec::new() };
        let before = before.min(lineage.len());
        for newest in before..=lineage.len() {
            if newest == before {
                index.add(&lineage[..before], None, CheckpointId(1));
            } else {
                let (own, parent) = (&lineage[newest - 1..newest], &lineage[newest - 2]);
                index.add(own, Some(parent), CheckpointId(newest as u64));
            }
            prop_assert!(index.segments.len() <= policy.most);
            index.check_segments(&lineage[..newest]);
            for (space, size) in &lineage[newest - 1].spaces {
                let expected = naive(&lineage[..newest], space);
                prop_assert_eq!(&index.known(space, size.all()), &expected);
                let part = PageRange::new(PageIndex(part.0), PageIndex(part.1)).clip(*size);
                let expected: Vec<Known> =
                    part.iter().map(|page| expected[page.0 as usize].clone()).collect();
                prop_assert_eq!(index.known(space, part), expected);
            }
        }
    }
}

#[test]
fn segments_that_differ_name_the_first_pages() {
    let space = table().id(&name(NAMES[0])).expect("in the table");
    let spaces: Spaces = vec![(name(NAMES[0]), PageCount(SIZE))];
    let segment = |records: Vec<Recorded>| {
        let pack = BarePack::new(&table(), "1", &records).index();
        let place = PackPlace {
            checkpoint: CheckpointId(1),
            name: PackName::new("0001.pack").expect("a good name"),
        };
        let mut records = Records::new(None);
        records.begin_checkpoint(&spaces);
        records.apply_pack(place, &pack).expect("one pack");
        let own = records.encode_into(SegmentBuilder::with_blocks_of(2, 1)).expect("small");
        Segment::new(own.bytes, &own.info).expect("sound")
    };
    let zeros =
        |start, len| Recorded::Zero(space, PageRange::of_len(PageIndex(start), PageCount(len)));
    let frame = |pages: std::ops::Range<u64>| Recorded::Frame(space, pages.collect());
    let differ = |one: Vec<Recorded>, other: Vec<Recorded>| {
        let found = first_difference(&segment(one), &segment(other), &spaces).expect("sound");
        found.map(|(_, pages)| (pages.start.0, pages.end.0))
    };
    assert_eq!(differ(vec![zeros(0, 3), zeros(3, 4)], vec![zeros(0, 7)]), None);
    assert_eq!(differ(vec![frame(0..8)], vec![frame(0..8)]), None);
    assert_eq!(differ(vec![frame(0..8)], vec![frame(0..8), zeros(20, 2)]), Some((20, 22)));
    assert_eq!(differ(vec![frame(0..8)], vec![frame(0..8), zeros(2, 2)]), Some((2, 8)));
    assert_eq!(differ(vec![frame(4..8)], vec![zeros(6, 4)]), Some((4, 6)));
    assert_eq!(differ(vec![frame(4..8)], vec![zeros(4, 2)]), Some((4, 6)));
}

/// A guest that dirties `dirty` of its pages, at random, between two checkpoints.
struct Guest {
    pages: u64,
    dirty: u64,
    random: u64,
}

impl Guest {
    fn next(&mut self) -> u64 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn pack(&mut self, seed: u64, all: bool) -> BarePack {
        let space = table().id(&name(NAMES[0])).expect("in the table");
        let dirty: std::collections::BTreeSet<u64> = match all {
            true => (0..self.pages).collect(),
            false => (0..self.dirty).map(|_| self.next() % self.pages).collect(),
        };
        let pages: Vec<u64> = dirty.into_iter().collect();
        let frames = pages.chunks(crate::pack::FRAME_PAGES);
        let records: Vec<_> = frames.map(|pages| Recorded::Frame(space, pages.to_vec())).collect();
        BarePack::new(&table(), &seed.to_string(), &records)
    }
}

/// What was written and has to be read.
#[derive(Debug, Default)]
struct Cost {
    index_bytes: u64,
    trailer_bytes: u64,
    most_segments: usize,
    directory_bytes: u64,
}

fn cost(mut guest: Guest, checkpoints: u64) -> Cost {
    let spaces: Spaces = vec![(name(NAMES[0]), PageCount(guest.pages))];
    let policy = MergePolicy::default();
    let limits = (MAX_BLOCK_RUNS, MAX_BLOCK_FRAMES);
    let mut index = Index { policy, limits, segments: Vec::new() };
    let mut cost = Cost::default();
    for id in 1..=checkpoints {
        let pack = guest.pack(id, id == 1);
        // All trailers are about as long.
        if id > 1 && (id - 2) % 100 == 0 {
            cost.trailer_bytes += pack.trailer_len() as u64 * 100.min(checkpoints + 1 - id);
        }
        let place = PackPlace {
            checkpoint: CheckpointId(id),
            name: PackName::new("0001.pack").expect("a good name"),
        };
        let parent = (id > 1).then_some(&spaces[..]);
        let mut records = Records::new(parent);
        records.begin_checkpoint(&spaces);
        records.apply_pack(place, &pack.index()).expect("one pack");
        let own = records.encode().expect("small");
        index.insert(CheckpointId(id), Segment::new(own.bytes, &own.info).expect("sound"), &spaces);
        if id > 1 {
            cost.index_bytes += index.segments[0].1.len();
        }
        cost.most_segments = cost.most_segments.max(index.segments.len());
    }
    cost.directory_bytes =
        index.segments.iter().map(|(_, segment)| segment.directory_len() as u64).sum();
    cost
}

/// What the metadata of a checkpoint costs is at most twice what the packs' trailers alone do, and
/// a reader finds few segments, however long the lineage is.
#[test]
fn index_stays_small() {
    assert_small(16_384, 100, 1000);
}

#[test]
#[ignore = "takes minutes"]
fn index_stays_small_over_ten_thousand_checkpoints() {
    assert_small(16_384, 100, 10_000);
    assert_small(65_536, 100, 10_000);
    assert_small(65_536, 2000, 2000);
}

fn assert_small(pages: u64, dirty: u64, checkpoints: u64) {
    let guest = Guest { pages, dirty, random: 88_172_645_463_325_252 };
    let cost = cost(guest, checkpoints);
    println!("{checkpoints} checkpoints of {dirty} of {pages} pages: {cost:?}");
    assert!(cost.most_segments <= 10, "{cost:?}");
    assert!(cost.index_bytes <= cost.trailer_bytes, "{cost:?}");
}
