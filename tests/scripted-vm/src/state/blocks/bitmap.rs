//! A dirty bitmap.

use std::collections::BTreeSet;

#[derive(Clone)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) granularity: u64,
    pub(crate) is_recording: bool,
    /// Dirty granules.
    bits: BTreeSet<u64>,
}

impl Bitmap {
    pub(crate) fn new(name: &str, granularity: u64, is_recording: bool) -> Self {
        Self { name: name.to_owned(), granularity, is_recording, bits: BTreeSet::new() }
    }

    /// The guest wrote there.
    pub(crate) fn note(&mut self, offset: u64, bytes: u64) {
        if self.is_recording && bytes > 0 {
            self.bits.extend(offset / self.granularity..=(offset + bytes - 1) / self.granularity);
        }
    }

    pub(crate) fn truncate(&mut self, bytes: u64) {
        let granules = bytes.div_ceil(self.granularity);
        self.bits.retain(|bit| *bit < granules);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for bit in &other.bits {
            let start = bit * other.granularity;
            let end = start + other.granularity - 1;
            self.bits.extend(start / self.granularity..=end / self.granularity);
        }
    }

    pub(crate) fn is_dirty(&self, offset: u64) -> bool {
        self.bits.contains(&(offset / self.granularity))
    }

    /// As QEMU counts: bytes.
    pub(crate) fn count(&self) -> u64 {
        self.bits.len() as u64 * self.granularity
    }
}
