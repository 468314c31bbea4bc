//! A second mapping of a memory file, of which only the page table counts.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use checkpoint_format::as_index;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use plugin_protocol::uffd;

use super::check;
use super::pagemap::{Categories, ScanBuffer, Then, scan};
use super::write_protect::register;

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// The first bytes of a file, mapped page by page and only when [`Self::map`] or [`Self::is_zero`]
/// asks for it.
///
/// A hole punched into the file takes its pages out of every mapping, and here nothing brings a
/// page back but those two calls. To that end the kernel must map no page on its own that was not
/// asked for:
/// - not the neighbours of one that was (fault-around): the mapping is registered with a
///   userfaultfd, which switches that off;
/// - not 2 MiB at once: it begins one page after a multiple of 2 MiB, where no huge page fits;
/// - not in a child process: `fork` does not copy it.
#[derive(Debug)]
pub(crate) struct WatchMapping {
    reserved: NonNull<libc::c_void>,
    reserved_len: usize,
    addresses: Range<u64>,
    pagemap: File,
    /// When it closes, the registration ends.
    _uffd: OwnedFd,
}

// SAFETY: the mapping stays where it is until the drop, and is only ever read, by volatile reads
// that any thread may make.
unsafe impl Send for WatchMapping {}
// SAFETY: as above; no method changes `self`.
unsafe impl Sync for WatchMapping {}

impl WatchMapping {
    /// The caller has checked that the file is sealed against shrinking and has `len` bytes. It
    /// must be open for writing, which userfaultfd demands; nothing is written.
    pub(crate) fn new(file: impl AsFd, len: u64) -> io::Result<Self> {
        let uffd = uffd::open().map_err(|none| none.error)?.fd;
        let size = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let reserved_len = size.checked_add(2 * HUGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: without an address hint or MAP_FIXED the kernel chooses addresses that nothing
        // else uses.
        let reserved = unsafe {
            mmap_anonymous(
                None,
                reserved_len,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )?
        };
        let start = (reserved.as_ptr() as usize).next_multiple_of(HUGE_PAGE) + PAGE;
        let addresses = start as u64..start as u64 + len;
        let pagemap = File::open("/proc/self/pagemap")?;
        let watch =
            Self { reserved, reserved_len: reserved_len.get(), addresses, pagemap, _uffd: uffd };
        // SAFETY: replaces addresses in the middle of those just reserved, which nothing else uses.
        unsafe {
            mmap(
                NonZeroUsize::new(start),
                size,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
                file,
                0,
            )?
        };
        watch.advise(&watch.addresses, libc::MADV_DONTFORK)?;
        register(watch._uffd.as_fd(), &watch.addresses)?;
        Ok(watch)
    }

    fn advise(&self, addresses: &Range<u64>, advice: libc::c_int) -> io::Result<()> {
        let len = as_index(addresses.end - addresses.start);
        // SAFETY: a part of our own mapping; neither advice that is given here changes what it
        // holds.
        check(unsafe { libc::madvise(addresses.start as *mut libc::c_void, len, advice) }).map(drop)
    }

    fn addresses_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = self.addresses.start;
        assert!(
            bytes.start <= bytes.end && start + bytes.end <= self.addresses.end,
            "bytes {bytes:?} of a watched file"
        );
        start + bytes.start..start + bytes.end
    }

    /// Maps what the file holds in these bytes. What it does not hold, it gets: zeros.
    pub(crate) fn map(&self, bytes: &Range<u64>) -> io::Result<()> {
        self.advise(&self.addresses_of(bytes), libc::MADV_POPULATE_READ)
    }

    /// Whether the page at `offset` holds nothing but zeros. Maps it.
    pub(crate) fn is_zero(&self, offset: u64) -> bool {
        let page = self.addresses_of(&(offset..offset + PAGE as u64)).start as *const u64;
        // SAFETY: inside the mapping, as just checked, which cannot vanish, and aligned like its
        // page. The guest may write to it meanwhile: each word is read once, and no reference to it
        // is made.
        (0..PAGE / size_of::<u64>()).all(|word| unsafe { page.add(word).read_volatile() } == 0)
    }

    /// Calls `found` with runs of bytes of the file that are not mapped, in order.
    pub(crate) fn not_mapped(
        &self,
        buffer: &mut ScanBuffer,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let start = self.addresses.start;
        scan(
            &self.pagemap,
            self.addresses.clone(),
            Categories::ABSENT,
            Then::Leave,
            buffer,
            |run| found(run.start - start..run.end - start),
        )
    }
}

impl Drop for WatchMapping {
    fn drop(&mut self) {
        // SAFETY: the addresses are ours, and nothing borrows from them any more.
        let unmapped = unsafe { munmap(self.reserved, self.reserved_len) };
        debug_assert!(unmapped.is_ok(), "unmapping our own memory");
    }
}
