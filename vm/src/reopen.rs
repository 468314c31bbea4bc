//! Whether QEMU could open its disks again.
//!
//! A migration of a running VM, also to us, ends with its disks inactive, and QEMU opens each image
//! by its path to write to it again. After `-runas`, or in a directory that was closed to it since,
//! it may not: `cont` fails, and the guest stays stopped. Where another file has the path by then,
//! the guest would write to that one from then on. So such a VM is not migrated.

use crate::drives::Drives;
use crate::error::{VmError, refused};
use crate::process;
use anyhow::{Context, Result};
use nix::unistd::{Gid, Uid, geteuid, setfsgid, setfsuid};
use procfs::ProcResult;
use qmp_bridge::disks::Disk;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Refused where the process `pid` would not get back each disk that its guest writes.
///
/// # Errors
/// As said.
pub fn check(pid: u32, drives: &Drives) -> Result<(), VmError> {
    check_paths(drives)?;
    Ok(check_rights(pid, &drives.disks)?)
}

/// Refused where the path of a disk that the guest writes leads to another file than the one that
/// QEMU has open, or to none.
///
/// # Errors
/// As said.
pub fn check_paths(drives: &Drives) -> Result<(), VmError> {
    let written = drives.disks.iter().filter(|disk| !disk.read_only);
    match written.filter_map(|disk| Some((disk, drives.open.moved(&disk.file)?))).next() {
        None => Ok(()),
        Some((disk, what)) => Err(refused(format!(
            "disk {}: QEMU would open {} again after its migration stream, and {what} since QEMU opened it; put the file back there, or \
             attach with --stream background-snapshot",
            disk.name,
            disk.file.display()
        ))
        .into()),
    }
}

fn check_rights(pid: u32, disks: &[Disk]) -> Result<()> {
    let user = User::of(pid).context("reading QEMU's status")?;
    // An ordinary user's QEMU is of that user, who could not take on another.
    if user.uid == geteuid() || !geteuid().is_root() {
        return Ok(());
    }
    let written =
        disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.file.clone()).collect();
    match closed_to(user, written)? {
        None => Ok(()),
        Some(path) => Err(refused(format!(
            "QEMU's user may not open {} again, which QEMU would do after its migration stream, and the guest would stay stopped; give that \
             user the right to read and write it and to pass its directories, or attach with --stream background-snapshot",
            path.display()
        ))),
    }
}

/// As whom a process opens files.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    uid: Uid,
    /// Its group, then its further ones.
    groups: Vec<Gid>,
}

impl User {
    fn of(pid: u32) -> ProcResult<Self> {
        let status = process::open(pid)?.status()?;
        let groups = std::iter::once(status.fgid).chain(status.groups.iter().copied());
        Ok(Self { uid: Uid::from_raw(status.fuid), groups: groups.map(Gid::from_raw).collect() })
    }
}

/// The first of the files that the user may not open. The thread ends with its identity.
fn closed_to(user: User, files: Vec<PathBuf>) -> Result<Option<PathBuf>> {
    let find = move || {
        files
            .into_iter()
            .find(|file| !user.groups.iter().any(|group| opens(user.uid, *group, file)))
    };
    std::thread::spawn(find)
        .join()
        .map_err(|_| anyhow::anyhow!("internal error: looking for closed files panicked"))
}

/// On this thread alone, which has no capabilities on files then. Whatever else is wrong with the
/// file, QEMU has it open.
fn opens(user: Uid, group: Gid, file: &Path) -> bool {
    setfsgid(group);
    setfsuid(user);
    let opened = File::options().read(true).write(true).open(file);
    setfsuid(geteuid());
    !opened.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn user_of_a_process_is_that_of_its_files() {
        if !geteuid().is_root() {
            return;
        }
        let of_thread = || {
            let id = nix::unistd::gettid().as_raw().unsigned_abs();
            setfsgid(Gid::from_raw(108));
            setfsuid(Uid::from_raw(107));
            User::of(id)
        };
        let found = std::thread::spawn(of_thread).join().unwrap().unwrap();
        assert_eq!((found.uid, found.groups[0]), (Uid::from_raw(107), Gid::from_raw(108)));
        assert!(User::of(0).is_err());
    }

    #[test]
    fn files_closed_to_another_user_are_found() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let file = |name: &str, mode: u32| {
            let path = directory.path().join(name);
            std::fs::write(&path, "x").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (open, closed) = (file("open", 0o666), file("closed", 0o644));
        std::os::unix::fs::chown(file("group", 0o660), None, Some(4242)).unwrap();
        let user = |groups: &[u32]| User {
            uid: Uid::from_raw(65_534),
            groups: groups.iter().copied().map(Gid::from_raw).collect(),
        };
        let of_group = vec![open.clone(), directory.path().join("group")];
        assert_eq!(closed_to(user(&[65_534]), vec![open, closed.clone()]).unwrap(), Some(closed));
        assert_eq!(closed_to(user(&[65_534, 4242]), of_group.clone()).unwrap(), None);
        assert_eq!(closed_to(user(&[65_534]), of_group.clone()).unwrap(), of_group.get(1).cloned());
    }
}
