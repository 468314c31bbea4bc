//! The base image: content that never changes and that every guest can check.
//!
//! A base image starts with [`RESERVED_PAGES`] of zeros, which a guest's overlay may use as a
//! journal; all pages after that are generated from their place. A VM restored onto a wrong or
//! damaged read-only layer reads a page that does not fit.

use crate::journal::Medium;
use crate::page::{Flaw, Kind, PAGE_BYTES, Page, Stamp, mix};
use std::io::{self, Write};

/// 16 MiB.
pub(crate) const RESERVED_PAGES: u64 = 4096;
const BASE_RUN: u64 = 0x5749_544e_4553_5331;
/// 1 TiB: an image larger than that is a mistaken argument.
const MAX_PAGES: u64 = 1 << 28;

fn stamp(place: u64, pages: u64) -> Stamp {
    Stamp { kind: Kind::Base, run: BASE_RUN, place, step: 0, digest: pages }
}

/// Writes a whole image of `pages` pages.
pub(crate) fn write_image(out: &mut impl Write, pages: u64) -> io::Result<()> {
    if !(RESERVED_PAGES + 1..=MAX_PAGES).contains(&pages) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a base image has 17 MiB to 1 TiB",
        ));
    }
    let mut page = Page::zeroed();
    for place in 0..pages {
        if place >= RESERVED_PAGES {
            page.fill(&stamp(place, pages));
        }
        out.write_all(page.bytes())?;
    }
    out.flush()
}

pub(crate) struct Base<M> {
    medium: M,
    pages: u64,
    reads: u64,
    page: Page,
    fleecing: Page,
}

#[derive(Debug)]
pub(crate) enum BaseFlaw {
    Page(Flaw),
    Io { place: u64, error: io::Error },
}

impl std::fmt::Display for BaseFlaw {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BaseFlaw::Page(flaw) => write!(out, "{flaw}"),
            BaseFlaw::Io { place, error } => write!(out, "read page {place}: {error}"),
        }
    }
}

impl<M: Medium> Base<M> {
    /// Reads the image's own size from its first generated page.
    pub(crate) fn open(mut medium: M, bytes: u64) -> io::Result<Self> {
        let mut page = Page::zeroed();
        medium.read_page(RESERVED_PAGES, &mut page)?;
        let claimed = page.stamp().map(|stamp| stamp.digest).unwrap_or(0);
        let fits = claimed > RESERVED_PAGES && claimed <= bytes / PAGE_BYTES as u64;
        if !fits || page.check(&stamp(RESERVED_PAGES, claimed), &mut Page::zeroed()).is_err() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a base image made by `witness make-base`",
            ));
        }
        Ok(Base { medium, pages: claimed, reads: 0, page, fleecing: Page::zeroed() })
    }

    /// Checks one pseudo-random generated page.
    pub(crate) fn check_one(&mut self) -> Result<(), BaseFlaw> {
        let place = RESERVED_PAGES + mix(self.reads) % (self.pages - RESERVED_PAGES);
        self.reads += 1;
        let read = self.medium.read_page(place, &mut self.page);
        read.map_err(|error| BaseFlaw::Io { place, error })?;
        self.page.check(&stamp(place, self.pages), &mut self.fleecing).map_err(BaseFlaw::Page)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    struct Image(Vec<u8>);

    impl Medium for Image {
        fn read_page(&mut self, place: u64, page: &mut Page) -> io::Result<()> {
            let at = place as usize * PAGE_BYTES;
            let bytes = self.0.get(at..at + PAGE_BYTES).ok_or(io::ErrorKind::UnexpectedEof)?;
            page.bytes_mut().copy_from_slice(bytes);
            Ok(())
        }
        fn write_page(&mut self, _: u64, _: &Page) -> io::Result<()> {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
        fn make_durable(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn image(pages: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_image(&mut bytes, pages).expect("a vector takes it");
        bytes
    }

    #[test]
    fn an_image_is_deterministic_and_checks_itself() {
        let bytes = image(RESERVED_PAGES + 3);
        assert!(bytes == image(RESERVED_PAGES + 3));
        let length = bytes.len() as u64;
        let mut base = Base::open(Image(bytes), length).expect("a fresh image");
        assert!((0..50).all(|_| base.check_one().is_ok()));
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let mut bytes = image(RESERVED_PAGES + 3);
        bytes[(RESERVED_PAGES as usize + 2) * PAGE_BYTES + 99] ^= 1;
        let length = bytes.len() as u64;
        let mut base = Base::open(Image(bytes), length).expect("its first page is whole");
        assert!((0..50).any(|_| matches!(
            base.check_one(),
            Err(BaseFlaw::Page(Flaw::Damaged { at: 99, .. }))
        )));
    }

    #[test]
    fn other_disks_are_refused() {
        let blank = vec![0; (RESERVED_PAGES as usize + 3) * PAGE_BYTES];
        let length = blank.len() as u64;
        assert!(Base::open(Image(blank), length).is_err());
        assert!(Base::open(Image(Vec::new()), 0).is_err());
        let short = image(RESERVED_PAGES + 3);
        assert!(Base::open(Image(short), 4096).is_err());
    }
}
