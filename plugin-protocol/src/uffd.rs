//! Getting a userfaultfd from the kernel, by whichever door is open to this process.
//!
//! The plugin opens one to hand it to the tracker; the tracker's host check opens one the same way
//! to report whether the plugin will get one.
#![allow(unsafe_code, reason = "system calls that no library has")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::uapi;
use crate::wire::UffdSource;

/// An open uffd with [`uapi::WANTED_FEATURES`] switched on.
#[derive(Debug)]
pub struct OpenUffd {
    /// The userfaultfd.
    pub fd: OwnedFd,
    /// How it was got.
    pub source: UffdSource,
    /// The features that are on.
    pub features: u64,
}

/// No usable uffd: the error of the last door tried, and what the kernel would offer if it was
/// opened at all.
#[derive(Debug)]
pub struct NoUffd {
    /// Of the last door tried.
    pub error: io::Error,
    /// What the kernel would offer; 0 if it opens none.
    pub offered_features: u64,
}

/// Opens a uffd and enables everything that we need of it, or says what is missing.
///
/// # Errors
/// If the kernel opens none for this process, or one that lacks a feature.
pub fn open() -> Result<OpenUffd, NoUffd> {
    let (fd, source) = open_bare().map_err(|error| NoUffd { error, offered_features: 0 })?;
    match enable(&fd, uapi::WANTED_FEATURES) {
        Ok(features) => Ok(OpenUffd { fd, source, features }),
        Err(error) => Err(NoUffd { error, offered_features: offered_features() }),
    }
}

/// The features that this kernel knows; 0 when no uffd can be opened.
///
/// Needs a descriptor of its own, because the handshake can be made only once.
fn offered_features() -> u64 {
    open_bare().and_then(|(fd, _)| enable(&fd, 0)).unwrap_or(0)
}

fn open_bare() -> io::Result<(OwnedFd, UffdSource)> {
    from_syscall(0)
        .map(|fd| (fd, UffdSource::Syscall))
        .or_else(|_| from_device().map(|fd| (fd, UffdSource::Device)))
        .or_else(|_| from_syscall(uapi::USER_MODE_ONLY).map(|fd| (fd, UffdSource::UserModeOnly)))
}

fn from_syscall(flags: i32) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    // SAFETY: userfaultfd(2) takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(RawFd::try_from(fd).unwrap_or(-1))
}

fn from_device() -> io::Result<OwnedFd> {
    let device = std::fs::File::open("/dev/userfaultfd")?;
    // SAFETY: this ioctl takes its flags by value and touches no memory of ours.
    let fd = unsafe {
        libc::ioctl(device.as_raw_fd(), uapi::IOCTL_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK)
    };
    owned(fd)
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this file descriptor for us, so no other value owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn enable(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = uapi::Api { api: uapi::API, features, ioctls: 0 };
    // SAFETY: `api` is a live `struct uffdio_api` of the size that the ioctl number carries, for
    // the whole call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), uapi::IOCTL_API, &raw mut api) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(api.features) }
}
