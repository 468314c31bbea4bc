//! Pages as ranges: a set whose cost is the number of its ranges, not of its pages.

use std::collections::BTreeMap;

use crate::units::{PageCount, PageIndex, PageRange};

/// A set of pages as ranges that do not touch. Every operation costs the ranges that it meets and a
/// logarithm.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// End by start.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// How many pages are in the set.
    pub fn pages(&self) -> PageCount {
        PageCount(self.ranges.iter().map(|(start, end)| end - start).sum())
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.range_of(page).is_some()
    }

    /// The range that holds the page.
    pub fn range_of(&self, page: PageIndex) -> Option<PageRange> {
        let (&start, &end) = self.ranges.range(..=page.0).next_back()?;
        (page.0 < end).then(|| range(start, end))
    }

    /// Where the first range behind the page begins; the page itself is in none.
    pub fn next_start(&self, page: PageIndex) -> Option<PageIndex> {
        self.ranges.range(page.0..).next().map(|(&start, _)| PageIndex(start))
    }

    /// Adds all of `pages`.
    pub fn insert(&mut self, pages: PageRange) {
        if pages.is_empty() {
            return;
        }
        let (mut start, mut end) = (pages.start.0, pages.end.0);
        // Whatever touches becomes one range with it.
        while let Some((&other, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other);
            (start, end) = (start.min(other), end.max(other_end));
        }
        self.ranges.insert(start, end);
    }

    /// Takes all of `pages` out.
    pub fn remove(&mut self, pages: PageRange) {
        if pages.is_empty() {
            return;
        }
        while let Some((&start, &end)) = self.ranges.range(..pages.end.0).next_back() {
            if end <= pages.start.0 {
                break;
            }
            self.ranges.remove(&start);
            if pages.end.0 < end {
                self.ranges.insert(pages.end.0, end);
            }
            if start < pages.start.0 {
                self.ranges.insert(start, pages.start.0);
                break;
            }
        }
    }

    /// The parts of `pages` that are in the set, ascending.
    pub fn within(&self, pages: PageRange) -> impl Iterator<Item = PageRange> {
        let first = self.range_of(pages.start).map_or(pages.start.0, |range| range.start.0);
        // An empty range may be reversed, which the map does not take.
        let last = pages.end.0.max(first);
        let met = self.ranges.range(first..last);
        met.map(move |(&start, &end)| range(start.max(pages.start.0), end.min(pages.end.0)))
            .filter(|part| !part.is_empty())
    }

    /// The parts of `pages` that are not in the set, ascending.
    pub fn outside(&self, pages: PageRange) -> impl Iterator<Item = PageRange> {
        let mut at = pages.start;
        let last = PageRange::new(pages.end, pages.end);
        self.within(pages).chain([last]).filter_map(move |part| {
            let gap = PageRange::new(at, part.start);
            at = part.end;
            (!gap.is_empty()).then_some(gap)
        })
    }

    /// Drops the last ranges beyond so many.
    pub fn keep(&mut self, most: usize) {
        while self.ranges.len() > most {
            self.ranges.pop_last();
        }
    }
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::new(PageIndex(start), PageIndex(end))
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SIZE: u64 = 64;

    fn any_range() -> impl Strategy<Value = PageRange> {
        (0..=SIZE, 0..=SIZE).prop_map(|(start, end)| range(start, end))
    }

    fn pages(ranges: impl Iterator<Item = PageRange>) -> Vec<u64> {
        ranges.flat_map(PageRange::iter).map(|page| page.0).collect()
    }

    proptest! {
        #[test]
        fn range_set_is_a_set_of_pages(steps in prop::collection::vec((any::<bool>(), any_range()), 0..30), asked in any_range()) {
            let (mut set, mut naive) = (RangeSet::default(), BTreeSet::new());
            for (is_insert, pages) in steps {
                match is_insert {
                    true => { set.insert(pages); naive.extend(pages.iter()); }
                    false => { set.remove(pages); naive.retain(|page| !pages.contains(*page)); }
                }
                prop_assert!((0..SIZE).map(PageIndex).all(|page| set.contains(page) == naive.contains(&page)));
                prop_assert_eq!(set.pages().0, naive.len() as u64);
                let all: Vec<_> = set.within(range(0, SIZE)).collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start), "two touch: {:?}", all);
            }
            let (inside, outside) = (pages(set.within(asked)), pages(set.outside(asked)));
            prop_assert_eq!(inside, asked.iter().filter(|page| naive.contains(page)).map(|page| page.0).collect::<Vec<_>>());
            prop_assert_eq!(outside, asked.iter().filter(|page| !naive.contains(page)).map(|page| page.0).collect::<Vec<_>>());
        }
    }

    #[test]
    fn range_set_keeps_so_many_ranges() {
        let mut set = RangeSet::default();
        (0..5).for_each(|number| set.insert(range(number * 10, number * 10 + 3)));
        set.keep(2);
        let left: Vec<_> = set.within(range(0, 100)).collect();
        assert_eq!(left, [range(0, 3), range(10, 13)]);
    }
}
