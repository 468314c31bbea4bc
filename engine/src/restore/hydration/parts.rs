//! Which parts of memory wait for their pages, and which are zeros from the beginning.
//!
//! The kernel knows per mapping whether a page that does not exist is waited for or is a zero page,
//! and that never changes again. So long runs of zeros are left out: the guest gets such pages from
//! the kernel, at once, and they take no memory until then. The short ones in between are waited
//! for, and filled in the end, so that QEMU then depends on no helper.

use checkpoint_format::{LocatedRun, PageCount, PageLocation, PageRange};

/// Each costs QEMU two mappings for as long as it lives, of the 65,530 that it may have, and a
/// restore some microseconds.
const MOST_PARTS: usize = 512;
/// A shorter run of zeros is not worth a part.
const SHORTEST_ZEROS: PageCount = PageCount(64);

/// The parts that hold all data of `runs`, which are in order: those between the longest runs of
/// zeros.
pub(super) fn parts_of(runs: impl Iterator<Item = LocatedRun>) -> Vec<PageRange> {
    parts(runs, MOST_PARTS)
}

fn parts(runs: impl Iterator<Item = LocatedRun>, most: usize) -> Vec<PageRange> {
    let is_data = |run: &LocatedRun| matches!(run.location, PageLocation::Data { .. });
    let mut parts: Vec<PageRange> = Vec::new();
    for run in runs.filter(is_data) {
        match parts.last_mut() {
            Some(last) if run.pages.start.0 < last.end.0 + SHORTEST_ZEROS.0 => {
                last.end = run.pages.end
            }
            _ => parts.push(run.pages),
        }
    }
    if parts.len() <= most {
        return parts;
    }
    let mut gaps: Vec<u64> = parts.windows(2).map(|pair| pair[1].start.0 - pair[0].end.0).collect();
    gaps.sort_unstable_by(|one, other| other.cmp(one));
    // Of equal ones all are closed: then there are fewer parts.
    let longest_closed = gaps[most - 1];
    let mut joined: Vec<PageRange> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start.0 - last.end.0 <= longest_closed => last.end = part.end,
            _ => joined.push(part),
        }
    }
    joined
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::{FrameNo, PackNo, PageIndex, Slot};

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(PageIndex(start), PageIndex(end))
    }

    fn data(start: u64, end: u64) -> LocatedRun {
        let location = PageLocation::Data { pack: PackNo(0), frame: FrameNo(0), slot: Slot(0) };
        LocatedRun { pages: range(start, end), location }
    }

    fn zeros(start: u64, end: u64) -> LocatedRun {
        LocatedRun { pages: range(start, end), location: PageLocation::Zero }
    }

    #[test]
    fn hydration_parts_leave_out_long_runs_of_zeros_only() {
        let runs = [
            zeros(0, 100),
            data(100, 101),
            zeros(101, 164),
            data(164, 170),
            data(170, 171),
            zeros(171, 235),
            data(235, 236),
            zeros(236, 1 << 20),
        ];
        assert_eq!(parts_of(runs.into_iter()), [range(100, 171), range(235, 236)]);
        assert_eq!(parts_of([zeros(0, 9)].into_iter()), []);
    }

    #[test]
    fn hydration_parts_are_few_and_split_at_the_longest_runs_of_zeros() {
        // Gaps of 100, 300, 200, 400 pages.
        let runs =
            || [data(0, 1), data(101, 102), data(402, 403), data(603, 604), data(1004, 1005)];
        assert_eq!(
            parts(runs().into_iter(), 3),
            [range(0, 102), range(402, 604), range(1004, 1005)]
        );
        assert_eq!(parts(runs().into_iter(), 1), [range(0, 1005)]);
        assert_eq!(parts(runs().into_iter(), 5).len(), 5);
        let equal = (0..10).map(|number| data(number * 1000, number * 1000 + 1));
        assert_eq!(parts(equal, 4), [range(0, 9001)]);
    }
}
