//! Runs of pages and where their content is; several lists of them laid over one another.

use crate::pack::FrameEntry;
use crate::units::{PackNo, PageCount, PageIndex, PageRange, Slot};

/// Where the content of a run of pages is, as one segment has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Nothing is recorded of the pages, whatever older segments say.
    Unknown,
    /// They hold zeros.
    Zero,
    /// The first of them is in `first_slot` of the frame, the next one behind it, and so on.
    Data {
        /// Among the packs of the segment.
        pack: PackNo,
        /// All that is needed to read the frame.
        frame: FrameEntry,
        /// Where the first page is in the frame.
        first_slot: Slot,
    },
}

impl Placed {
    /// What the page `pages` further on has.
    #[expect(clippy::cast_possible_truncation, reason = "a run of data ends with its frame")]
    fn plus(self, pages: PageCount) -> Self {
        match self {
            Self::Data { pack, frame, first_slot } => {
                let first_slot = Slot(first_slot.0.saturating_add(pages.0 as u8));
                Self::Data { pack, frame, first_slot }
            }
            same => same,
        }
    }
}

/// Pages one after another and where their content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedRun {
    /// The pages of the run.
    pub pages: PageRange,
    /// Of the first page.
    pub content: Placed,
}

impl PlacedRun {
    /// Without the pages before `start`.
    fn from(self, start: PageIndex) -> Self {
        if start <= self.pages.start {
            return self;
        }
        let content = self.content.plus(PageCount(start.0 - self.pages.start.0));
        Self { pages: PageRange::new(start, self.pages.end), content }
    }

    /// The part of it that lies in `pages`; it may be empty.
    pub fn within(self, pages: PageRange) -> Self {
        let mut part = self.from(pages.start);
        part.pages.end = part.pages.end.min(pages.end);
        part
    }

    /// Lengthens the run when the other one follows it at once and its content continues.
    pub(super) fn try_append(&mut self, other: &Self) -> bool {
        let follows = self.pages.end == other.pages.start
            && self.content.plus(self.pages.len()) == other.content;
        if follows {
            self.pages.end = other.pages.end;
        }
        follows
    }
}

/// Lists of runs of one space, each ascending and without overlap, laid over one another: the runs
/// of an earlier list hide those of the later ones. Gives pieces of runs, ascending, without
/// overlap, each with the number of the list that it is of. Pages of which no list has anything are
/// in none.
pub struct Overlay<I: Iterator> {
    /// The newest first.
    lists: Vec<List<I>>,
    at: PageIndex,
}

struct List<I> {
    runs: I,
    /// Ends behind what was given.
    front: Option<PlacedRun>,
}

impl<E, I: Iterator<Item = Result<PlacedRun, E>>> List<I> {
    fn skip_to(&mut self, at: PageIndex) -> Result<(), E> {
        while self.front.is_none_or(|front| front.pages.end <= at) {
            match self.runs.next() {
                Some(run) => self.front = Some(run?),
                None => {
                    self.front = None;
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl<E, I: Iterator<Item = Result<PlacedRun, E>>> Overlay<I> {
    /// `lists`: the newest first.
    pub fn new(lists: impl IntoIterator<Item = I>) -> Self {
        let lists = lists.into_iter().map(|runs| List { runs, front: None }).collect();
        Self { lists, at: PageIndex(0) }
    }

    fn piece(&mut self) -> Result<Option<(usize, PlacedRun)>, E> {
        for list in &mut self.lists {
            list.skip_to(self.at)?;
        }
        let fronts = self.lists.iter().enumerate();
        let fronts = fronts.filter_map(|(number, list)| Some((number, list.front?.from(self.at))));
        // Of the runs that begin first the newest; it is seen up to where a newer one begins.
        let mut first: Option<(usize, PlacedRun)> = None;
        for (number, run) in fronts.clone() {
            if first.is_none_or(|(_, first)| run.pages.start < first.pages.start) {
                first = Some((number, run));
            }
        }
        let Some((number, mut run)) = first else { return Ok(None) };
        let newer = fronts.take_while(|(other, _)| *other < number);
        if let Some(hidden) = newer.map(|(_, run)| run.pages.start).min() {
            run.pages.end = run.pages.end.min(hidden);
        }
        self.at = run.pages.end;
        Ok(Some((number, run)))
    }
}

impl<E, I: Iterator<Item = Result<PlacedRun, E>>> Iterator for Overlay<I> {
    type Item = Result<(usize, PlacedRun), E>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.piece() {
            Ok(piece) => piece.map(Ok),
            Err(error) => {
                // What comes after a part that cannot be read would be taken for the newest.
                self.lists.clear();
                Some(Err(error))
            }
        }
    }
}
