//! From extents to what a capture must read: page-aligned runs of data and of zeroes.

use super::context::{STATE_DIRTY, STATE_ZERO};
use super::extents::{ContextExtents, Extent};

/// What a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Has to be read.
    Data,
    /// Is known to be zero.
    Zero,
}

/// A run of a disk that belongs to the capture; both ends are multiples of the alignment or the
/// disk's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// The first byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// Where its content is.
    pub content: Content,
}

/// Allocation depths that belong to the disk in an export of a fleecing overlay: 1 is the overlay,
/// 2 the disk. Greater depths are layers, which are stored by themselves.
const OWN_DEPTHS: std::ops::RangeInclusive<u32> = 1..=2;

/// Combines the two contexts of a capture over a window: `allocation` (`base:allocation`) tells
/// zeroes, `changes` tells what belongs to the capture: dirty blocks, or, for a full one (its
/// context is the allocation depth), blocks of the disk itself. A piece that is not whole counts as
/// data. `window_start` must be aligned, `disk_bytes` ends the last piece.
pub fn content_ranges(
    allocation: &ContextExtents,
    changes: &ContextExtents,
    alignment: u64,
    disk_bytes: u64,
) -> Vec<ContentRange> {
    let by_depth = changes.context == super::context::ALLOCATION_DEPTH;
    let belongs =
        |flags: u32| if by_depth { OWN_DEPTHS.contains(&flags) } else { flags & STATE_DIRTY != 0 };
    let mut output = Output { alignment, disk_bytes, ranges: Vec::new() };
    let mut pending: Option<ContentRange> = None;
    for (start, end, change, state) in overlay(&changes.extents, &allocation.extents) {
        if !belongs(change) {
            continue;
        }
        let content = if state & STATE_ZERO != 0 { Content::Zero } else { Content::Data };
        match &mut pending {
            Some(run) if run.end == start && run.content == content => run.end = end,
            _ => {
                output.push(pending.replace(ContentRange { start, end, content }));
            }
        }
    }
    output.push(pending);
    output.ranges
}

/// Cuts two lists of extents at each other's borders.
fn overlay<'a>(
    left: &'a [Extent],
    right: &'a [Extent],
) -> impl Iterator<Item = (u64, u64, u32, u32)> + 'a {
    let (mut l, mut r) = (0, 0);
    std::iter::from_fn(move || {
        loop {
            let (a, b) = (left.get(l)?, right.get(r)?);
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            l += usize::from(a.end <= b.end);
            r += usize::from(b.end <= a.end);
            if start < end {
                return Some((start, end, a.flags, b.flags));
            }
        }
    })
}

struct Output {
    alignment: u64,
    disk_bytes: u64,
    ranges: Vec<ContentRange>,
}

impl Output {
    fn down(&self, offset: u64) -> u64 {
        offset - offset % self.alignment
    }

    fn up(&self, offset: u64) -> u64 {
        offset.next_multiple_of(self.alignment).min(self.disk_bytes)
    }

    fn push(&mut self, run: Option<ContentRange>) {
        let Some(ContentRange { start, end, content }) = run else { return };
        // The last piece of the disk may be short and still whole.
        let whole_end = if end == self.disk_bytes { end } else { self.down(end) };
        let whole_start = self.up(start);
        if content == Content::Data || whole_start >= whole_end {
            return self.emit(self.down(start), self.up(end), Content::Data);
        }
        self.emit(self.down(start), whole_start, Content::Data);
        self.emit(whole_start, whole_end, Content::Zero);
        self.emit(whole_end, self.up(end), Content::Data);
    }

    /// Two runs overlap only if both are data: zero runs were cut to whole pieces.
    fn emit(&mut self, start: u64, end: u64, content: Content) {
        if start >= end {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.content == content && last.end >= start => {
                last.end = last.end.max(end)
            }
            _ => self.ranges.push(ContentRange { start, end, content }),
        }
    }
}

#[cfg(test)]
mod test;
