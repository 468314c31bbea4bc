//! Which bytes of a read have arrived: chunks may come in any order, but must cover it exactly
//! once.

use std::ops::Range;

/// Sorted, disjoint, merged ranges.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    ranges: Vec<Range<usize>>,
}

/// Most gaps at a time, so that a hostile server cannot make the list long.
const MAX_RANGES: usize = 4096;

impl Coverage {
    /// Adds a non-empty range; false if part of it was there already, or if there are too many
    /// gaps.
    pub(super) fn add(&mut self, new: Range<usize>) -> bool {
        let at = self.ranges.partition_point(|range| range.end < new.start);
        let touching = self.ranges[at..].iter().take_while(|range| range.start <= new.end).count();
        let overlaps = self.ranges[at..at + touching]
            .iter()
            .any(|range| range.start < new.end && new.start < range.end);
        if overlaps || new.is_empty() || (touching == 0 && self.ranges.len() >= MAX_RANGES) {
            return false;
        }
        let touched = &self.ranges[at..at + touching];
        let start = touched.first().map_or(new.start, |first| first.start.min(new.start));
        let end = touched.last().map_or(new.end, |last| last.end.max(new.end));
        self.ranges.drain(at..at + touching);
        self.ranges.insert(at, start..end);
        true
    }

    pub(super) fn is_exactly(&self, length: usize) -> bool {
        length == 0 || (self.ranges.len() == 1 && self.ranges[0] == (0..length))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn any_order_once() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(8..10) && coverage.add(0..4) && !coverage.is_exactly(10));
        assert!(!coverage.add(3..5) && !coverage.add(9..12) && !coverage.add(5..5));
        assert!(coverage.add(4..8) && coverage.is_exactly(10));
        assert!(!coverage.add(0..1));
    }
}
