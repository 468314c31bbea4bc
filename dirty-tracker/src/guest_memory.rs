//! The guest's RAM as a file: a memfd that QEMU maps and this process reads.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use memfd::{FileSeal, Memfd, MemfdOptions};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, fallocate, fcntl};
use nix::unistd::{Whence, lseek};

use crate::error::TrackerError;
use crate::sys::read_mapping::ReadMapping;

/// A file in memory whose size is sealed, so that no process can truncate it under a mapping.
///
/// A page that changes while it is read may come out torn; that is harmless, because its dirty bit
/// makes it come again.
///
/// Small pieces are read with pread (1.3 µs a page, where a page that this process has not touched
/// yet costs 3.4 µs through a mapping), large ones through a mapping (10 GB/s against 4 GB/s;
/// measured on two cores of a VM). Reading holes in large pieces makes the kernel allocate them:
/// read what [`Self::data_ranges`] or the tracker names, or use [`Self::read_sparse`].
///
/// **Tracking does not see what is written here.** It watches QEMU's mapping; write only what needs
/// no tracking, as a restore does before QEMU runs.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    name: Arc<str>,
    file: Arc<File>,
    len: u64,
    /// `None` when the address space has no room for it; everything works without.
    mapping: Option<Arc<ReadMapping>>,
}

/// From this size on a mapping is faster, even one that was not touched before.
const MIN_MAPPED_READ: usize = 32 << 10;

impl GuestMemory {
    /// `len` bytes of zeroes, sealed. The descriptor is close-on-exec; see
    /// [`Self::set_inheritable`].
    ///
    /// # Errors
    /// When the kernel cannot make, size or seal the file.
    pub fn create(name: &str, len: u64) -> Result<Self, TrackerError> {
        let made = MemfdOptions::default().allow_sealing(true).close_on_exec(true).create(name);
        let memfd = made.map_err(|error| {
            cannot(name, "create", "check the memory limits of this process", to_io(error))
        })?;
        let sized = memfd.as_file().set_len(len);
        sized.map_err(|error| cannot(name, "set the size of", "choose a smaller size", error))?;
        let sealed =
            memfd.add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal]);
        sealed.map_err(|error| {
            cannot(name, "seal", "this kernel lacks sealing of memory files", to_io(error))
        })?;
        Ok(Self::of_sealed(name, memfd.into_file(), len))
    }

    /// Takes over a memfd, which must be sealed against shrinking.
    ///
    /// # Errors
    /// When it is no memfd, or not sealed against shrinking.
    pub fn from_fd(name: &str, fd: OwnedFd) -> Result<Self, TrackerError> {
        let foreign = || {
            cannot(name, "use", "it must be a memfd with sealing", ErrorKind::InvalidInput.into())
        };
        let memfd = Memfd::try_from_file(File::from(fd)).map_err(|_| foreign())?;
        let seals = memfd.seals().map_err(|_| foreign())?;
        if !seals.contains(&FileSeal::SealShrink) {
            let remedy = "seal it against shrinking before QEMU maps it";
            return Err(cannot(name, "use", remedy, ErrorKind::InvalidInput.into()));
        }
        let metadata = memfd.as_file().metadata();
        let len = metadata.map_err(|error| cannot(name, "stat", "try again", error))?.len();
        Ok(Self::of_sealed(name, memfd.into_file(), len))
    }

    fn of_sealed(name: &str, file: File, len: u64) -> Self {
        let mapping = ReadMapping::new(&file, len).ok().map(Arc::new);
        Self { name: name.into(), file: Arc::new(file), len, mapping }
    }

    /// The name of the RAM block.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes; it never changes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; never, once it is made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `out` from `offset` on.
    ///
    /// # Errors
    /// When the range is outside of the file, or the kernel fails to read it.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), TrackerError> {
        self.check_range(offset, out.len())?;
        if let Some(mapping) = self.mapping.as_ref().filter(|_| out.len() >= MIN_MAPPED_READ) {
            mapping.copy(offset, out);
            return Ok(());
        }
        self.read_small(offset, out)
    }

    fn read_small(&self, offset: u64, out: &mut [u8]) -> Result<(), TrackerError> {
        let result = self.file.read_exact_at(out, offset);
        result.map_err(|error| cannot(&self.name, "read", "this is a kernel error", error))
    }

    /// Writes `bytes` at `offset`; no tracker sees it.
    ///
    /// # Errors
    /// When the range is outside of the file, or the kernel fails to write it.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), TrackerError> {
        self.check_range(offset, bytes.len())?;
        let result = self.file.write_all_at(bytes, offset);
        result.map_err(|error| cannot(&self.name, "write", "is the host out of memory?", error))
    }

    /// Frees the memory that holds these bytes: they are a hole then.
    ///
    /// # Errors
    /// When the kernel refuses to punch it.
    pub fn discard(&self, bytes: Range<u64>) -> Result<(), TrackerError> {
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = bytes.end.saturating_sub(bytes.start);
        fallocate(&*self.file, mode, number(bytes.start), number(length)).map_err(|errno| {
            cannot(&self.name, "punch a hole into", "this is a kernel error", errno.into())
        })
    }

    fn check_range(&self, offset: u64, length: usize) -> Result<(), TrackerError> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.len => Ok(()),
            end => Err(TrackerError::OutOfRange {
                name: self.name.to_string(),
                start: offset,
                end: end.unwrap_or(u64::MAX),
                len: self.len,
            }),
        }
    }

    /// The byte ranges that hold data, in order; what lies between them is zero and takes no
    /// memory.
    ///
    /// # Errors
    /// When the kernel cannot tell data from holes.
    pub fn data_ranges(&self) -> Result<Vec<Range<u64>>, TrackerError> {
        self.data_in(0..self.len)
    }

    /// The same for a part of it; the ranges end where the part ends.
    ///
    /// # Errors
    /// When the kernel cannot tell data from holes.
    pub fn data_in(&self, part: Range<u64>) -> Result<Vec<Range<u64>>, TrackerError> {
        let part = part.start..part.end.min(self.len);
        let mut ranges = Vec::new();
        let mut at = part.start;
        while at < part.end {
            let Some(start) = self.seek(at, Whence::SeekData)?.filter(|start| *start < part.end)
            else {
                break;
            };
            let end = self.seek(start, Whence::SeekHole)?.unwrap_or(self.len);
            if end <= start {
                // A hole was punched between the two calls.
                at = start + 1;
                continue;
            }
            ranges.push(start..end.min(part.end));
            at = end;
        }
        Ok(ranges)
    }

    /// As [`Self::read`], for memory that may have holes: they are read as zeros and stay holes.
    ///
    /// # Errors
    /// When the range is outside of the file, or the kernel fails to read it.
    pub fn read_sparse(&self, offset: u64, out: &mut [u8]) -> Result<(), TrackerError> {
        self.check_range(offset, out.len())?;
        let end = offset + out.len() as u64;
        if out.len() >= MIN_MAPPED_READ
            && self.seek(offset, Whence::SeekHole)?.is_some_and(|hole| hole >= end)
        {
            return self.read(offset, out);
        }
        self.read_small(offset, out)
    }

    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>, TrackerError> {
        let from = i64::try_from(from).unwrap_or(i64::MAX);
        match lseek(&*self.file, from, whence) {
            Ok(found) => Ok(Some(found.cast_unsigned())),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => {
                Err(cannot(&self.name, "find the data of", "this is a kernel error", errno.into()))
            }
        }
    }

    /// The file descriptor of the memory file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The number to put into QEMU's command line (`mem-path=/proc/self/fd/N`, `ramfd=N`).
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether a program that this process starts gets the descriptor too.
    ///
    /// Every child started meanwhile gets it, not only QEMU: switch it on right before, and off
    /// right after.
    ///
    /// # Errors
    /// When the kernel refuses the flag.
    pub fn set_inheritable(&self, inheritable: bool) -> Result<(), TrackerError> {
        let flags = if inheritable { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
        let result = fcntl(&*self.file, FcntlArg::F_SETFD(flags));
        result
            .map(drop)
            .map_err(|errno| cannot(&self.name, "pass on", "this is a kernel error", errno.into()))
    }

    /// The inode by which the file is found in a memory map.
    ///
    /// # Errors
    /// When the file's metadata cannot be read.
    pub fn inode(&self) -> Result<u64, TrackerError> {
        let metadata = self.file.metadata();
        Ok(metadata.map_err(|error| cannot(&self.name, "stat", "try again", error))?.ino())
    }
}

fn cannot(name: &str, what: &'static str, remedy: &'static str, source: io::Error) -> TrackerError {
    TrackerError::Memory { name: name.to_owned(), what, remedy, source }
}

fn to_io(error: memfd::Error) -> io::Error {
    match error {
        memfd::Error::Create(error)
        | memfd::Error::AddSeals(error)
        | memfd::Error::GetSeals(error) => error,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn reads_what_was_written_and_refuses_the_outside() {
        let memory = GuestMemory::create("test", MIB).unwrap();
        memory.write(MIB - 3, b"end").unwrap();
        let mut out = [9; 4];
        memory.read(MIB - 4, &mut out).unwrap();
        assert_eq!(&out, b"\0end");
        for offset in [MIB - 3, MIB, u64::MAX] {
            assert!(
                matches!(memory.read(offset, &mut out), Err(TrackerError::OutOfRange { .. })),
                "{offset}"
            );
            assert!(
                matches!(memory.write(offset, &out), Err(TrackerError::OutOfRange { .. })),
                "{offset}"
            );
        }
    }

    #[test]
    fn large_and_small_reads_agree() {
        let memory = GuestMemory::create("test", MIB).unwrap();
        let content: Vec<u8> = (0..MIB).map(|at| ((at * at) >> 7) as u8).collect();
        memory.write(0, &content).unwrap();
        for (offset, len) in
            [(0, MIB), (MIB - MIN_MAPPED_READ as u64, MIN_MAPPED_READ as u64), (77, 40_000), (5, 9)]
        {
            let mut out = vec![0; len as usize];
            memory.read(offset, &mut out).unwrap();
            assert!(out == content[offset as usize..][..len as usize], "{len} bytes at {offset}");
        }
        let mut out = vec![0; MIN_MAPPED_READ];
        assert!(matches!(memory.read(MIB - 9, &mut out), Err(TrackerError::OutOfRange { .. })));
    }

    #[test]
    fn data_ranges_are_what_was_written_and_reading_makes_none() {
        let memory = GuestMemory::create("test", 16 * MIB).unwrap();
        assert_eq!(memory.data_ranges().unwrap(), []);
        memory.write(0, &[1; 4096]).unwrap();
        memory.write(8 * MIB + 5, &[1; 4096]).unwrap();
        memory.write(16 * MIB - 1, &[1]).unwrap();
        memory.read(MIB, &mut [0; 4096]).unwrap();
        let expected = [0..4096, 8 * MIB..8 * MIB + 8192, 16 * MIB - 4096..16 * MIB];
        assert_eq!(memory.data_ranges().unwrap(), expected);
        assert_eq!(
            memory.data_in(4096..8 * MIB + 5).unwrap().as_slice(),
            std::slice::from_ref(&(8 * MIB..8 * MIB + 5))
        );
        assert_eq!(memory.data_in(MIB..2 * MIB).unwrap(), []);
        let mut out = vec![9; MIB as usize];
        memory.read_sparse(8 * MIB, &mut out).unwrap();
        assert!(
            out[5..4101].iter().all(|byte| *byte == 1) && out[4101..].iter().all(|byte| *byte == 0)
        );
        assert_eq!(memory.data_ranges().unwrap(), expected, "reading sparsely makes no page");
    }

    #[test]
    fn size_is_sealed_and_unsealed_files_are_refused() {
        let memory = GuestMemory::create("test", MIB).unwrap();
        assert!(memory.file.set_len(4096).is_err());
        assert!(memory.file.set_len(2 * MIB).is_err());

        let again =
            GuestMemory::from_fd("again", memory.fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(again.len(), MIB);

        let plain = File::open("/proc/self/exe").unwrap();
        assert!(GuestMemory::from_fd("plain", plain.into()).is_err());
        let unsealed = MemfdOptions::default().allow_sealing(true).create("unsealed").unwrap();
        let error = GuestMemory::from_fd("unsealed", unsealed.into_file().into()).unwrap_err();
        assert!(error.to_string().contains("seal it"), "{error}");
    }

    #[test]
    fn inheritance_is_off_unless_asked_for() {
        let memory = GuestMemory::create("test", MIB).unwrap();
        let flags = || FdFlag::from_bits_retain(fcntl(memory.fd(), FcntlArg::F_GETFD).unwrap());
        assert!(flags().contains(FdFlag::FD_CLOEXEC));
        memory.set_inheritable(true).unwrap();
        assert!(!flags().contains(FdFlag::FD_CLOEXEC));
        memory.set_inheritable(false).unwrap();
        assert!(flags().contains(FdFlag::FD_CLOEXEC));
    }
}
