//! A few pages of shared memory of our own, to try tracking on.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Shared anonymous memory (a memory file without a name), unmapped on drop.
pub(crate) struct TrialMemory {
    start: NonNull<libc::c_void>,
    len: usize,
}

impl TrialMemory {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: without an address hint or MAP_FIXED the kernel chooses memory that nothing else
        // uses.
        let start = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_SHARED)? };
        Ok(Self { start, len })
    }

    pub(crate) fn addresses(&self) -> Range<u64> {
        let start = self.start.as_ptr() as u64;
        start..start + self.len as u64
    }

    /// Writes one byte at `offset`.
    ///
    /// # Panics
    /// When `offset` is outside.
    pub(crate) fn write_byte(&mut self, offset: usize) {
        assert!(offset < self.len, "offset {offset} of {}", self.len);
        // SAFETY: within the mapping that `self` owns, as just checked; `&mut self` makes it the
        // only access.
        unsafe { self.start.as_ptr().cast::<u8>().add(offset).write_volatile(1) };
    }
}

impl Drop for TrialMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        let unmapped = unsafe { munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping our own memory");
    }
}
