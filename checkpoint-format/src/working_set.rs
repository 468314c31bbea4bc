//! The working set of a VM: the pages that its guest needed in the first seconds after a restore.
//!
//! The next restore reads them before all others. A hint: what it says wrongly, or what is missing,
//! costs time and changes no page, so a file that cannot be read is as good as none.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::envelope::{Envelope, EnvelopeError};
use crate::names::SpaceName;
use crate::range_set::RangeSet;
use crate::units::{MAX_SPACE_PAGES, PageCount, PageIndex, PageRange};

/// The most ranges of a working set.
pub const MAX_WORKING_SET_RANGES: usize = 1 << 15;
/// Longest file with a working set.
pub const MAX_WORKING_SET_LEN: usize = 2 << 20;

const ENVELOPE: Envelope =
    Envelope { kind: "stillpoint-working-set", version: 1, max_body: MAX_WORKING_SET_LEN - 256 };

/// Pages of one space, without an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    /// The space, of whichever checkpoint of the VM is restored.
    pub space: SpaceName,
    /// The pages that were needed.
    pub pages: RangeSet,
}

/// A working set that cannot be read, or is too large. The caller adds the file's name.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum WorkingSetError {
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    #[error("parse the body of the working set")]
    Json { source: serde_json::Error },
    #[error("the working set has {count} ranges of pages, the limit is {MAX_WORKING_SET_RANGES}")]
    TooMany { count: usize },
    #[error(
        "the working set has {count} pages from {first} on: none, in no space, or out of order"
    )]
    Range { first: u64, count: u64 },
}

/// The file's body.
#[derive(Serialize, Deserialize)]
struct Body {
    space: SpaceName,
    /// First page and number of pages of each range.
    pages: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// The bytes of the file.
    ///
    /// # Errors
    /// When it has more than [`MAX_WORKING_SET_RANGES`] ranges.
    pub fn encode(&self) -> Result<Vec<u8>, WorkingSetError> {
        let ranges = self.pages.within(PageCount(MAX_SPACE_PAGES).all());
        let pages: Vec<_> = ranges.map(|range| (range.start.0, range.len().0)).collect();
        let count = pages.len();
        if count > MAX_WORKING_SET_RANGES {
            return Err(WorkingSetError::TooMany { count });
        }
        let body = Body { space: self.space.clone(), pages };
        let body = serde_json::to_vec(&body).map_err(|source| WorkingSetError::Json { source })?;
        Ok(ENVELOPE.wrap(&body)?)
    }

    /// Verifies the digest of what [`encode`](Self::encode) has made, and reads it.
    ///
    /// # Errors
    /// When the bytes are damaged, of another version, or not what `encode` writes.
    pub fn parse(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let body = ENVELOPE.unwrap(bytes)?;
        let body: Body =
            serde_json::from_slice(body).map_err(|source| WorkingSetError::Json { source })?;
        let count = body.pages.len();
        if count > MAX_WORKING_SET_RANGES {
            return Err(WorkingSetError::TooMany { count });
        }
        let (mut pages, mut next) = (RangeSet::default(), 0);
        for (first, count) in body.pages {
            let wrong = WorkingSetError::Range { first, count };
            let end = first.checked_add(count).filter(|end| *end <= MAX_SPACE_PAGES);
            let Some(end) = end.filter(|end| next <= first && first < *end) else {
                return Err(wrong);
            };
            pages.insert(PageRange::new(PageIndex(first), PageIndex(end)));
            next = end;
        }
        Ok(Self { space: body.space, pages })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn set(ranges: &[(u64, u64)]) -> WorkingSet {
        let mut pages = RangeSet::default();
        for (start, end) in ranges {
            pages.insert(PageRange::new(PageIndex(*start), PageIndex(*end)));
        }
        WorkingSet { space: SpaceName::ram("pc.ram").unwrap(), pages }
    }

    fn file(body: &str) -> Vec<u8> {
        ENVELOPE.wrap(body.as_bytes()).unwrap()
    }

    proptest! {
        #[test]
        fn working_set_comes_back(
            ranges in prop::collection::vec((0..1000_u64, 1..50_u64), 0..40),
        ) {
            let ends = ranges.into_iter().map(|(start, len)| (start, start + len));
            let set = set(&ends.collect::<Vec<_>>());
            prop_assert_eq!(WorkingSet::parse(&set.encode().unwrap()).unwrap(), set);
        }

        #[test]
        fn damaged_working_set_is_refused(at in 0..100_usize, bit in 0..8_u32) {
            let mut bytes = set(&[(1, 5), (900, 1000)]).encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(WorkingSet::parse(&bytes).is_err());
        }
    }

    /// Old files must be read by every later version.
    #[test]
    fn file_is_as_documented() {
        let body = r#"{"space":"ram:pc.ram","pages":[[1,4],[900,100]]}"#;
        assert_eq!(set(&[(1, 5), (900, 1000)]).encode().unwrap(), file(body));
    }

    #[test]
    fn ranges_that_no_writer_makes_are_refused() {
        let empty = r#"{"space":"ram:r","pages":[]}"#;
        assert_eq!(WorkingSet::parse(&file(empty)).unwrap().pages, RangeSet::default());
        for pages in [
            "[[1,0]]",
            "[[5,2],[3,1]]",
            "[[5,2],[6,1]]",
            "[[18446744073709551615,1]]",
            "[[0,18446744073709551615]]",
            "[[1,-1]]",
            "[[1]]",
            "7",
        ] {
            let bytes = file(&format!(r#"{{"space":"ram:r","pages":{pages}}}"#));
            assert!(WorkingSet::parse(&bytes).is_err(), "{pages}");
        }
    }

    #[test]
    fn too_many_ranges_are_refused_by_writer_and_reader() {
        let many: Vec<_> =
            (0..=MAX_WORKING_SET_RANGES as u64).map(|at| (at * 2, at * 2 + 1)).collect();
        assert!(matches!(set(&many).encode(), Err(WorkingSetError::TooMany { .. })));
        assert!(set(&many[1..]).encode().unwrap().len() <= MAX_WORKING_SET_LEN);
        let pages: Vec<_> = many.iter().map(|(start, _)| format!("[{start},1]")).collect();
        let bytes = file(&format!(r#"{{"space":"ram:r","pages":[{}]}}"#, pages.join(",")));
        assert!(matches!(WorkingSet::parse(&bytes), Err(WorkingSetError::TooMany { .. })));
    }
}
