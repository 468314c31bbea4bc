//! Which process is behind a monitor's socket.
//!
//! The kernel knows which process made a socket listen. If a manager made the socket and passed it
//! to QEMU (libvirt's own monitor), that is the manager; then the QEMU that holds the socket is
//! searched for.

use crate::error::{VmError, refused};
use crate::files::read_limited;
use crate::launch::process::{QemuProcess, qemus_with_socket, runs_qemu};
use crate::process;
use anyhow::{Context, Error, Result};
use backon::{ConstantBuilder, Retryable};
use qmp_bridge::{Qmp, QmpError};
use std::collections::HashSet;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A running QEMU sends its greeting at once, unless another client holds its monitor.
const ANSWER: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// A busy host has some thousand sockets of 100 bytes a line.
const MAX_SOCKETS_BYTES: u64 = 64 << 20;

/// A connection on which nothing was sent yet. QEMU serves one client of a monitor at a time, so
/// all checks share one connection.
pub(super) struct MonitorConnection {
    stream: UnixStream,
    listener: u32,
}

impl MonitorConnection {
    /// Waits a moment if the queue is full: a client that has just left may still be in it.
    pub(super) async fn open(monitor: &Path) -> Result<Self> {
        let end = Instant::now() + ANSWER;
        let polls = ConstantBuilder::new().with_delay(POLL_INTERVAL).without_max_times();
        let connected = (|| qmp_bridge::qmp::connect_when_ready(monitor, end))
            .retry(polls)
            .when(|error| error.kind() == ErrorKind::WouldBlock && Instant::now() < end);
        let stream = connected.await.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => refused(busy(monitor)),
            _ => refused(cannot_connect(monitor, &error)),
        })?;
        Self::of(stream).with_context(|| format!("asking who listens at {}", monitor.display()))
    }

    fn of(stream: tokio::net::UnixStream) -> std::io::Result<Self> {
        let listener =
            stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        Ok(Self { stream: stream.into_std()?, listener })
    }

    /// The QEMU at the other end of `monitor`.
    pub(super) fn qemu(&self, monitor: &Path) -> Result<QemuProcess> {
        if runs_qemu(self.listener) {
            return QemuProcess::read(self.listener).map_err(|error| no_rights(&error));
        }
        if self.listener == 0 {
            return Err(refused(format!(
                "the process behind {} is in another process namespace (a container?); run Stillpoint where QEMU runs",
                monitor.display()
            )));
        }
        match qemus_with_socket(&inodes(monitor)?).as_slice() {
            [only] => QemuProcess::read(*only).map_err(|error| no_rights(&error)),
            [] => Err(refused(no_qemu(monitor, self.listener))),
            many => Err(refused(format!(
                "{} QEMUs hold {}; name the monitor of one",
                many.len(),
                monitor.display()
            ))),
        }
    }

    pub(super) async fn greet(self, monitor: &Path) -> Result<Qmp> {
        self.greet_within(monitor, ANSWER).await
    }

    async fn greet_within(self, monitor: &Path, timeout: Duration) -> Result<Qmp> {
        Qmp::over(self.stream, timeout).await.map_err(|error| match error {
            QmpError::NoMonitor { why } if why.contains("no greeting") => refused(busy(monitor)),
            QmpError::NoMonitor { why } => {
                refused(format!("{} is no QMP monitor: {why}", monitor.display()))
            }
            other => Error::from(other).context("connecting to QEMU's monitor"),
        })
    }
}

/// Without access to its process, nothing is known of the VM: a refusal.
fn no_rights(error: &VmError) -> Error {
    refused(format!("{error:#}"))
}

/// The message when the monitor does not answer: QEMU lets a second client wait without a reply.
fn busy(monitor: &Path) -> String {
    format!(
        "the monitor {} does not answer: another client holds it (its manager, or a helper of Stillpoint); give QEMU a second one, \
         -qmp unix:PATH,server=on,wait=off (where QEMU's own user may make it), with libvirt by <qemu:commandline> (docs/libvirt.md)",
        monitor.display()
    )
}

fn cannot_connect(monitor: &Path, error: &std::io::Error) -> String {
    let remedy = match error.kind() {
        ErrorKind::NotFound => {
            "is the path right? A QEMU gets a monitor by -qmp unix:PATH,server=on,wait=off"
        }
        ErrorKind::ConnectionRefused => "no process listens there any more: that QEMU has ended",
        ErrorKind::PermissionDenied => "run Stillpoint as root or as the user of that QEMU",
        _ => "a monitor is a unix socket, made by -qmp unix:PATH,server=on,wait=off",
    };
    format!("{} cannot be reached: {error}; {remedy}", monitor.display())
}

fn no_qemu(monitor: &Path, pid: u32) -> String {
    let program = process::open(pid).and_then(|process| process.exe()).map_or_else(
        |error| {
            format!("process {pid} ({error}; run Stillpoint as root or as the user of that QEMU)")
        },
        |program| format!("process {pid} ({})", program.display()),
    );
    format!(
        "{} belongs to {program}, which is no QEMU, and no QEMU holds that socket; name a monitor that QEMU itself has opened (-qmp unix:PATH,server=on,wait=off)",
        monitor.display()
    )
}

/// The kernel's numbers of the sockets bound to a path.
fn inodes(path: &Path) -> Result<HashSet<u64>> {
    let table = read_limited(Path::new("/proc/net/unix"), MAX_SOCKETS_BYTES)?;
    let path =
        std::path::absolute(path).with_context(|| format!("making {} absolute", path.display()))?;
    Ok(String::from_utf8_lossy(&table).lines().filter_map(|line| bound(line, &path)).collect())
}

/// `Num RefCount Protocol Flags Type St Inode Path`; the path may hold spaces, which procfs would
/// cut off.
fn bound(line: &str, path: &Path) -> Option<u64> {
    let mut rest = line;
    for _ in 0..6 {
        (_, rest) = rest.trim_start().split_once(' ')?;
    }
    let (inode, name) = rest.trim_start().split_once(' ')?;
    (Path::new(name) == path).then(|| inode.parse().ok())?
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[tokio::test]
    async fn a_socket_of_this_process_is_found_and_is_no_qemu() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a socket");
        let failure = |result: Result<MonitorConnection>| result.err().unwrap().to_string();
        assert!(failure(MonitorConnection::open(&path).await).contains("is the path right?"));
        let listening = UnixListener::bind(&path).unwrap();
        let line = MonitorConnection::open(&path).await.unwrap();
        assert_eq!(line.listener, std::process::id());
        let found = inodes(&path).unwrap();
        assert!(!found.is_empty());
        assert!(qemus_with_socket(&found).is_empty());
        let error = line.qemu(&path).unwrap_err().to_string();
        assert!(
            error.contains(&format!("process {}", std::process::id())) && error.contains("no QEMU"),
            "{error}"
        );
        drop(listening);
        // A process that another test is just starting may hold a copy until it becomes its
        // program.
        while MonitorConnection::open(&path).await.is_ok() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        assert!(failure(MonitorConnection::open(&path).await).contains("has ended"));
    }

    #[tokio::test]
    async fn who_accepts_and_says_nothing_is_busy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _listening = UnixListener::bind(&path).unwrap();
        let error = MonitorConnection::open(&path)
            .await
            .unwrap()
            .greet_within(&path, Duration::from_millis(50))
            .await
            .err()
            .unwrap();
        assert!(error.to_string().contains("a second one, -qmp unix:"), "{error}");
        assert_eq!(crate::error::class_of(&error), crate::error::Class::Refused);
    }

    #[test]
    fn the_kernels_table_is_read() {
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/a b.sock";
        assert_eq!(bound(line, Path::new("/run/a b.sock")), Some(4711));
        let padded = "0000000000000000: 00000002 00000000 00010000 0001 01   815 /run/x";
        assert_eq!(bound(padded, Path::new("/run/x")), Some(815));
        assert_eq!(bound(line, Path::new("/run/a")), None);
        assert_eq!(
            bound("Num RefCount Protocol Flags Type St Inode Path", Path::new("/run/a")),
            None
        );
    }
}
