//! The file descriptors that the plugin holds for the life of the process and passes to every
//! client.
//!
//! All are opened while QEMU starts, so that dropping privileges later (`-runas`, `-sandbox`) does
//! not take them away. The uffd is kept open here for another reason too: when its last descriptor
//! closes, the kernel forgets every write that it has seen, so it must outlive the helpers.
#![allow(unsafe_code, reason = "system calls that no library has")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use plugin_protocol::uffd;
use plugin_protocol::wire::{FD_KINDS, FdKind, PROTOCOL_VERSION, Reply, Status, UffdSource};

/// The descriptors by [`FdKind`], and the greeting that goes with them.
#[derive(Debug)]
pub(crate) struct Handles {
    fds: [Option<OwnedFd>; FD_KINDS],
    reply: Reply,
}

impl Handles {
    /// Opens what can be opened; what can't is reported to the client with its errno.
    pub(crate) fn open(api_version: i32, ram: Option<RawFd>) -> Self {
        let mut handles = Self {
            fds: [const { None }; FD_KINDS],
            reply: Reply {
                version: PROTOCOL_VERSION,
                status: Status::Ok,
                pid: std::process::id(),
                api_version: api_version.cast_unsigned(),
                uffd_features: 0,
                uffd_source: UffdSource::None,
                errno: [0; FD_KINDS],
                fd_mask: 0,
            },
        };
        handles.open_uffd();
        handles.keep(FdKind::Pagemap, File::open("/proc/self/pagemap").map(OwnedFd::from));
        handles.keep(FdKind::Memory, File::open("/proc/self/mem").map(OwnedFd::from));
        handles.keep(FdKind::Maps, File::open("/proc/self/maps").map(OwnedFd::from));
        if let Some(fd) = ram {
            handles.keep(FdKind::Ram, duplicate(fd));
        }
        handles
    }

    fn open_uffd(&mut self) {
        match uffd::open() {
            Ok(open) => {
                self.reply.uffd_features = open.features;
                self.reply.uffd_source = open.source;
                self.keep(FdKind::Uffd, Ok(open.fd));
            }
            Err(none) => {
                self.reply.uffd_features = none.offered_features;
                self.keep(FdKind::Uffd, Err(none.error));
            }
        }
    }

    fn keep(&mut self, kind: FdKind, opened: io::Result<OwnedFd>) {
        match opened {
            Ok(fd) => {
                self.fds[kind as usize] = Some(fd);
                self.reply.fd_mask |= 1 << kind as u32;
            }
            Err(error) => {
                self.reply.errno[kind as usize] = error.raw_os_error().unwrap_or(libc::EIO)
            }
        }
    }

    pub(crate) fn reply(&self) -> &Reply {
        &self.reply
    }

    /// The open descriptors, in the order of [`FdKind`].
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.fds.iter().flatten().map(AsFd::as_fd)
    }
}

/// A descriptor of our own for the RAM file that QEMU inherited, so that we do not depend on what
/// QEMU does with its.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on an integer; a number that is no descriptor gives EBADF.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl has just made this descriptor for us, so no other code owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
