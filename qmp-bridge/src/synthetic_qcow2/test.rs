//! The file is what a reader of qcow2 makes the disk of.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::layout::{COUNTED, GROUP_BYTES};
use super::*;
use crate::disks::ImageFormat;

/// Pages of data hold their number in every byte; a map of a few pages is enough.
#[derive(Debug)]
struct Sparse {
    pages: u64,
    content: BTreeMap<u64, Content>,
}

fn byte_of(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

impl Sparse {
    fn runs(&self, pages: PageRange) -> Vec<OwnRun> {
        let mut runs: Vec<OwnRun> = Vec::new();
        for page in pages.start.0..pages.end.0 {
            assert!(page < self.pages, "page {page} is none of the disk");
            let content = self.content.get(&page).copied();
            let single = PageRange::new(PageIndex(page), PageIndex(page + 1));
            match runs.last_mut() {
                Some(run) if run.content == content => run.pages.end = single.end,
                _ => runs.push(OwnRun { pages: single, content }),
            }
        }
        runs
    }
}

impl OwnPages for Sparse {
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>> {
        let runs = self.runs(pages);
        Box::pin(async move { Ok(runs) })
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        for page in bytes.start / CLUSTER..bytes.end.div_ceil(CLUSTER) {
            assert_eq!(self.content.get(&page), Some(&Content::Data), "page {page} is read");
        }
        let content: Vec<u8> = bytes.map(|at| byte_of(at / CLUSTER)).collect();
        Box::pin(async move { Ok(content.into()) })
    }
}

fn image(size: u64, content: BTreeMap<u64, Content>) -> SyntheticQcow2<Sparse> {
    let pages = Sparse { pages: size.div_ceil(CLUSTER), content };
    let backing = Backing { file: "/layers/base".into(), format: ImageFormat::Raw };
    SyntheticQcow2::new(size, Some(&backing), pages).expect("image")
}

fn read(image: &SyntheticQcow2<Sparse>, at: u64, length: u64) -> Bytes {
    futures::executor::block_on(image.assemble(at..at + length)).expect("read")
}

fn entry(file: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(file[at..at + 8].try_into().expect("8 bytes"))
}

/// What the format says of a page: through the header, an L1 and an L2 table. Clusters that were
/// used are noted.
fn look_up(file: &[u8], page: u64, used: &mut Vec<u64>) -> (Option<Content>, u64) {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let l1 = entry(file, entry(file, 40) + page / 512 * 8);
    if l1 == 0 {
        return (None, 0);
    }
    assert!(l1 & (1 << 63) != 0 && l1 & OFFSET & 4095 == 0);
    used.push((l1 & OFFSET) / CLUSTER);
    let l2 = entry(file, (l1 & OFFSET) + page % 512 * 8);
    match (l2 & 1, l2 & OFFSET) {
        (1, 0) => (Some(Content::Zero), 0),
        (0, 0) => (None, 0),
        (0, host) => {
            used.push(host / CLUSTER);
            (Some(Content::Data), host)
        }
        other => panic!("an L2 entry {other:?}"),
    }
}

fn refcount(file: &[u8], cluster: u64) -> u8 {
    let table = entry(file, 48);
    let block = entry(file, table + cluster / COUNTED as u64 * 8);
    let bit = cluster % COUNTED as u64;
    (file[(block + bit / 8) as usize] >> (bit % 8)) & 1
}

#[test]
fn synthetic_header_names_what_is_below() {
    let image = image(1000, BTreeMap::new());
    let header = read(&image, 0, CLUSTER);
    let long = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("8"));
    let short = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4"));
    assert_eq!((&header[..4], short(4), short(20), long(24)), (&b"QFI\xfb"[..], 3, 12, 1024));
    let (at, length) = (long(8) as usize, short(16) as usize);
    assert_eq!(&header[at..at + length], b"/layers/base");
    assert_eq!((short(96), short(100)), (0, 104), "refcounts of one bit, a header of 104 bytes");
    let alone = SyntheticQcow2::new(1000, None, Sparse { pages: 1, content: BTreeMap::new() });
    assert_eq!(read(&alone.expect("image"), 8, 12)[..], [0; 12]);
}

#[test]
fn synthetic_disks_and_names_have_limits() {
    let none = || Sparse { pages: 0, content: BTreeMap::new() };
    let largest = SyntheticQcow2::new(MAX_DISK, None, none()).expect("image");
    assert!(largest.layout.data_start() < MAX_DISK / 256, "tables are small");
    let error = SyntheticQcow2::new(MAX_DISK + 1, None, none()).map(|_| ()).expect_err("large");
    assert_eq!(error, SyntheticError::TooLarge { size: MAX_DISK + 1 });
    let name = |length| Backing { file: "x".repeat(length), format: ImageFormat::Qcow2 };
    assert!(SyntheticQcow2::new(4096, Some(&name(1023)), none()).is_ok());
    let error = SyntheticQcow2::new(4096, Some(&name(1024)), none()).map(|_| ());
    assert_eq!(error, Err(SyntheticError::LongBacking { length: 1024 }));
}

#[test]
fn synthetic_file_ends_with_the_last_page_and_a_disk_may_be_empty() {
    let empty = image(0, BTreeMap::new());
    assert_eq!(empty.size(), empty.layout.data_start());
    let size = 2 * GROUP_BYTES + 512;
    let image = image(size, [(1024, Content::Data)].into());
    assert_eq!(image.size(), image.layout.data_start() + 1025 * CLUSTER);
    let last = read(&image, image.size() - CLUSTER, CLUSTER);
    assert!(last.iter().all(|byte| *byte == byte_of(1024)));
}

fn maps() -> impl Strategy<Value = (u64, BTreeMap<u64, Content>)> {
    (1u64..1400).prop_flat_map(|pages| {
        let content = prop_oneof![Just(Content::Data), Just(Content::Zero)];
        let run = (0..pages, 1u64..40, content);
        prop::collection::vec(run, 0..12).prop_map(move |runs| {
            let mut map = BTreeMap::new();
            for (start, length, content) in runs {
                map.extend((start..pages.min(start + length)).map(|page| (page, content)));
            }
            (pages, map)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn synthetic_file_reads_as_its_map((pages, map) in maps()) {
        let image = image(pages * CLUSTER, map.clone());
        let mut used: Vec<u64> = (0..image.layout.l2_start()).collect();
        let file = read(&image, 0, image.size());
        for page in 0..pages {
            let (content, host) = look_up(&file, page, &mut used);
            prop_assert_eq!(content, map.get(&page).copied(), "page {}", page);
            if content == Some(Content::Data) {
                prop_assert_eq!(file[host as usize + 7], byte_of(page));
            }
        }
        used.sort_unstable();
        used.dedup();
        for cluster in 0..image.size() / CLUSTER {
            let expected = u8::from(used.binary_search(&cluster).is_ok());
            prop_assert_eq!(refcount(&file, cluster), expected, "cluster {}", cluster);
        }
    }

    #[test]
    fn synthetic_file_is_the_same_however_it_is_read(
        (pages, map) in maps(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let image = image(pages * CLUSTER, map);
        let size = image.size();
        let whole = read(&image, 0, size);
        let mut cuts: Vec<u64> = cuts.iter().map(|cut| cut.index(size as usize) as u64).collect();
        cuts.extend([0, size]);
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            let part = read(&image, pair[0], pair[1] - pair[0]);
            prop_assert_eq!(&part, &whole.slice(pair[0] as usize..pair[1] as usize));
            if pair[0] == pair[1] {
                continue;
            }
            let extents = futures::executor::block_on(image.extents(pair[0]..pair[1]));
            let extents = extents.expect("extents");
            prop_assert_eq!(extents[0].start, pair[0]);
            prop_assert!(extents.windows(2).all(|two| two[0].end == two[1].start));
            prop_assert!(extents.last().is_some_and(|last| last.end >= pair[1]));
            for hole in extents.iter().filter(|extent| extent.flags != 0) {
                let end = hole.end.min(size);
                let bytes = &whole[hole.start as usize..end as usize];
                prop_assert!(bytes.iter().all(|byte| *byte == 0), "a hole is zeros");
            }
        }
    }
}
