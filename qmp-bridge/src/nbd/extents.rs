//! Extents of a meta context: what a block status reply says about a range.

/// A run of bytes with the same flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub start: u64,
    pub end: u64,
    /// By context: `base:allocation` state bits, dirty bit, or the depth.
    pub flags: u32,
}

/// The extents of one context over a range: ascending, without gaps, neighbours differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    pub context: String,
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

    /// Forgets what lies at or after `end`.
    pub(super) fn truncate(&mut self, end: u64) {
        self.extents.retain(|extent| extent.start < end);
        if let Some(last) = self.extents.last_mut() {
            last.end = last.end.min(end);
        }
    }
}
