//! The socket pair through which the stream comes: one end for QEMU by `getfd`, one for the reader.
//!
//! A third file descriptor, of the reader's end, stays here. With it the helper can shut down the
//! stream whichever task reads it, which unblocks a QEMU that blocks in a write; and it shows when
//! QEMU has closed its end, which is the last step of a migration.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SndBuf;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};
use serde_json::json;

use super::MigrationError;
use crate::jobs::tolerate_refusal;
use crate::qmp::{Qmp, QmpError};

/// QEMU's name for its end until `migrate` takes it; a name of another would be replaced by
/// `getfd`.
const FD_NAME: &str = "stream";
/// Room for what QEMU sends in the pause, so that it need not wait for the reader. The kernel gives
/// at most `net.core.wmem_max`, 208 KiB usually. (The whole stream gets no faster by it: 512 MiB in
/// 0.3 to 0.5 s, whatever the size.)
const BUFFER: usize = 4 << 20;
/// Pause between two looks whether QEMU has closed its end.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(super) struct Channel {
    reader: Option<UnixStream>,
    ours: UnixStream,
}

impl Channel {
    pub(super) async fn open(qmp: &Qmp) -> Result<Self, MigrationError> {
        let error = |source| MigrationError::Socket { source };
        let (ours, theirs) = pair().map_err(error)?;
        let reader = ours.try_clone().map_err(error)?;
        let given = qmp
            .execute_with_fd(
                "getfd",
                json!({ "fdname": qmp.names().name(FD_NAME) }),
                theirs.as_fd(),
            )
            .await;
        given.map_err(|source| MigrationError::Setup { source })?;
        Ok(Self { reader: Some(reader), ours })
    }

    pub(super) fn uri(qmp: &Qmp) -> String {
        format!("fd:{}", qmp.names().name(FD_NAME))
    }

    pub(super) fn take_reader(&mut self) -> Option<UnixStream> {
        self.reader.take()
    }

    /// The read end alone.
    pub(super) fn into_reader(mut self) -> Result<UnixStream, MigrationError> {
        self.take_reader().ok_or(MigrationError::Order("the reader was taken before"))
    }

    /// Another handle to cut the stream with.
    pub(super) fn handle(&self) -> Result<UnixStream, MigrationError> {
        self.ours.try_clone().map_err(|source| MigrationError::Socket { source })
    }

    /// Ends the stream for QEMU and for the reader.
    pub(super) fn cut(&self) {
        // Fails only when it is cut already.
        let _ = self.ours.shutdown(Shutdown::Both);
    }

    /// Whether QEMU has closed its end within `timeout`. Unread bytes do not matter.
    pub(super) async fn closed_by_qemu(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let mut fds = [PollFd::new(self.ours.as_fd(), PollFlags::empty())];
            let hung_up = poll(&mut fds, PollTimeout::ZERO).is_ok()
                && fds[0].revents().is_some_and(|events| {
                    events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
                });
            if hung_up || Instant::now() >= deadline {
                return hung_up;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// Closes QEMU's end if `migrate` has not taken it. Repeatable.
pub(super) async fn close_unused(qmp: &Qmp) -> Result<(), QmpError> {
    tolerate_refusal(
        qmp.execute_json("closefd", json!({ "fdname": qmp.names().name(FD_NAME) })).await,
    )
}

fn pair() -> std::io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    // Less than asked for is no error. What lies in a unix socket counts for its sender alone.
    setsockopt(&theirs, SndBuf, &BUFFER)?;
    Ok((ours.into(), theirs))
}
