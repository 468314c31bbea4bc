//! A page whose whole content follows from its stamp, so that any reader can say what it must hold.
//!
//! The stamp (what kind of page, which run, which place, which step) sits in the first words
//! together with a checksum of the page; every other word is generated from the stamp. A checker
//! regenerates the page and compares all of it. The checksum is only there to tell the two ways of
//! being wrong apart: a page that is intact but belongs to another instant, and a page that is
//! damaged or torn.

use std::fmt;

pub(crate) const PAGE_BYTES: usize = 4096;
const WORD: usize = 8;
const HEADER_WORDS: usize = 6;
const CHECKSUM_WORD: usize = 5;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// 4 KiB aligned to 4 KiB, because `O_DIRECT` wants an aligned buffer.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; PAGE_BYTES]);

impl Page {
    pub(crate) fn zeroed() -> Self {
        Page([0; PAGE_BYTES])
    }

    pub(crate) fn bytes(&self) -> &[u8; PAGE_BYTES] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8; PAGE_BYTES] {
        &mut self.0
    }

    fn word(&self, index: usize) -> u64 {
        let mut word = [0; WORD];
        word.copy_from_slice(&self.0[index * WORD..(index + 1) * WORD]);
        u64::from_le_bytes(word)
    }

    fn set_word(&mut self, index: usize, value: u64) {
        self.0[index * WORD..(index + 1) * WORD].copy_from_slice(&value.to_le_bytes());
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        (0..PAGE_BYTES / WORD).map(|index| self.word(index))
    }

    /// Makes the page exactly what `stamp` says.
    pub(crate) fn fill(&mut self, stamp: &Stamp) {
        for (index, value) in stamp.words().into_iter().enumerate() {
            self.set_word(index, value);
        }
        self.set_word(CHECKSUM_WORD, 0);
        let seed = stamp.words().into_iter().fold(GOLDEN, |seed, word| mix(seed ^ word));
        for (index, chunk) in self.0.chunks_exact_mut(WORD).enumerate().skip(HEADER_WORDS) {
            chunk.copy_from_slice(&body_word(seed, index).to_le_bytes());
        }
        let sum = self.checksum();
        self.set_word(CHECKSUM_WORD, sum);
    }

    /// The stamp that the page itself claims, if its checksum holds.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        let intact = self.word(CHECKSUM_WORD) == self.checksum();
        let kind = Kind::from_magic(self.word(0))?;
        intact.then(|| Stamp {
            kind,
            run: self.word(1),
            place: self.word(2),
            step: self.word(3),
            digest: self.word(4),
        })
    }

    /// The step in the header, whatever the state of the rest: what a digest over the real memory
    /// is made of.
    pub(crate) fn claimed_step(&self) -> u64 {
        self.word(3)
    }

    fn checksum(&self) -> u64 {
        let words = self.words().enumerate().filter(|(index, _)| *index != CHECKSUM_WORD);
        words.fold(GOLDEN, |sum, (_, word)| (sum ^ word).wrapping_mul(GOLDEN | 1).rotate_left(27))
    }

    /// Compares the whole page with what `expected` generates; `fleecing` spares an allocation per
    /// check.
    pub(crate) fn check(&self, expected: &Stamp, fleecing: &mut Page) -> Result<(), Flaw> {
        fleecing.fill(expected);
        let Some(at) = first_difference(&self.0, &fleecing.0) else {
            return Ok(());
        };
        let expected = *expected;
        match self.stamp() {
            Some(found) => Err(Flaw::OtherInstant { expected, found }),
            None => Err(Flaw::Damaged { expected, at }),
        }
    }
}

fn first_difference(left: &[u8; PAGE_BYTES], right: &[u8; PAGE_BYTES]) -> Option<usize> {
    if left == right {
        return None;
    }
    left.iter().zip(right).position(|(l, r)| l != r)
}

fn body_word(seed: u64, index: usize) -> u64 {
    let word = seed.wrapping_add((index as u64).wrapping_mul(GOLDEN));
    (word ^ (word >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The splitmix64 finaliser: spreads every input bit over the result.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(GOLDEN);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Table,
    Journal,
    Base,
}

impl Kind {
    fn magic(self) -> u64 {
        let text = match self {
            Kind::Table => b"WITNtabl",
            Kind::Journal => b"WITNjour",
            Kind::Base => b"WITNbase",
        };
        u64::from_le_bytes(*text)
    }

    fn from_magic(magic: u64) -> Option<Self> {
        [Kind::Table, Kind::Journal, Kind::Base].into_iter().find(|kind| kind.magic() == magic)
    }
}

/// What a page is: everything in it follows from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub kind: Kind,
    /// Random number of one run of the program, so that pages of two boots never match.
    pub run: u64,
    /// Index of the page in the table, in the journal or in the base image.
    pub place: u64,
    pub step: u64,
    /// Journal: digest of the whole table after `step`. Base: pages in the image. Table: zero.
    pub digest: u64,
}

impl Stamp {
    fn words(&self) -> [u64; HEADER_WORDS - 1] {
        [self.kind.magic(), self.run, self.place, self.step, self.digest]
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { kind, run, place, step, digest } = self;
        write!(out, "{kind:?}/run={run:016x}/place={place}/step={step}/digest={digest:016x}")
    }
}

/// How a page contradicts what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    OtherInstant { expected: Stamp, found: Stamp },
    Damaged { expected: Stamp, at: usize },
}

impl fmt::Display for Flaw {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Flaw::OtherInstant { expected, found } => {
                write!(out, "intact page of another instant: expected {expected}, found {found}")
            }
            Flaw::Damaged { expected, at } => {
                write!(out, "damaged page: expected {expected}, first wrong byte {at}")
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn stamp(step: u64) -> Stamp {
        Stamp { kind: Kind::Table, run: 7, place: 3, step, digest: 0 }
    }

    fn filled(step: u64) -> Page {
        let mut page = Page::zeroed();
        page.fill(&stamp(step));
        page
    }

    #[test]
    fn a_filled_page_is_what_its_stamp_says() {
        assert_eq!(filled(9).check(&stamp(9), &mut Page::zeroed()), Ok(()));
        assert_eq!(filled(9).stamp(), Some(stamp(9)));
    }

    #[test]
    fn every_flipped_bit_is_damage_at_its_byte() {
        let mut fleecing = Page::zeroed();
        for at in (0..PAGE_BYTES).step_by(5).chain(0..64) {
            let mut page = filled(9);
            page.bytes_mut()[at] ^= 1 << (at % 8);
            assert_eq!(
                page.check(&stamp(9), &mut fleecing),
                Err(Flaw::Damaged { expected: stamp(9), at })
            );
        }
    }

    #[test]
    fn a_page_of_an_older_step_is_distinguished_from_damage() {
        let flaw = filled(8).check(&stamp(9), &mut Page::zeroed());
        assert_eq!(flaw, Err(Flaw::OtherInstant { expected: stamp(9), found: stamp(8) }));
    }

    #[test]
    fn a_page_torn_between_two_steps_is_damage() {
        let mut page = filled(9);
        page.bytes_mut()[2048..].copy_from_slice(&filled(8).bytes()[2048..]);
        assert_eq!(
            page.check(&stamp(9), &mut Page::zeroed()),
            Err(Flaw::Damaged { expected: stamp(9), at: 2048 })
        );
    }

    #[test]
    fn a_page_of_zeros_has_no_stamp() {
        assert_eq!(Page::zeroed().stamp(), None);
    }
}
