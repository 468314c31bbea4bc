//! A read-only view of a memory file, for copying large pieces of it.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use checkpoint_format::as_index;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The first `len` bytes of a file that cannot shrink, mapped until this is dropped.
#[derive(Debug)]
pub(crate) struct ReadMapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping stays where it is until the drop, and is only ever read, by raw copies that
// any thread may make.
unsafe impl Send for ReadMapping {}
// SAFETY: as above; no method changes `self`.
unsafe impl Sync for ReadMapping {}

impl ReadMapping {
    /// The caller has checked that the file is sealed against shrinking and has `len` bytes;
    /// otherwise a read could meet SIGBUS.
    pub(crate) fn new(file: impl AsFd, len: u64) -> io::Result<Self> {
        let size = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: without an address hint or MAP_FIXED the kernel chooses addresses that nothing
        // else uses.
        let start =
            unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self { start, len: size.get() })
    }

    /// Copies from `offset` on.
    ///
    /// # Panics
    /// When the piece is not inside.
    pub(crate) fn copy(&self, offset: u64, out: &mut [u8]) {
        let inside = self.len.checked_sub(out.len()).is_some_and(|last| offset <= last as u64);
        assert!(inside, "{} bytes at {offset} of {}", out.len(), self.len);
        // SAFETY: the source is inside the mapping, as just checked, and cannot vanish; it does not
        // overlap `out`, which is ordinary memory of this process. The guest may write to the
        // source meanwhile: that can tear the copy, which callers expect, and no reference to the
        // source is ever made.
        unsafe {
            let from = self.start.as_ptr().cast::<u8>().add(as_index(offset));
            std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len());
        }
    }
}

impl Drop for ReadMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference to it outlives a call of `copy`.
        let unmapped = unsafe { munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping our own memory");
    }
}
