//! Extents of a meta context: what a block status reply says about a range.

/// A run of bytes with the same flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// By context: `base:allocation` state bits, dirty bit, or the depth.
    pub flags: u32,
}

/// The extents of one context over a range: ascending, without gaps, neighbours differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    /// Its name.
    pub context: String,
    /// Its extents, ascending and without gaps.
    pub extents: Vec<Extent>,
}

impl ContextExtents {
    /// Where the known part ends.
    pub(super) fn end(&self, start: u64) -> u64 {
        self.extents.last().map_or(start, |last| last.end)
    }

    /// Adds a run, merging it with an equal neighbour.
    pub(super) fn push(&mut self, run: Extent) {
        match self.extents.last_mut() {
            Some(last) if last.flags == run.flags && last.end == run.start => last.end = run.end,
            _ => self.extents.push(run),
        }
    }

    /// Gives everything from `start` on these flags.
    pub fn set_from(&mut self, start: u64, flags: u32) {
        let (first, end) =
            (self.extents.first().map_or(start, |first| first.start), self.end(start));
        if end > start {
            self.truncate(start);
            self.push(Extent { start: start.max(first), end, flags });
        }
    }

    /// Forgets what lies at or after `end`.
    pub(super) fn truncate(&mut self, end: u64) {
        self.extents.retain(|extent| extent.start < end);
        if let Some(last) = self.extents.last_mut() {
            last.end = last.end.min(end);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn extents_get_flags_from_an_offset_on() {
        let extent = |start, end, flags| Extent { start, end, flags };
        let with = |start| {
            let mut context = ContextExtents {
                context: String::new(),
                extents: vec![extent(10, 20, 0), extent(20, 30, 1)],
            };
            context.set_from(start, 1);
            context.extents
        };
        assert_eq!(with(15), [extent(10, 15, 0), extent(15, 30, 1)]);
        assert_eq!(with(25), [extent(10, 20, 0), extent(20, 30, 1)]);
        assert_eq!(
            (with(0), with(30)),
            (vec![extent(10, 30, 1)], vec![extent(10, 20, 0), extent(20, 30, 1)])
        );
    }
}
