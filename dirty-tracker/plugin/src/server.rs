//! The thread that greets clients, one after the other, for as long as QEMU lives.
//!
//! It never waits for a client longer than [`CLIENT_TIMEOUT`] and never fails: whatever a client
//! does, or whenever it dies, the next one is served. The guest does not depend on this thread in
//! any way.
#![allow(unsafe_code, reason = "descriptors go through `sendmsg`")]

use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::handles::Handles;
use plugin_protocol::wire::{FD_KINDS, HELLO_LEN, Hello, REPLY_LEN, Reply};

/// How long one client may keep the others waiting.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after accept(2) failed, for want of descriptors say, so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Clients that may wait while one is served.
const BACKLOG: i32 = 16;
/// Room for the control message with all descriptors; CMSG_SPACE is 40 for five.
const CONTROL_LEN: usize = 64;

/// Binds `path` with access for its owner only.
///
/// A socket file that no process listens on any more (a QEMU that was killed) is replaced; one in
/// use is an error.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
            std::fs::remove_file(path)?;
            bind(path)
        }
        result => result,
    }
}

/// Connecting to a plain file is refused too, so the type is looked at first.
fn is_abandoned(path: &Path) -> bool {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket
        && matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let (address, length) = socket_address(path)?;
    // SAFETY: socket(2) takes integers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: socket(2) has just made this descriptor for us, so no other code owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // The mode that a socket has when it is bound becomes the mode of its file: never open to
    // others, not even briefly. SAFETY: fchmod(2) takes integers only.
    check(unsafe { libc::fchmod(fd, 0o600) })?;
    // SAFETY: `address` is a live `sockaddr_un`, and `length` is not larger than it.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), length) })?;
    // SAFETY: listen(2) takes integers only.
    check(unsafe { libc::listen(fd, BACKLOG) })?;
    Ok(UnixListener::from(socket))
}

fn socket_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeroes is a valid `sockaddr_un`.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    #[expect(clippy::cast_possible_truncation, reason = "the number of a family is small")]
    let family = libc::AF_UNIX as libc::sa_family_t;
    address.sun_family = family;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok((address, length(size_of::<libc::sockaddr_un>())))
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of small structures")]
const fn length(bytes: usize) -> libc::socklen_t {
    bytes as libc::socklen_t
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Serves for ever.
pub(crate) fn serve(listener: &UnixListener, handles: &Handles) -> ! {
    loop {
        match listener.accept() {
            // A client that breaks off or sends nonsense is its own problem.
            Ok((client, _)) => drop(greet(client, handles)),
            Err(_) => std::thread::sleep(ACCEPT_PAUSE),
        }
    }
}

fn greet(mut client: UnixStream, handles: &Handles) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    if !may_connect(&client) {
        return Ok(());
    }
    let mut hello = [0; HELLO_LEN];
    client.read_exact(&mut hello)?;
    match Hello::parse(&hello) {
        Ok(_) => {
            let mut fds = [-1; FD_KINDS];
            let mut count = 0;
            for (slot, fd) in fds.iter_mut().zip(handles.fds()) {
                *slot = fd.as_raw_fd();
                count += 1;
            }
            send(&client, handles.reply(), &fds[..count])
        }
        Err(status) => send(&client, &Reply::refusal(status), &[]),
    }
}

/// The file's mode already says so; this check also holds when a user changes the mode.
fn may_connect(client: &UnixStream) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = length(size_of::<libc::ucred>());
    // SAFETY: `peer` and `length` are live for the call, and `length` is the size of `peer`.
    let result = unsafe {
        libc::getsockopt(
            client.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    result == 0 && (peer.uid == 0 || peer.uid == unsafe { libc::geteuid() })
}

/// Aligned as `cmsghdr` has to be.
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

fn send(client: &UnixStream, reply: &Reply, fds: &[RawFd]) -> io::Result<()> {
    let mut bytes = reply.encode();
    let mut control = Control([0; CONTROL_LEN]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zeroes is a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        attach(&mut message, &mut control, fds);
    }
    // SAFETY: `message` points to `part`, `bytes` and `control`, all of which live until the end of
    // this function.
    let sent = unsafe { libc::sendmsg(client.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(REPLY_LEN) => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn attach(message: &mut libc::msghdr, control: &mut Control, fds: &[RawFd]) {
    let payload = length(mem::size_of_val(fds));
    // SAFETY: CMSG_SPACE and CMSG_LEN only compute.
    let (space, length) = unsafe { (libc::CMSG_SPACE(payload), libc::CMSG_LEN(payload)) };
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    // SAFETY: `control` is zeroed, aligned for a `cmsghdr` and larger than `space`, the room for
    // FD_KINDS descriptors (see the assertion below), so the first header and its data lie within
    // it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = length as _;
        libc::CMSG_DATA(header).copy_from_nonoverlapping(fds.as_ptr().cast(), payload as usize);
    }
}

// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(
    unsafe { libc::CMSG_SPACE(length(FD_KINDS * size_of::<RawFd>())) } as usize <= CONTROL_LEN
);
