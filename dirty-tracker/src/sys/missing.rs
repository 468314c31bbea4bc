//! Pages that are filled when they are touched: faults read from a userfaultfd, and their answers,
//! from outside the process that the memory belongs to.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use checkpoint_format::PAGE_SIZE;
use nix::errno::Errno;
use plugin_protocol::uapi;

use super::{MAX_TRIES, check};

/// `UFFDIO_COPY_MODE_WP`: the page is there, and write-protected, at once.
const COPY_MODE_WP: u64 = 1 << 1;
/// `UFFD_EVENT_PAGEFAULT`
const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`
const MESSAGE_LEN: usize = 32;
/// Where a fault's address is in it.
const ADDRESS_AT: usize = 16;
/// Faults taken by one read(2).
const MESSAGES: usize = 64;

/// `struct uffdio_copy`
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_range`
#[repr(C)]
struct Addresses {
    start: u64,
    len: u64,
}

const UFFDIO_COPY: libc::Ioctl = uapi::read_write(0x03, size_of::<Copy>());
const UFFDIO_WAKE: libc::Ioctl = uapi::read(0x02, size_of::<Addresses>());

const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 as libc::Ioctl);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02 as libc::Ioctl);

/// The addresses of faults that no process has read yet; none if there are none now. More may
/// follow.
pub(crate) fn read_faults(uffd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut bytes = [0; MESSAGES * MESSAGE_LEN];
    let length = match nix::unistd::read(uffd, &mut bytes) {
        Err(Errno::EAGAIN | Errno::EINTR) => 0,
        read => read?,
    };
    let messages = bytes[..length].chunks_exact(MESSAGE_LEN);
    let faults = messages.filter(|message| message[0] == EVENT_PAGEFAULT);
    let address = |message: &[u8]| {
        let bytes = message[ADDRESS_AT..ADDRESS_AT + 8].try_into();
        u64::from_ne_bytes(bytes.expect("eight bytes")) / PAGE_SIZE as u64 * PAGE_SIZE as u64
    };
    Ok(faults.map(address).collect())
}

/// What one call has done.
enum Copied {
    /// So many bytes from the beginning.
    Bytes(u64),
    /// The first page exists already.
    Exists,
    /// The kernel broke off.
    Again,
}

/// Makes pages with this content at `start`, write-protected: they count as not written. A page
/// that exists stays as it is. Threads that wait for them continue. Returns how many bytes were
/// made.
pub(crate) fn install(uffd: BorrowedFd<'_>, start: u64, bytes: &[u8]) -> io::Result<u64> {
    let (mut at, mut made, mut tries) = (0, 0, 0);
    // Within one mapping of the process a call takes any length.
    let mut most = bytes.len();
    while at < bytes.len() {
        let piece = &bytes[at..bytes.len().min(at + most)];
        match copy_once(uffd, start + at as u64, piece) {
            Ok(Copied::Bytes(copied)) => {
                at += checkpoint_format::as_index(copied);
                made += copied;
                tries = 0;
            }
            Ok(Copied::Exists) => {
                // A thread may have begun to wait before the page was made.
                let page = start + at as u64;
                wake(uffd, &(page..page + PAGE_SIZE as u64))?;
                at += PAGE_SIZE;
            }
            Ok(Copied::Again) if tries < MAX_TRIES => {
                tries += 1;
                std::thread::yield_now();
            }
            Ok(Copied::Again) => return Err(Errno::EAGAIN.into()),
            // The piece spans two mappings.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && most > PAGE_SIZE => {
                most = PAGE_SIZE
            }
            Err(error) => return Err(error),
        }
    }
    Ok(made)
}

fn copy_once(uffd: BorrowedFd<'_>, start: u64, bytes: &[u8]) -> io::Result<Copied> {
    let mut arg = Copy {
        dst: start,
        src: bytes.as_ptr() as u64,
        len: bytes.len() as u64,
        mode: COPY_MODE_WP,
        copy: 0,
    };
    // SAFETY: `arg` is a live `struct uffdio_copy` for the whole call, and `src`/`len` describe
    // `bytes`, which the kernel only reads; the addresses at `dst` belong to the process that made
    // the uffd, and only pages that do not exist there are made.
    let result = check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut arg) });
    match result {
        Ok(_) => Ok(Copied::Bytes(bytes.len() as u64)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) if arg.copy > 0 => Ok(Copied::Bytes(arg.copy.cast_unsigned())),
            Some(libc::EAGAIN) => Ok(Copied::Again),
            Some(libc::EEXIST) => Ok(Copied::Exists),
            _ => Err(error),
        },
    }
}

/// Lets the threads that wait for pages in `range` try again: a page that is still missing is a
/// fault to be read once more.
pub(crate) fn wake(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut arg = Addresses { start: range.start, len: range.end - range.start };
    // SAFETY: `arg` is a live `struct uffdio_range` for the whole call, which changes no memory.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw mut arg) }).map(drop)
}
