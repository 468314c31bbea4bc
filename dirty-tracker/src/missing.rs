//! Memory that is in use before it has arrived: a thread of QEMU that touches a missing page waits
//! until it is installed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use checkpoint_format::{PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::block::{BlockMemory, TrackedBlock, covering};
use crate::error::TrackerError;
use crate::guest_memory::GuestMemory;
use crate::handles::PluginHandles;
use crate::sys::missing;
use crate::sys::write_protect::register_missing;

/// The pages of one RAM block that are still to come.
///
/// The RAM file is empty at first. A thread of QEMU that touches a page in one of the parts that
/// were given to [`MissingPages::begin`], itself or by a system call, waits until
/// [`MissingPages::install`] makes it. Installed pages are write-protected, so they count as not
/// written. A page that exists is never replaced, so a page that the guest has changed stays.
///
/// Threads wait in the kernel, also when this process ends: the plugin holds the userfaultfd too.
/// The next process calls [`MissingPages::resume`].
///
/// **No process may read the RAM file where pages are missing through a mapping of its own**: the
/// kernel would make them, with zeros.
#[derive(Debug)]
pub struct MissingPages {
    uffd: OwnedFd,
    block: TrackedBlock,
    memory: GuestMemory,
}

impl MissingPages {
    /// From now on a thread that touches a page in `parts` that does not exist waits. To be called
    /// before the guest may run, with write tracking registered; what QEMU has put there already is
    /// discarded.
    ///
    /// Each part costs two mappings in QEMU for as long as it lives.
    ///
    /// # Errors
    /// When the RAM block is no file that QEMU shares with this process, or the kernel refuses.
    pub fn begin(
        handles: &PluginHandles,
        block: TrackedBlock,
        parts: &[PageRange],
    ) -> Result<Self, TrackerError> {
        let pages = Self::resume(handles, block)?;
        for part in parts {
            let bytes = part.bytes();
            let addresses = pages.address(part.start)..pages.address(part.end);
            register_missing(pages.uffd.as_fd(), &addresses).map_err(|source| {
                TrackerError::Register { block: pages.block.name.clone(), source }
            })?;
            for data in pages.memory.data_in(bytes)? {
                pages.memory.discard(data)?;
            }
        }
        Ok(pages)
    }

    /// What an earlier process has begun. Threads that wait for a page which it did not install
    /// have to be woken: [`MissingPages::wake_all`].
    ///
    /// # Errors
    /// When the RAM block is no file that QEMU shares with this process, or is not where it is
    /// said to be.
    pub fn resume(handles: &PluginHandles, block: TrackedBlock) -> Result<Self, TrackerError> {
        block.check(&handles.maps()?)?;
        let BlockMemory::Shared(memory) = block.memory.clone() else {
            let reason = "it is no memory file".to_owned();
            return Err(TrackerError::TrackedBlock { block: block.name, reason });
        };
        let uffd =
            handles.uffd()?.try_clone_to_owned().map_err(|source| TrackerError::MissingHandle {
                what: "userfaultfd",
                remedy: "raise the limit of open files of this process",
                source,
            })?;
        Ok(Self { uffd, block, memory })
    }

    /// Waits until there are faults that no process has read yet, and returns their pages; or until
    /// `stopped` can be read, or its other end closes: then there are none.
    ///
    /// # Errors
    /// When the kernel fails to wait or to read.
    pub fn wait_for_faults(
        &self,
        stopped: BorrowedFd<'_>,
    ) -> Result<Option<Vec<PageIndex>>, TrackerError> {
        loop {
            let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut ready = [wait(self.uffd.as_fd()), wait(stopped)];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                waited => waited.map_err(|errno| self.failed(errno.into()))?,
            };
            let faults = self.read_faults()?;
            if !faults.is_empty() {
                return Ok(Some(faults));
            }
            if ready[1].any() != Some(false) {
                return Ok(None);
            }
        }
    }

    /// Those that there are now.
    fn read_faults(&self) -> Result<Vec<PageIndex>, TrackerError> {
        let faults = missing::read_faults(self.uffd.as_fd()).map_err(|error| self.failed(error))?;
        let inside = faults.into_iter().filter(|fault| self.block.addresses().contains(fault));
        let page = |fault: u64| PageIndex((fault - self.block.host_address) / PAGE_SIZE as u64);
        Ok(inside.map(page).collect())
    }

    /// Makes pages with this content, from `first` on; those that exist stay as they are. Threads
    /// that wait for them continue. Returns how many bytes were made.
    ///
    /// # Panics
    /// When `bytes` are no whole pages.
    ///
    /// # Errors
    /// When they are not in the RAM block, or the kernel fails to make them: it has no memory, say.
    pub fn install(&self, first: PageIndex, bytes: &[u8]) -> Result<u64, TrackerError> {
        assert!(bytes.len().is_multiple_of(PAGE_SIZE), "{} bytes are no pages", bytes.len());
        let start = first.byte_offset().0;
        self.block.check_inside(&(start..start.saturating_add(bytes.len() as u64)))?;
        missing::install(self.uffd.as_fd(), self.address(first), bytes)
            .map_err(|error| self.failed(error))
    }

    /// All threads that wait try again: a fault that an earlier process has read, and not answered,
    /// can be read once more.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wake_all(&self) -> Result<(), TrackerError> {
        missing::wake(self.uffd.as_fd(), &self.block.addresses())
            .map_err(|error| self.failed(error))
    }

    /// The pages in `part` that do not exist, in order.
    ///
    /// # Errors
    /// When the kernel cannot tell data from holes.
    pub fn missing_in(&self, part: PageRange) -> Result<Vec<PageRange>, TrackerError> {
        let mut found = Vec::new();
        let mut at = part.start;
        for data in self.memory.data_in(part.bytes())? {
            let data = covering(data);
            found.push(PageRange::new(at, data.start));
            at = data.end;
        }
        found.push(PageRange::new(at, part.end));
        found.retain(|pages| !pages.is_empty());
        Ok(found)
    }

    fn address(&self, page: PageIndex) -> u64 {
        self.block.host_address + page.byte_offset().0
    }

    fn failed(&self, source: std::io::Error) -> TrackerError {
        TrackerError::Fill { block: self.block.name.clone(), source }
    }
}
