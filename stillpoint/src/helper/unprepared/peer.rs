//! Which process is behind a monitor's socket.
//!
//! The kernel knows who listens. Where a manager made the socket and handed it over (libvirt's own monitor), that is the
//! manager; then the QEMU is looked for that holds the socket too.

use crate::exit::refused;
use crate::launch::process::{self, QemuProcess};
use crate::runtime::read_limited;
use anyhow::{Context, Result};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::collections::HashSet;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A busy host has some thousand sockets of 100 bytes a line.
const MAX_SOCKETS_BYTES: u64 = 64 << 20;

/// The QEMU behind `monitor`.
pub fn behind(monitor: &Path) -> Result<QemuProcess> {
    let pid = listener(monitor)?;
    if process::runs_qemu(pid) {
        return QemuProcess::read(pid);
    }
    if pid == 0 {
        return Err(refused(format!(
            "the process behind {} is in another process namespace (a container?); run Stillpoint where QEMU runs, with the same --pid",
            monitor.display()
        )));
    }
    match process::qemus_with_socket(&inodes(monitor)?).as_slice() {
        [only] => QemuProcess::read(*only),
        [] => Err(refused(no_qemu(monitor, pid))),
        many => Err(refused(format!("{} QEMUs hold {}; name the monitor of one", many.len(), monitor.display()))),
    }
}

fn listener(monitor: &Path) -> Result<u32> {
    let stream = UnixStream::connect(monitor).map_err(|error| refused(cannot_connect(monitor, &error)))?;
    let peer = getsockopt(&stream, PeerCredentials).with_context(|| format!("asking who listens at {}", monitor.display()))?;
    Ok(u32::try_from(peer.pid()).unwrap_or(0))
}

fn cannot_connect(monitor: &Path, error: &std::io::Error) -> String {
    let remedy = match error.kind() {
        ErrorKind::NotFound => "is the path right? A QEMU gets a monitor by -qmp unix:PATH,server=on,wait=off",
        ErrorKind::ConnectionRefused => "nobody listens there any more: that QEMU has ended",
        ErrorKind::PermissionDenied => "run Stillpoint as root or as the user of that QEMU",
        _ => "a monitor is a unix socket, made by -qmp unix:PATH,server=on,wait=off",
    };
    format!("{} cannot be reached: {error}; {remedy}", monitor.display())
}

fn no_qemu(monitor: &Path, pid: u32) -> String {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).map_or_else(
        |error| format!("process {pid} ({error}; run Stillpoint as root or as the user of that QEMU)"),
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
    let path = std::path::absolute(path).with_context(|| format!("making {} absolute", path.display()))?;
    Ok(String::from_utf8_lossy(&table).lines().filter_map(|line| bound(line, &path)).collect())
}

/// `Num RefCount Protocol Flags Type St Inode Path`; the path may hold spaces.
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

    #[test]
    fn a_socket_of_this_process_is_found_and_is_no_qemu() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a socket");
        assert!(behind(&path).unwrap_err().to_string().contains("is the path right?"));
        let listening = UnixListener::bind(&path).unwrap();
        assert_eq!(listener(&path).unwrap(), std::process::id());
        let found = inodes(&path).unwrap();
        assert!(!found.is_empty());
        assert!(process::qemus_with_socket(&found).is_empty());
        let error = behind(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())) && error.contains("no QEMU"), "{error}");
        drop(listening);
        assert!(behind(&path).unwrap_err().to_string().contains("has ended"));
    }

    #[test]
    fn the_kernels_table_is_read() {
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/a b.sock";
        assert_eq!(bound(line, Path::new("/run/a b.sock")), Some(4711));
        let padded = "0000000000000000: 00000002 00000000 00010000 0001 01   815 /run/x";
        assert_eq!(bound(padded, Path::new("/run/x")), Some(815));
        assert_eq!(bound(line, Path::new("/run/a")), None);
        assert_eq!(bound("Num RefCount Protocol Flags Type St Inode Path", Path::new("/run/a")), None);
    }
}
