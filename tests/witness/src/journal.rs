//! The journal on disk: one numbered record per step, in a ring, so that disk and RAM can be held
//! together.
//!
//! Record N occupies slot `N % slots` and carries N and the digest of the table after step N. A
//! step first changes the table and the step number in RAM, then writes record N to each journal in
//! the order given, each durable before the next. Hence, **at every instant, the last record of
//! each journal is RAM's step N, or N-1 as long as the write of N has not reached that disk**, and
//! a journal is never behind one that follows it. A restored VM finishes the write that was under
//! way (the device state carries it), so every check runs between steps and demands exactly N in
//! its slot, every older record in its own slot, and nothing from the future: a disk from a later
//! or an earlier instant than the RAM contradicts at the next step.

use crate::page::{Flaw, Kind, PAGE_BYTES, Page, Stamp};
use std::fmt;
use std::io;

/// Where records live: a block device, a file, or memory in tests. Offsets are in pages.
pub(crate) trait Medium {
    fn read_page(&mut self, place: u64, page: &mut Page) -> io::Result<()>;
    fn write_page(&mut self, place: u64, page: &Page) -> io::Result<()>;
    fn make_durable(&mut self) -> io::Result<()>;
}

/// How a journal is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub slots: u64,
    /// Pages of one record: more of them write more to the disk.
    pub record_pages: u64,
}

impl Shape {
    /// As many slots as fit into `bytes`; at least two, or a journal could not hold N beside N-1.
    pub(crate) fn fitting(bytes: u64, record_pages: u64) -> Option<Self> {
        let record_pages = record_pages.max(1);
        let slots = bytes / (PAGE_BYTES as u64).checked_mul(record_pages)?;
        (slots >= 2).then_some(Shape { slots, record_pages })
    }

    /// The newest step, `now` or before, whose record belongs into `slot`.
    fn newest_step_in(self, slot: u64, now: u64) -> Option<u64> {
        let behind = (now % self.slots + self.slots - slot) % self.slots;
        now.checked_sub(behind)
    }
}

#[derive(Debug)]
pub(crate) enum JournalFlaw {
    Page(Flaw),
    FromTheFuture { now: u64, found: Stamp },
    Io { what: &'static str, place: u64, error: io::Error },
}

impl fmt::Display for JournalFlaw {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JournalFlaw::Page(flaw) => write!(out, "{flaw}"),
            JournalFlaw::FromTheFuture { now, found } => {
                write!(out, "disk is ahead of RAM: RAM is at step {now}, disk holds {found}")
            }
            JournalFlaw::Io { what, place, error } => write!(out, "{what} page {place}: {error}"),
        }
    }
}

/// RAM's side of all journals: which digest the record of each step must carry.
pub(crate) struct History {
    run: u64,
    step: u64,
    digests: Vec<u64>,
}

impl History {
    /// Remembers at least `slots` steps: the most that any journal holds.
    pub(crate) fn new(run: u64, slots: u64, digest: u64) -> Self {
        History { run, step: 0, digests: vec![digest; slots.max(1) as usize] }
    }

    pub(crate) fn step(&self) -> u64 {
        self.step
    }

    pub(crate) fn advance(&mut self, digest: u64) {
        self.step += 1;
        let slot = self.slot(self.step);
        self.digests[slot] = digest;
    }

    fn slot(&self, step: u64) -> usize {
        (step % self.digests.len() as u64) as usize
    }

    fn stamp(&self, place: u64, step: u64) -> Stamp {
        Stamp {
            kind: Kind::Journal,
            run: self.run,
            place,
            step,
            digest: self.digests[self.slot(step)],
        }
    }
}

pub(crate) struct Journal<M> {
    medium: M,
    shape: Shape,
    scrub: u64,
    last: u64,
    page: Page,
    fleecing: Page,
}

impl<M: Medium> Journal<M> {
    pub(crate) fn new(medium: M, shape: Shape) -> Self {
        Journal { medium, shape, scrub: 0, last: 0, page: Page::zeroed(), fleecing: Page::zeroed() }
    }

    pub(crate) fn medium(&self) -> &M {
        &self.medium
    }

    /// Step of the last record that this journal took durably.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Writes the record of RAM's present step and makes it durable.
    pub(crate) fn append(&mut self, history: &History, flaws: &mut Vec<JournalFlaw>) {
        match self.try_append(history) {
            Ok(()) => self.last = history.step,
            Err(flaw) => flaws.push(flaw),
        }
    }

    fn try_append(&mut self, history: &History) -> Result<(), JournalFlaw> {
        let step = history.step;
        for place in self.places(step % self.shape.slots) {
            self.page.fill(&history.stamp(place, step));
            let written = self.medium.write_page(place, &self.page);
            written.map_err(|error| JournalFlaw::Io { what: "write", place, error })?;
        }
        let synced = self.medium.make_durable();
        synced.map_err(|error| JournalFlaw::Io {
            what: "fdatasync after",
            place: step % self.shape.slots,
            error,
        })
    }

    fn places(&self, slot: u64) -> std::ops::Range<u64> {
        slot * self.shape.record_pages..(slot + 1) * self.shape.record_pages
    }

    /// Between two steps: RAM's step is the last record, the next slot is not from the future, and
    /// one more old record is right (the whole ring is walked over time).
    pub(crate) fn check(&mut self, history: &History, flaws: &mut Vec<JournalFlaw>) {
        let slots = self.shape.slots;
        let now = history.step % slots;
        for slot in [now, (now + 1) % slots, self.scrub] {
            self.check_slot(slot, history, flaws);
        }
        self.scrub = (self.scrub + 1) % slots;
    }

    fn check_slot(&mut self, slot: u64, history: &History, flaws: &mut Vec<JournalFlaw>) {
        for place in self.places(slot) {
            if let Err(flaw) = self.check_place(place, slot, history) {
                flaws.push(flaw);
            }
        }
    }

    fn check_place(&mut self, place: u64, slot: u64, history: &History) -> Result<(), JournalFlaw> {
        let read = self.medium.read_page(place, &mut self.page);
        read.map_err(|error| JournalFlaw::Io { what: "read", place, error })?;
        let now = history.step;
        let found = self
            .page
            .stamp()
            .filter(|found| found.kind == Kind::Journal && found.run == history.run);
        if let Some(found) = found.filter(|found| found.step > now) {
            return Err(JournalFlaw::FromTheFuture { now, found });
        }
        // A slot that this run has not reached yet may hold anything that is not this run's.
        let Some(step) = self.shape.newest_step_in(slot, now) else {
            return match found {
                Some(found) => Err(JournalFlaw::FromTheFuture { now, found }),
                None => Ok(()),
            };
        };
        self.page.check(&history.stamp(place, step), &mut self.fleecing).map_err(JournalFlaw::Page)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const SHAPE: Shape = Shape { slots: 8, record_pages: 2 };

    #[derive(Clone)]
    struct Memory(Vec<Page>);

    impl Medium for Memory {
        fn read_page(&mut self, place: u64, page: &mut Page) -> io::Result<()> {
            *page = self.0.get(place as usize).ok_or(io::ErrorKind::UnexpectedEof)?.clone();
            Ok(())
        }
        fn write_page(&mut self, place: u64, page: &Page) -> io::Result<()> {
            *self.0.get_mut(place as usize).ok_or(io::ErrorKind::UnexpectedEof)? = page.clone();
            Ok(())
        }
        fn make_durable(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start() -> (Journal<Memory>, History) {
        let history = History::new(42, SHAPE.slots, 1000);
        let mut journal = Journal::new(Memory(vec![Page::zeroed(); 16]), SHAPE);
        journal.append(&history, &mut Vec::new());
        (journal, history)
    }

    fn step(journal: &mut Journal<Memory>, history: &mut History) {
        history.advance(1000 + history.step + 1);
        journal.append(history, &mut Vec::new());
    }

    fn after(steps: u64) -> (Journal<Memory>, History) {
        let (mut journal, mut history) = start();
        for _ in 0..steps {
            step(&mut journal, &mut history);
            assert!(flaws(&mut journal, &history).is_empty());
        }
        (journal, history)
    }

    fn flaws(journal: &mut Journal<Memory>, history: &History) -> Vec<String> {
        let mut flaws = Vec::new();
        journal.check(history, &mut flaws);
        flaws.iter().map(JournalFlaw::to_string).collect()
    }

    #[test]
    fn an_undisturbed_journal_never_contradicts() {
        let (journal, history) = after(100);
        assert_eq!((journal.last(), history.step()), (100, 100));
    }

    #[test]
    fn a_flipped_bit_in_the_last_record_is_found_at_once() {
        let (mut journal, history) = after(20);
        journal.medium.0[(20 % 8) * 2 + 1].bytes_mut()[3000] ^= 1;
        assert!(flaws(&mut journal, &history)[0].contains("damaged page"));
    }

    #[test]
    fn a_flipped_bit_in_an_old_record_is_found_within_one_walk() {
        let (mut journal, mut history) = after(20);
        journal.medium.0[(15 % 8) * 2].bytes_mut()[0] ^= 1;
        let mut found = 0;
        for _ in 0..SHAPE.slots {
            found += flaws(&mut journal, &history).len();
        }
        assert!(found >= 1);
        step(&mut journal, &mut history);
    }

    #[test]
    fn a_disk_from_an_earlier_instant_is_found_at_once() {
        for behind in 1..20 {
            let (old, _) = after(40 - behind);
            let (mut journal, history) = after(40);
            journal.medium = old.medium.clone();
            assert!(!flaws(&mut journal, &history).is_empty(), "{behind} steps behind");
        }
    }

    #[test]
    fn a_disk_from_a_later_instant_is_found_at_once() {
        for (now, ahead) in [(0, 1), (3, 1), (40, 1), (40, 7), (40, 8), (40, 9)] {
            let (new, _) = after(now + ahead);
            let (mut journal, history) = after(now);
            journal.medium = new.medium.clone();
            assert!(
                flaws(&mut journal, &history)[0].contains("ahead of RAM"),
                "{ahead} steps ahead of {now}"
            );
        }
    }

    #[test]
    fn a_disk_of_another_run_is_found_at_once() {
        let (mut journal, mut history) = after(20);
        history.run += 1;
        assert!(flaws(&mut journal, &history)[0].contains("another instant"));
    }

    #[test]
    fn records_of_an_older_run_do_not_disturb_a_new_one() {
        let (journal, _) = after(20);
        let history = History::new(43, SHAPE.slots, 5);
        let mut journal = Journal::new(journal.medium, SHAPE);
        journal.append(&history, &mut Vec::new());
        assert!(flaws(&mut journal, &history).is_empty());
    }

    #[test]
    fn a_disk_that_fails_is_a_contradiction() {
        let (mut journal, history) = after(20);
        journal.medium.0.clear();
        assert!(flaws(&mut journal, &history)[0].starts_with("read page"));
    }

    #[test]
    fn a_shape_needs_two_slots() {
        assert!(Shape::fitting(4096, 1).is_none());
        assert!(Shape::fitting(u64::MAX, u64::MAX).is_none());
        assert_eq!(Shape::fitting(8 * 4096 + 5, 2).map(|shape| shape.slots), Some(4));
    }
}
