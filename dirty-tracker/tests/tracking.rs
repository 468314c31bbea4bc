//! What the tracker reports is what was written: no page too few, and none too many.

mod support;

use std::collections::BTreeSet;

use checkpoint_format::{PageCount, PageIndex, PageRange};
use dirty_tracker::{BlockId, DirtyClaim, Tracker, TrackerError};
use proptest::prelude::*;
use support::{PAGE, StandIn, acknowledge, checkpoint, numbers};

fn take(tracker: &mut Tracker, block: BlockId, claim: &mut DirtyClaim) -> Vec<u64> {
    numbers(&tracker.claim(block, claim).unwrap())
}

/// Takes and keeps the dirty pages.
fn upload(tracker: &mut Tracker, block: BlockId) -> Vec<u64> {
    let mut claim = tracker.begin_claim(checkpoint());
    let pages = take(tracker, block, &mut claim);
    acknowledge(claim);
    pages
}

#[test]
fn first_claim_has_all_that_exists_and_later_ones_what_was_written() {
    let mut guest = StandIn::start(300, 300);
    guest.write('s', &[0, 7, 299]);
    guest.write('p', &[1, 8]);
    let (mut tracker, shared, private) = guest.attach();
    assert_eq!(numbers(&tracker.populated(shared).unwrap()), [0, 7, 299]);
    assert_eq!(numbers(&tracker.populated(private).unwrap()), [1, 8]);
    assert_eq!(upload(&mut tracker, shared), [0, 7, 299]);
    assert_eq!(upload(&mut tracker, private), [1, 8]);
    for block in [shared, private] {
        assert!(upload(&mut tracker, block).is_empty());
    }
    guest.write('s', &[7, 8]);
    guest.write('p', &[8, 9]);
    assert_eq!(numbers(&tracker.scan(shared).unwrap()), [7, 8], "a look");
    assert_eq!(upload(&mut tracker, shared), [7, 8], "a look takes nothing");
    assert_eq!(upload(&mut tracker, private), [8, 9]);
}

#[test]
fn a_prepared_first_claim_has_just_what_exists() {
    let mut guest = StandIn::start(3000, 3000);
    let (mut tracker, shared, private) = guest.attach();
    for memory in ['s', 'p'] {
        guest.write(memory, &[0, 7, 2999]);
    }
    tracker.prepare().unwrap();
    for (memory, block) in [('s', shared), ('p', private)] {
        guest.write(memory, &[7, 8, 1500]);
        guest.act('r', memory, &[20]);
        assert_eq!(numbers(&tracker.scan(block).unwrap()), [0, 7, 8, 1500, 2999], "{memory}");
        assert_eq!(upload(&mut tracker, block), [0, 7, 8, 1500, 2999], "{memory}");
        tracker.prepare().unwrap();
        guest.write(memory, &[9]);
        assert_eq!(upload(&mut tracker, block), [9], "{memory}");
    }
}

#[test]
fn pages_born_while_the_tracker_prepares_are_in_the_first_claim() {
    const PAGES: u64 = 128 << 10;
    let mut guest = StandIn::start(PAGES, PAGES);
    let (mut tracker, shared, private) = guest.attach();
    let done = std::sync::atomic::AtomicBool::new(false);
    let born = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut born = Vec::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) && born.len() < 1000 {
                // All over the memory, so that some are on either side of the protection wherever
                // it has come.
                let page = (born.len() as u64 * 48_271) % PAGES;
                guest.write('s', &[page]);
                guest.write('p', &[page]);
                born.push(page);
            }
            born
        });
        tracker.prepare().unwrap();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap()
    });
    for (memory, block) in [('s', shared), ('p', private)] {
        let claimed = upload(&mut tracker, block);
        let missing: Vec<&u64> = born.iter().filter(|page| !claimed.contains(page)).collect();
        assert!(
            missing.is_empty(),
            "{memory}: {} of {} pages are missing",
            missing.len(),
            born.len()
        );
    }
}

#[test]
fn what_exists_before_and_is_not_mapped_counts_as_existing() {
    let mut guest = StandIn::start(64, 1);
    guest.memory.write(5 * PAGE, &[1]).unwrap();
    guest.act('o', 's', &[9]);
    let (mut tracker, shared, _) = guest.attach();
    assert_eq!(upload(&mut tracker, shared), [5, 9]);
    guest.act('r', 's', &[5, 9, 10]);
    assert!(upload(&mut tracker, shared).is_empty(), "reading is not writing");
}

#[test]
fn first_write_to_a_page_that_never_existed_is_seen_and_reading_it_is_not() {
    let mut guest = StandIn::start(2048, 2048);
    let (mut tracker, shared, private) = guest.attach();
    tracker.protect_all().unwrap();
    for (memory, block) in [('s', shared), ('p', private)] {
        guest.act('r', memory, &[0, 3, 1000]);
        assert!(upload(&mut tracker, block).is_empty(), "{memory}");
        guest.write(memory, &[3, 4, 513, 2047]);
        assert_eq!(upload(&mut tracker, block), [3, 4, 513, 2047], "{memory}");
        guest.act('r', memory, &[3, 5]);
        guest.write(memory, &[1000]);
        assert_eq!(upload(&mut tracker, block), [1000], "{memory}");
    }
}

#[test]
fn huge_pages_are_tracked_page_by_page() {
    let mut guest = StandIn::start(1024, 1024);
    for (memory, pages) in [('s', [0, 512]), ('p', [0, 512])] {
        guest.act('h', memory, &[]);
        guest.write(memory, &pages);
    }
    let (mut tracker, shared, private) = guest.attach();
    tracker.prepare().unwrap();
    upload(&mut tracker, shared);
    upload(&mut tracker, private);
    for (memory, block) in [('s', shared), ('p', private)] {
        guest.write(memory, &[17]);
        assert_eq!(upload(&mut tracker, block), [17], "{memory}");
        guest.write(memory, &(0..1024).collect::<Vec<_>>());
        assert_eq!(upload(&mut tracker, block).len(), 1024, "{memory}");
        guest.write(memory, &[600]);
        assert_eq!(upload(&mut tracker, block), [600], "{memory}");
    }
}

#[test]
fn huge_pages_that_stay_huge_lose_nothing() {
    let mut guest = StandIn::start(1024, 1024);
    for memory in ['s', 'p'] {
        guest.act('h', memory, &[]);
        guest.write(memory, &[0, 512]);
    }
    let (mut tracker, shared, private) = guest.attach();
    tracker.protect_all().unwrap();
    for (memory, block) in [('s', shared), ('p', private)] {
        assert!(upload(&mut tracker, block).is_empty(), "{memory}");
        guest.write(memory, &[17]);
        assert!(upload(&mut tracker, block).contains(&17), "{memory}");
        guest.write(memory, &[18, 1023]);
        guest.act('r', memory, &[19]);
        let pages = upload(&mut tracker, block);
        assert!(pages.contains(&18) && pages.contains(&1023), "{memory}");
        guest.write(memory, &[18]);
        assert!(upload(&mut tracker, block).contains(&18), "{memory}");
    }
}

#[test]
fn discarded_private_pages_are_dirty() {
    let mut guest = StandIn::start(1, 64);
    guest.write('p', &[3, 4]);
    let (mut tracker, _, private) = guest.attach();
    assert_eq!(upload(&mut tracker, private), [3, 4]);
    guest.act('d', 'p', &[3]);
    let mut claim = tracker.begin_claim(checkpoint());
    assert_eq!(take(&mut tracker, private, &mut claim), [3]);
    let mut content = vec![1; PAGE as usize];
    tracker.read_pages(private, PageRange::single(PageIndex(3)), &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0));
    acknowledge(claim);
}

#[test]
fn a_claim_that_is_dropped_comes_back_with_the_next() {
    let mut guest = StandIn::start(64, 64);
    let (mut tracker, shared, private) = guest.attach();
    tracker.protect_all().unwrap();
    guest.write('s', &[1]);
    guest.write('p', &[2]);
    let mut claim = tracker.begin_claim(checkpoint());
    assert_eq!(take(&mut tracker, shared, &mut claim), [1]);
    assert_eq!(take(&mut tracker, private, &mut claim), [2]);
    guest.write('s', &[5]);
    assert_eq!(take(&mut tracker, shared, &mut claim), [5], "a second round reports what is new");
    assert_eq!(numbers(claim.pages(shared).unwrap()), [1, 5]);
    assert_eq!(claim.count(), PageCount(3));
    drop(claim);
    guest.write('s', &[9]);
    assert_eq!(numbers(&tracker.scan(shared).unwrap()), [1, 5, 9]);
    let mut claim = tracker.begin_claim(checkpoint());
    assert_eq!(take(&mut tracker, shared, &mut claim), [1, 5, 9]);
    assert_eq!(take(&mut tracker, private, &mut claim), [2]);
    acknowledge(claim);
    assert!(upload(&mut tracker, shared).is_empty());
    assert!(upload(&mut tracker, private).is_empty());
}

#[test]
fn content_is_read_from_both_kinds_of_memory() {
    let mut guest = StandIn::start(64, 64);
    let (tracker, shared, private) = guest.attach();
    for (memory, block) in [('s', shared), ('p', private)] {
        guest.write(memory, &[10, 11, 11]);
        let mut content = vec![9; 4 * PAGE as usize];
        let pages = PageRange::new(PageIndex(9), PageIndex(13));
        tracker.read_pages(block, pages, &mut content).unwrap();
        let firsts: Vec<u8> = content.chunks(PAGE as usize).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 1, 2, 0], "{memory}");
        let outside = PageRange::new(PageIndex(63), PageIndex(65));
        let error =
            tracker.read_pages(block, outside, &mut content[..2 * PAGE as usize]).unwrap_err();
        assert!(matches!(error, TrackerError::OutOfRange { .. }), "{error}");
    }
}

#[test]
fn blocks_that_are_not_what_they_seem_are_refused() {
    let guest = StandIn::start(64, 64);
    let attach = |change: &dyn Fn(&mut Vec<dirty_tracker::TrackedBlock>)| {
        let mut blocks = guest.blocks();
        change(&mut blocks);
        Tracker::attach(guest.handles(), blocks).unwrap_err().to_string()
    };
    assert!(attach(&|blocks| blocks[0].host_address += PAGE).contains("not byte 0 of its file"));
    assert!(
        attach(&|blocks| blocks[0].host_address = guest.private_address).contains("is not byte 0")
    );
    assert!(attach(&|blocks| blocks[1].host_address = guest.shared_address).contains("is shared"));
    assert!(attach(&|blocks| blocks[1].host_address = 0x1000).contains("nothing is mapped"));
    assert!(attach(&|blocks| blocks[1].name = "shared".into()).contains("twice"));
}

#[test]
fn claims_and_blocks_of_another_tracker_are_refused() {
    let guest = StandIn::start(8, 8);
    let (mut tracker, shared, private) = guest.attach();
    let (other, _, _) = guest.attach();
    let mut claim = other.begin_claim(checkpoint());
    assert!(matches!(tracker.claim(shared, &mut claim), Err(TrackerError::ForeignClaim)));
    let mut small = Tracker::attach(guest.handles(), guest.blocks().drain(..1).collect()).unwrap();
    assert!(matches!(small.scan(private), Err(TrackerError::UnknownBlock(1))));
}

#[test]
fn a_successor_takes_over_and_misses_nothing() {
    let mut guest = StandIn::start(64, 64);
    let (mut tracker, shared, _) = guest.attach();
    tracker.protect_all().unwrap();
    guest.write('s', &[1, 2]);
    let mut claim = tracker.begin_claim(checkpoint());
    assert_eq!(take(&mut tracker, shared, &mut claim), [1, 2]);
    guest.write('s', &[3]);
    // As when the process is killed: no page is restored.
    #[expect(clippy::disallowed_methods, reason = "a helper that is killed drops nothing")]
    std::mem::forget(claim);
    drop(tracker);
    guest.write('s', &[4]);

    let (mut tracker, shared, private) = guest.attach();
    guest.write('s', &[5]);
    assert_eq!(upload(&mut tracker, shared), [1, 2, 3, 4, 5]);
    upload(&mut tracker, private);
    guest.write('s', &[6]);
    guest.write('p', &[7]);
    assert_eq!(upload(&mut tracker, shared), [6]);
    assert_eq!(upload(&mut tracker, private), [7]);
}

#[test]
fn successor_that_knows_the_last_claim_was_acknowledged_continues_where_it_ended() {
    let mut guest = StandIn::start(64, 64);
    let (mut tracker, shared, private) = guest.attach();
    for memory in ['s', 'p'] {
        guest.write(memory, &[1, 2]);
    }
    upload(&mut tracker, shared);
    upload(&mut tracker, private);
    guest.write('s', &[3]);
    drop(tracker);
    guest.write('s', &[4]);
    guest.write('p', &[5]);

    let (mut tracker, shared, private) = guest.attach();
    tracker.resume_protection();
    assert_eq!(upload(&mut tracker, shared), [3, 4]);
    assert_eq!(upload(&mut tracker, private), [5]);
}

#[test]
fn trusting_a_predecessor_that_never_was_takes_every_page() {
    let mut guest = StandIn::start(64, 64);
    guest.write('s', &[1]);
    let (mut tracker, shared, private) = guest.attach();
    tracker.resume_protection();
    for block in [shared, private] {
        assert_eq!(upload(&mut tracker, block).len(), 64);
    }
}

#[test]
fn a_process_that_ended_is_recognised() {
    let mut guest = StandIn::start(64, 64);
    let (mut tracker, shared, private) = guest.attach();
    tracker.protect_all().unwrap();
    guest.kill();
    for block in [shared, private] {
        let error = tracker.scan(block).unwrap_err();
        assert!(error.is_process_gone(), "{error:?}");
        assert!(!error.is_retryable());
    }
    let error = tracker.protect_all().unwrap_err();
    assert!(error.is_process_gone(), "{error:?}");
    // The file outlives the process: what it held can still be saved.
    tracker.read_pages(shared, PageRange::single(PageIndex(0)), &mut [0; PAGE as usize]).unwrap();
}

/// What can happen to a tracked VM.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, Vec<u64>),
    Read(usize, Vec<u64>),
    Look,
    /// One pre-copy pass: take into the open claim.
    Pass,
    Acknowledge,
    Drop,
}

const PAGES: u64 = 1200;
/// Memory for those pages to be anywhere in.
const ROOM: u64 = 2 * PIECE_PAGES;
/// The kernel is asked in pieces of 16 MiB of addresses.
const PIECE_PAGES: u64 = (16 << 20) / PAGE;

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0..PAGES, 1..40);
    prop_oneof![
        5 => (0..2usize, pages()).prop_map(|(memory, pages)| Step::Write(memory, pages)),
        2 => (0..2usize, pages()).prop_map(|(memory, pages)| Step::Read(memory, pages)),
        1 => Just(Step::Look),
        3 => Just(Step::Pass),
        1 => Just(Step::Acknowledge),
        1 => Just(Step::Drop),
    ]
}

/// The naive oracle: per memory, what was written and not taken, and what the open claim has.
#[derive(Default)]
struct Oracle {
    dirty: [BTreeSet<u64>; 2],
    claimed: [BTreeSet<u64>; 2],
}

const MEMORIES: [char; 2] = ['s', 'p'];

/// The first of those pages in a memory at `address`: the end of a piece lies in their middle.
fn first_page(address: u64) -> u64 {
    let piece = PIECE_PAGES - (address / PAGE) % PIECE_PAGES;
    if piece < PAGES / 2 { piece + PIECE_PAGES - PAGES / 2 } else { piece - PAGES / 2 }
}

fn run(steps: &[Step]) {
    let mut guest = StandIn::start(ROOM, ROOM);
    let first = [first_page(guest.shared_address), first_page(guest.private_address)];
    let placed = |memory: usize, pages: &[u64]| {
        pages.iter().map(|page| first[memory] + page).collect::<Vec<u64>>()
    };
    let (mut tracker, shared, private) = guest.attach();
    let blocks = [shared, private];
    tracker.protect_all().unwrap();
    let mut oracle = Oracle::default();
    let mut claim = tracker.begin_claim(checkpoint());
    for step in steps {
        match step {
            Step::Write(memory, pages) => {
                let pages = placed(*memory, pages);
                guest.write(MEMORIES[*memory], &pages);
                oracle.dirty[*memory].extend(pages);
            }
            Step::Read(memory, pages) => guest.act('r', MEMORIES[*memory], &placed(*memory, pages)),
            Step::Look => {
                for (block, dirty) in blocks.iter().zip(&oracle.dirty) {
                    assert!(
                        tracker
                            .scan(*block)
                            .unwrap()
                            .iter()
                            .map(PageIndex::get)
                            .eq(dirty.iter().copied())
                    );
                }
            }
            Step::Pass => {
                for (index, block) in blocks.iter().enumerate() {
                    let taken = take(&mut tracker, *block, &mut claim);
                    let expected = std::mem::take(&mut oracle.dirty[index]);
                    assert!(
                        taken.iter().eq(&expected),
                        "{} pages, expected {}",
                        taken.len(),
                        expected.len()
                    );
                    oracle.claimed[index].extend(expected);
                    assert!(
                        claim
                            .pages(*block)
                            .unwrap()
                            .iter()
                            .map(PageIndex::get)
                            .eq(oracle.claimed[index].iter().copied())
                    );
                }
            }
            Step::Acknowledge => {
                let acknowledged = std::mem::replace(&mut claim, tracker.begin_claim(checkpoint()));
                acknowledge(acknowledged);
                oracle.claimed = Default::default();
            }
            Step::Drop => {
                claim = tracker.begin_claim(checkpoint());
                for (dirty, claimed) in oracle.dirty.iter_mut().zip(&mut oracle.claimed) {
                    dirty.append(claimed);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_history_agrees_with_the_oracle(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps);
    }
}
