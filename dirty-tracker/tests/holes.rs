//! Pages that a balloon discards are reported like written ones, whatever happens to them
//! afterwards.

mod support;

use std::collections::BTreeSet;

use checkpoint_format::{PageIndex, PageRange};
use dirty_tracker::{BlockId, DirtyClaim, Tracker};
use proptest::prelude::*;
use support::{PAGE, StandIn, acknowledge, checkpoint, numbers};

const MEMORIES: [char; 2] = ['s', 'p'];

fn take(tracker: &mut Tracker, block: BlockId, claim: &mut DirtyClaim) -> Vec<u64> {
    numbers(&tracker.claim(block, claim).unwrap())
}

fn upload(tracker: &mut Tracker, block: BlockId) -> Vec<u64> {
    let mut claim = tracker.begin_claim(checkpoint());
    let pages = take(tracker, block, &mut claim);
    acknowledge(claim);
    pages
}

/// A guest whose every page was written and taken once.
fn full_guest(pages: u64) -> (StandIn, Tracker, [BlockId; 2]) {
    let guest = StandIn::start(pages, pages);
    filled(guest, pages)
}

fn filled(mut guest: StandIn, pages: u64) -> (StandIn, Tracker, [BlockId; 2]) {
    MEMORIES.iter().for_each(|memory| guest.write(*memory, &(0..pages).collect::<Vec<_>>()));
    let (mut tracker, shared, private) = guest.attach_watching();
    tracker.prepare().unwrap();
    for block in [shared, private] {
        assert_eq!(upload(&mut tracker, block).len() as u64, pages);
        assert!(upload(&mut tracker, block).is_empty());
    }
    (guest, tracker, [shared, private])
}

/// A name, what is done to which pages, and the pages that the claim must have.
type History = (&'static str, &'static [(char, &'static [u64])], &'static [u64]);

/// Operations of the guest between two claims, and the pages that the second must have.
const HISTORIES: &[History] = &[
    ("discarded", &[('x', &[3, 2])], &[3, 4]),
    ("discarded, then read: a page again, of zeros", &[('x', &[3, 2]), ('r', &[3, 4])], &[3, 4]),
    ("discarded, then written", &[('x', &[3, 1]), ('w', &[3])], &[3]),
    ("written, then discarded", &[('w', &[3]), ('x', &[3, 1])], &[3]),
    ("written, discarded, then read", &[('w', &[3]), ('x', &[3, 1]), ('r', &[3])], &[3]),
    (
        "discarded twice with a read between",
        &[('x', &[5, 1]), ('r', &[5]), ('x', &[5, 1]), ('r', &[5])],
        &[5],
    ),
    ("read only", &[('r', &[3, 4, 1000])], &[]),
];

#[test]
fn holes_are_dirty_pages_whatever_happens_to_them_later() {
    // Also with a look between any two operations: what it finds must not be lost, and what it maps
    // must not hide anything.
    for with_looks in [false, true] {
        for (what, operations, expected) in HISTORIES {
            let (mut guest, mut tracker, blocks) = full_guest(1024);
            for (memory, block) in MEMORIES.into_iter().zip(blocks) {
                for (operation, pages) in *operations {
                    guest.act(*operation, memory, pages);
                    if with_looks {
                        tracker.scan(block).unwrap();
                    }
                }
                let context = format!("{what}, {memory}, looks: {with_looks}");
                assert_eq!(upload(&mut tracker, block), *expected, "{context}");
                assert!(
                    upload(&mut tracker, block).iter().all(|page| expected.contains(page)),
                    "{context}: once more at most"
                );
                tracker.scan(block).unwrap();
                upload(&mut tracker, block);
                assert!(upload(&mut tracker, block).is_empty(), "{context}: and then no more");
            }
        }
    }
}

/// Where the host has huge pages for memory files; a hole in one breaks it up, and then all of its
/// pages may be reported, once. A guest clears what its balloon takes: such pages are reported
/// once, so that the passes of a checkpoint come to an end.
#[test]
fn holes_in_what_was_just_written_are_reported_once() {
    let (mut guest, mut tracker, [shared, _]) = full_guest(2048);
    guest.act('x', 's', &[500, 1000]);
    guest.act('r', 's', &(500..1500).collect::<Vec<_>>());
    tracker.scan(shared).unwrap();
    upload(&mut tracker, shared);
    for pages in [500..1500, 0..2048] {
        let pages: Vec<u64> = pages.collect();
        guest.write('s', &pages);
        guest.act('x', 's', &[pages[0] + 1, pages.len() as u64 - 1]);
        assert_eq!(numbers(&tracker.scan(shared).unwrap()), pages);
        assert_eq!(upload(&mut tracker, shared), pages);
        assert!(tracker.scan(shared).unwrap().is_empty());
    }
}

#[test]
fn holes_in_huge_pages_are_found() {
    for (what, operations, expected) in HISTORIES {
        let mut guest = StandIn::start(1024, 1024);
        MEMORIES.iter().for_each(|memory| guest.act('h', *memory, &[]));
        let (mut guest, mut tracker, blocks) = filled(guest, 1024);
        for (memory, block) in MEMORIES.into_iter().zip(blocks) {
            operations.iter().for_each(|(operation, pages)| guest.act(*operation, memory, pages));
            let found = upload(&mut tracker, block);
            assert!(
                expected.iter().all(|page| found.contains(page)),
                "{what}, {memory}: {found:?}"
            );
            tracker.scan(block).unwrap();
            upload(&mut tracker, block);
            assert!(upload(&mut tracker, block).is_empty(), "{what}, {memory}");
        }
    }
}

#[test]
fn holes_of_many_megabytes_are_found_and_stay_holes() {
    let (mut guest, mut tracker, [shared, private]) = full_guest(8192);
    for (memory, block) in [('s', shared), ('p', private)] {
        guest.act('x', memory, &[512, 6000]);
        assert_eq!(tracker.scan(block).unwrap().count().0, 6000, "{memory}");
        assert_eq!(upload(&mut tracker, block), (512..6512).collect::<Vec<_>>(), "{memory}");
        let mut content = vec![1; 6000 * PAGE as usize];
        tracker
            .read_pages(block, PageRange::new(PageIndex(512), PageIndex(6512)), &mut content)
            .unwrap();
        assert!(content.iter().all(|byte| *byte == 0), "{memory}");
        assert!(
            tracker.scan(block).unwrap().is_empty() && upload(&mut tracker, block).is_empty(),
            "{memory}"
        );
    }
    assert_eq!(
        tracker.populated(shared).unwrap().count().0,
        8192 - 6000,
        "what looks and reads brings no page back"
    );
}

#[test]
fn holes_punched_during_the_first_claim_are_not_lost() {
    let mut guest = StandIn::start(64, 1);
    guest.write('s', &[1, 2, 3]);
    let (mut tracker, shared, _) = guest.attach_watching();
    tracker.prepare().unwrap();
    guest.act('x', 's', &[1, 1]);
    guest.act('r', 's', &[1]);
    let mut claim = tracker.begin_claim(checkpoint());
    assert_eq!(take(&mut tracker, shared, &mut claim), [1, 2, 3]);
    guest.act('x', 's', &[2, 1]);
    guest.act('r', 's', &[2]);
    assert_eq!(take(&mut tracker, shared, &mut claim), [1, 2], "1 is not in the mapping yet");
    drop(claim);
    assert_eq!(upload(&mut tracker, shared), [1, 2, 3], "restored by the claim");
}

#[test]
fn holes_after_a_restore_are_found() {
    let mut guest = StandIn::start(64, 1);
    guest.memory.write(5 * PAGE, &[1; 2 * PAGE as usize]).unwrap();
    let (mut tracker, shared, _) = guest.attach_watching();
    tracker.protect_all().unwrap();
    guest.act('x', 's', &[5, 1]);
    guest.act('r', 's', &[5, 30]);
    assert!(upload(&mut tracker, shared).contains(&5));
    tracker.scan(shared).unwrap();
    upload(&mut tracker, shared);
    assert!(upload(&mut tracker, shared).is_empty());
}

#[test]
fn holes_that_no_tracker_watched_are_not_trusted_to_be_none() {
    let (mut guest, tracker, _) = full_guest(64);
    drop(tracker);
    guest.act('x', 's', &[3, 1]);
    guest.act('r', 's', &[3]);
    let (mut tracker, shared, _) = guest.attach_watching();
    assert!(!tracker.resume_protection());
    assert_eq!(upload(&mut tracker, shared).len(), 64);
    tracker.scan(shared).unwrap();
    upload(&mut tracker, shared);
    assert!(tracker.resume_protection(), "this one saw all of them since");
    assert!(upload(&mut tracker, shared).is_empty());
    let (mut tracker, _, _) = guest.attach();
    assert!(tracker.resume_protection());
}

/// What can happen to a tracked VM with a balloon.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, Vec<u64>),
    Read(usize, Vec<u64>),
    Discard(usize, u64, u64),
    Look,
    Claim,
    Acknowledge,
    Fail,
}

const PAGES: u64 = 700;

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0..PAGES, 1..40);
    prop_oneof![
        4 => (0..2usize, pages()).prop_map(|(memory, pages)| Step::Write(memory, pages)),
        3 => (0..2usize, pages()).prop_map(|(memory, pages)| Step::Read(memory, pages)),
        4 => (0..2usize, 0..PAGES, 1..120u64).prop_map(|(memory, first, count)| Step::Discard(memory, first, count.min(PAGES - first))),
        2 => Just(Step::Look),
        4 => Just(Step::Claim),
        2 => Just(Step::Acknowledge),
        1 => Just(Step::Fail),
    ]
}

/// A memory, and a copy of it that is kept up to date with nothing but what the tracker reports.
struct Replica {
    truth: Vec<u8>,
    durable: Vec<u8>,
    staged: Vec<u8>,
    /// Pages that anything happened to before the last claim, and since: a claim may have them
    /// until a look has cleared them up.
    touched: [BTreeSet<u64>; 2],
    is_cleared_up: bool,
}

impl Replica {
    fn new() -> Self {
        let zeros = || vec![0; PAGES as usize];
        Self {
            truth: zeros(),
            durable: zeros(),
            staged: zeros(),
            touched: Default::default(),
            is_cleared_up: true,
        }
    }

    fn touch(&mut self, pages: impl Iterator<Item = u64>, change: impl Fn(u8) -> u8) {
        for page in pages {
            self.truth[page as usize] = change(self.truth[page as usize]);
            self.touched[1].insert(page);
        }
    }

    fn claim(&mut self, tracker: &mut Tracker, block: BlockId, claim: &mut DirtyClaim) {
        let pages = take(tracker, block, claim);
        let strange: Vec<&u64> = pages
            .iter()
            .filter(|page| self.touched.iter().all(|touched| !touched.contains(page)))
            .collect();
        assert!(strange.is_empty(), "nothing happened to {strange:?}");
        for page in pages {
            let mut content = [9; PAGE as usize];
            tracker.read_pages(block, PageRange::single(PageIndex(page)), &mut content).unwrap();
            self.staged[page as usize] = content[0];
        }
        assert!(self.staged == self.truth, "a change was not reported");
        let [before, since] = std::mem::take(&mut self.touched);
        self.touched[0] = if self.is_cleared_up { since } else { &before | &since };
        self.is_cleared_up = false;
    }

    /// What the failed checkpoint had is needed again.
    fn fail(&mut self) {
        self.touched[1].extend(0..PAGES);
        self.staged.clone_from(&self.durable);
    }
}

fn run(steps: &[Step]) {
    let mut guest = StandIn::start(PAGES, PAGES);
    let (mut tracker, shared, private) = guest.attach_watching();
    let blocks = [shared, private];
    tracker.protect_all().unwrap();
    let mut replicas = [Replica::new(), Replica::new()];
    let mut claim = tracker.begin_claim(checkpoint());
    for step in steps {
        match step {
            Step::Write(memory, pages) => {
                guest.write(MEMORIES[*memory], pages);
                replicas[*memory].touch(pages.iter().copied(), |byte| byte.wrapping_add(1));
            }
            Step::Read(memory, pages) => {
                guest.act('r', MEMORIES[*memory], pages);
                replicas[*memory].touch(pages.iter().copied(), |byte| byte);
            }
            Step::Discard(memory, first, count) => {
                guest.act('x', MEMORIES[*memory], &[*first, *count]);
                replicas[*memory].touch(*first..first + count, |_| 0);
            }
            Step::Look => {
                blocks.iter().for_each(|block| drop(tracker.scan(*block).unwrap()));
                replicas.iter_mut().for_each(|replica| replica.is_cleared_up = true);
            }
            Step::Claim => replicas
                .iter_mut()
                .zip(blocks)
                .for_each(|(replica, block)| replica.claim(&mut tracker, block, &mut claim)),
            Step::Acknowledge => {
                // Only what a claim has seen is durable.
                replicas
                    .iter_mut()
                    .zip(blocks)
                    .for_each(|(replica, block)| replica.claim(&mut tracker, block, &mut claim));
                acknowledge(std::mem::replace(&mut claim, tracker.begin_claim(checkpoint())));
                replicas.iter_mut().for_each(|replica| replica.durable.clone_from(&replica.staged));
            }
            Step::Fail => {
                claim = tracker.begin_claim(checkpoint());
                replicas.iter_mut().for_each(Replica::fail);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn holes_and_writes_in_any_order_keep_a_copy_up_to_date(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps);
    }
}
