//! The table in RAM: pages that are rewritten by steps and checked without end.
//!
//! Three records of the same truth are kept in memory and compared: the pages themselves, the list
//! of the step that wrote each page last, and a running digest over that list. One page restored
//! from another instant contradicts the list; page and list together from another instant
//! contradict the digest; and all three together contradict the journal on disk, which carries the
//! digest of every step.

use crate::page::{Flaw, Kind, Page, Stamp, mix};
use std::fmt;

pub(crate) struct Table {
    run: u64,
    pages: Vec<Page>,
    written: Vec<u64>,
    digest: u64,
    pass: Pass,
    fleecing: Page,
}

/// One walk over the whole table, in slices between steps.
#[derive(Default)]
struct Pass {
    cursor: usize,
    /// Digest over the steps that the pages before `cursor` claim in their own headers.
    sum: u64,
    finished: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TableFlaw {
    Page(Flaw),
    Digest { from_pages: u64, expected: u64 },
}

impl fmt::Display for TableFlaw {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TableFlaw::Page(flaw) => write!(out, "{flaw}"),
            TableFlaw::Digest { from_pages, expected } => {
                write!(out, "digest over all pages is {from_pages:016x}, expected {expected:016x}")
            }
        }
    }
}

impl Table {
    /// `pages` pages (at least one), all written by step 0.
    pub(crate) fn new(run: u64, pages: usize) -> Self {
        let count = pages.max(1);
        let mut table = Table {
            run,
            pages: vec![Page::zeroed(); count],
            written: vec![0; count],
            digest: 0,
            pass: Pass::default(),
            fleecing: Page::zeroed(),
        };
        for index in 0..count {
            let stamp = table.expected(index);
            table.pages[index].fill(&stamp);
            table.digest = table.digest.wrapping_add(share(run, index, 0));
        }
        table
    }

    fn expected(&self, index: usize) -> Stamp {
        Stamp {
            kind: Kind::Table,
            run: self.run,
            place: index as u64,
            step: self.written[index],
            digest: 0,
        }
    }

    /// Digest of the state that the table must have now.
    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }

    /// How often the whole table was checked.
    pub(crate) fn passes(&self) -> u64 {
        self.pass.finished
    }

    /// Rewrites `count` pseudo-random pages. Each is checked first: rewriting must not hide what
    /// was wrong.
    pub(crate) fn write_step(&mut self, step: u64, count: u64, flaws: &mut Vec<TableFlaw>) {
        for turn in 0..count {
            let index = target(self.run, step, turn, self.pages.len());
            self.check_page(index, flaws);
            self.rewrite(index, step);
        }
    }

    fn rewrite(&mut self, index: usize, step: u64) {
        let new = share(self.run, index, step);
        if index < self.pass.cursor {
            let claimed = share(self.run, index, self.pages[index].claimed_step());
            self.pass.sum = self.pass.sum.wrapping_sub(claimed).wrapping_add(new);
        }
        let old = share(self.run, index, self.written[index]);
        self.digest = self.digest.wrapping_sub(old).wrapping_add(new);
        self.written[index] = step;
        let stamp = self.expected(index);
        self.pages[index].fill(&stamp);
    }

    fn check_page(&mut self, index: usize, flaws: &mut Vec<TableFlaw>) {
        let expected = self.expected(index);
        if let Err(flaw) = self.pages[index].check(&expected, &mut self.fleecing) {
            flaws.push(TableFlaw::Page(flaw));
        }
    }

    /// Checks the next `count` pages in order, and the digest whenever the walk reaches the end.
    pub(crate) fn check_next(&mut self, count: u64, flaws: &mut Vec<TableFlaw>) {
        for _ in 0..count {
            let index = self.pass.cursor;
            self.check_page(index, flaws);
            let claimed = share(self.run, index, self.pages[index].claimed_step());
            self.pass.sum = self.pass.sum.wrapping_add(claimed);
            self.pass.cursor += 1;
            if self.pass.cursor == self.pages.len() {
                self.finish_pass(flaws);
            }
        }
    }

    fn finish_pass(&mut self, flaws: &mut Vec<TableFlaw>) {
        let finished = self.pass.finished + 1;
        let pass = std::mem::replace(&mut self.pass, Pass { finished, ..Pass::default() });
        if pass.sum != self.digest {
            flaws.push(TableFlaw::Digest { from_pages: pass.sum, expected: self.digest });
        }
    }
}

/// What one page adds to the digest.
fn share(run: u64, index: usize, step: u64) -> u64 {
    mix(run ^ mix(index as u64) ^ mix(step).rotate_left(17))
}

/// The page that turn `turn` of step `step` rewrites.
fn target(run: u64, step: u64, turn: u64, pages: usize) -> usize {
    (mix(run ^ mix(step) ^ turn.rotate_left(32)) % pages as u64) as usize
}

#[cfg(test)]
mod test {
    use super::*;

    const PAGES: usize = 64;

    fn after(steps: u64) -> Table {
        let mut table = Table::new(42, PAGES);
        let mut flaws = Vec::new();
        for step in 1..=steps {
            table.write_step(step, 5, &mut flaws);
            table.check_next(7, &mut flaws);
        }
        assert_eq!(flaws, []);
        table
    }

    fn flaws_of_two_passes(table: &mut Table) -> Vec<TableFlaw> {
        let mut flaws = Vec::new();
        table.check_next(2 * PAGES as u64, &mut flaws);
        flaws
    }

    #[test]
    fn an_undisturbed_table_never_contradicts() {
        let mut table = after(500);
        assert_eq!(flaws_of_two_passes(&mut table), []);
        assert!(table.passes() > 50);
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let mut table = after(20);
        table.pages[11].bytes_mut()[1234] ^= 4;
        assert!(matches!(
            flaws_of_two_passes(&mut table)[0],
            TableFlaw::Page(Flaw::Damaged { at: 1234, .. })
        ));
    }

    #[test]
    fn a_stale_page_is_found_before_a_step_rewrites_it() {
        let mut table = after(20);
        let index = target(42, 21, 0, PAGES);
        let old = Stamp { step: 999, ..table.expected(index) };
        table.pages[index].fill(&old);
        let mut flaws = Vec::new();
        table.write_step(21, 1, &mut flaws);
        assert!(
            matches!(flaws[..], [TableFlaw::Page(Flaw::OtherInstant { found, .. })] if found == old)
        );
    }

    #[test]
    fn page_and_list_from_another_instant_contradict_the_digest() {
        let mut table = after(20);
        table.written[5] = 777;
        let stamp = table.expected(5);
        table.pages[5].fill(&stamp);
        assert!(matches!(flaws_of_two_passes(&mut table)[..], [.., TableFlaw::Digest { .. }]));
    }

    #[test]
    fn the_digest_depends_on_every_step() {
        assert_ne!(after(20).digest(), after(21).digest());
        assert_eq!(after(20).digest(), after(20).digest());
    }
}
