//! Against a naive model that looks at each piece by itself.

use proptest::prelude::*;

use super::*;
use crate::nbd::context;

const PIECE: u64 = 8;

fn extents(context: &str, flags: &[u32]) -> ContextExtents {
    let mut all = ContextExtents { context: context.into(), extents: Vec::new() };
    for (at, flags) in flags.iter().enumerate() {
        all.push(Extent { start: at as u64, end: at as u64 + 1, flags: *flags });
    }
    all
}

fn naive(belongs: &[bool], zero: &[bool]) -> Vec<Option<Content>> {
    let pieces = belongs.chunks(PIECE as usize).zip(zero.chunks(PIECE as usize));
    let content = |(belongs, zero): (&[bool], &[bool])| {
        let all_zero = belongs.iter().zip(zero).all(|(belongs, zero)| *belongs && *zero);
        belongs.contains(&true).then_some(if all_zero { Content::Zero } else { Content::Data })
    };
    pieces.map(content).collect()
}

fn spread(ranges: &[ContentRange], bytes: u64) -> Vec<Option<Content>> {
    let mut pieces = vec![None; bytes.div_ceil(PIECE) as usize];
    for range in ranges {
        assert!(range.start < range.end && range.start % PIECE == 0, "{range:?}");
        assert!(range.end % PIECE == 0 || range.end == bytes, "{range:?}");
        for piece in range.start / PIECE..range.end.div_ceil(PIECE) {
            assert_eq!(pieces[piece as usize].replace(range.content), None, "covered twice");
        }
    }
    pieces
}

proptest! {
    #[test]
    fn dirty_and_depth_agree_with_the_model(cells in prop::collection::vec((0u32..4, 0u32..4), 1..200), runs in 1usize..20) {
        // Long runs and short ones.
        let cells: Vec<_> = cells.iter().flat_map(|cell| std::iter::repeat_n(*cell, runs)).collect();
        let states: Vec<u32> = cells.iter().map(|(state, _)| *state).collect();
        let flags: Vec<u32> = cells.iter().map(|(_, flags)| *flags).collect();
        let zero: Vec<bool> = states.iter().map(|state| state & STATE_ZERO != 0).collect();
        let bytes = cells.len() as u64;
        let allocation = extents(context::BASE_ALLOCATION, &states);
        let dirty: Vec<bool> = flags.iter().map(|flags| flags & 1 != 0).collect();
        let got = content_ranges(&allocation, &extents("qemu:dirty-bitmap:x", &flags), PIECE, bytes);
        prop_assert_eq!(spread(&got, bytes), naive(&dirty, &zero));
        let own: Vec<bool> = flags.iter().map(|depth| *depth == 1 || *depth == 2).collect();
        let got = content_ranges(&allocation, &extents(context::ALLOCATION_DEPTH, &flags), PIECE, bytes);
        prop_assert_eq!(spread(&got, bytes), naive(&own, &zero));
    }
}
