//! Whether two segments say the same.

use super::directory::PackPlace;
use super::error::IndexError;
use super::run::{Placed, PlacedRun};
use super::segment::Segment;
use crate::names::SpaceName;
use crate::units::{PageCount, PageRange};

/// The first pages of these spaces of which two segments say different things; `None` if there are
/// none. How they are cut into blocks and runs, and how they number their packs, does not count.
///
/// Holds a block of each.
///
/// # Errors
/// When a block of either is damaged.
pub fn first_difference<A: AsRef<[u8]>, B: AsRef<[u8]>>(
    one: &Segment<A>,
    other: &Segment<B>,
    spaces: &[(SpaceName, PageCount)],
) -> Result<Option<(SpaceName, PageRange)>, IndexError> {
    let packs = (one.directory().packs(), other.directory().packs());
    for (space, size) in spaces {
        let mut ones = joined(one.runs(space, size.all()));
        let mut others = joined(other.runs(space, size.all()));
        loop {
            let pages = match (ones.next().transpose()?, others.next().transpose()?) {
                (None, None) => break,
                (Some(run), None) | (None, Some(run)) => run.pages,
                (Some(one), Some(other)) => {
                    let is_same = is_same((one.content, packs.0), (other.content, packs.1));
                    match difference(one.pages, other.pages, is_same) {
                        Some(pages) => pages,
                        None => continue,
                    }
                }
            };
            return Ok(Some((space.clone(), pages)));
        }
    }
    Ok(None)
}

/// Runs as long as they can be.
fn joined<E>(
    mut runs: impl Iterator<Item = Result<PlacedRun, E>>,
) -> impl Iterator<Item = Result<PlacedRun, E>> {
    let mut open: Option<PlacedRun> = None;
    std::iter::from_fn(move || {
        loop {
            match runs.next() {
                None => return open.take().map(Ok),
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(run)) if open.as_mut().is_some_and(|open| open.try_append(&run)) => {}
                Some(Ok(run)) => {
                    if let Some(whole) = open.replace(run) {
                        return Some(Ok(whole));
                    }
                }
            }
        }
    })
}

/// The first pages that only one of two runs has, or that begin with other content.
fn difference(one: PageRange, other: PageRange, is_same: bool) -> Option<PageRange> {
    let (start, end) = if one.start != other.start {
        (one.start.min(other.start), one.start.max(other.start))
    } else if is_same {
        (one.end.min(other.end), one.end.max(other.end))
    } else {
        (one.start, one.end.min(other.end))
    };
    (start < end).then(|| PageRange::new(start, end))
}

fn is_same(
    (one, packs): (Placed, &[PackPlace]),
    (other, other_packs): (Placed, &[PackPlace]),
) -> bool {
    match (one, other) {
        (
            Placed::Data { pack, frame, first_slot },
            Placed::Data { pack: other_pack, frame: other_frame, first_slot: other_slot },
        ) => {
            packs[pack.as_usize()] == other_packs[other_pack.as_usize()]
                && (frame, first_slot) == (other_frame, other_slot)
        }
        (one, other) => one == other,
    }
}
