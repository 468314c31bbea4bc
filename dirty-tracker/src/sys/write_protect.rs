//! Registering memory with the plugin's uffd and protecting it, from outside the process that the
//! memory belongs to.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{MAX_TRIES, check, pieces};
use plugin_protocol::uapi;

/// `UFFDIO_REGISTER_MODE_MISSING`
const REGISTER_MODE_MISSING: u64 = 1 << 0;
/// `UFFDIO_REGISTER_MODE_WP`
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// `struct uffdio_register`
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

const UFFDIO_REGISTER: libc::Ioctl = uapi::read_write(0x00, size_of::<Register>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = uapi::read_write(0x06, size_of::<WriteProtect>());

const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00 as libc::Ioctl);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06 as libc::Ioctl);

/// Starts tracking `range`.
///
/// What is registered with this uffd already stays as it is, protection and all: a second helper
/// takes over where the first one ended.
pub(crate) fn register(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    register_as(uffd, range, REGISTER_MODE_WP)
}

/// The same, and from now on a thread that touches a page which does not exist waits until it is
/// made.
///
/// This mode ends with the mapping: the kernel does not take it from a range by registering the
/// range without it.
pub(crate) fn register_missing(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    register_as(uffd, range, REGISTER_MODE_WP | REGISTER_MODE_MISSING)
}

fn register_as(uffd: BorrowedFd<'_>, range: &Range<u64>, mode: u64) -> io::Result<()> {
    let mut arg = Register { start: range.start, len: range.end - range.start, mode, ioctls: 0 };
    // SAFETY: `arg` is a live `struct uffdio_register` for the whole call; the addresses in it
    // belong to the process that made the uffd, and the kernel does not change what that memory
    // holds.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) }).map(drop)
}

/// Protects every page of a registered range, those that do not exist yet included, piece by piece.
pub(crate) fn protect(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    pieces(range).try_for_each(|piece| protect_at_once(uffd, &piece))
}

pub(super) fn protect_at_once(uffd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        let mut arg = WriteProtect {
            start: range.start,
            len: range.end - range.start,
            mode: WRITEPROTECT_MODE_WP,
        };
        // SAFETY: `arg` is a live `struct uffdio_writeprotect` for the whole call; protection
        // changes no content, and with asynchronous protection no thread ever waits for it to be
        // lifted.
        let result =
            check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut arg) });
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries < MAX_TRIES => {
                tries += 1
            }
            other => return other.map(drop),
        }
    }
}
