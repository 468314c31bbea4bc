//! Directories that no other user can change: owned by this user or root, not writable by others,
//! reached without a symbolic link.
//!
//! What lies in one decides which process is signalled, which file is truncated and whose answer is
//! believed. So each access begins with the directory itself, and files are opened relative to its
//! descriptor and never through a link.

use crate::error::refused;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const GROUP_OR_OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Whose directory it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Ours or root's: everything in it is acted upon.
    Trusted,
    /// For root also another user's: only asks the helper there, and acts on nothing.
    Asked,
}

/// `base/name`, if it exists. `base` itself may be writable by all if it is sticky, as /tmp is.
pub(super) fn open(base: &Path, name: &str, owner: Owner) -> Result<Option<OwnedFd>> {
    let Some(parent) = open_one(AT_FDCWD, base, base)? else { return Ok(None) };
    check(&parent, base, owner, STICKY)?;
    let path = base.join(name);
    let Some(directory) = open_one(&parent, Path::new(name), &path)? else { return Ok(None) };
    check(&directory, &path, owner, 0)?;
    Ok(Some(directory))
}

/// Makes `base/name` with access for us alone, unless it exists.
pub(super) fn create(base: &Path, name: &str) -> Result<()> {
    let about = || format!("making the runtime directory {}", base.join(name).display());
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(base).with_context(about)?;
    let parent = open_one(AT_FDCWD, base, base)?.with_context(about)?;
    check(&parent, base, Owner::Trusted, STICKY)?;
    match mkdirat(&parent, name, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => open(base, name, Owner::Trusted).map(drop),
        Err(error) => Err(error).with_context(about),
    }
}

fn open_one(at: impl AsFd, name: &Path, shown: &Path) -> Result<Option<OwnedFd>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(at, name, flags, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::ENOENT) => Ok(None),
        Err(Errno::ELOOP | Errno::ENOTDIR) => Err(refused(format!(
            "the runtime directory {} is a symbolic link or no directory; remove it, or name another by --runtime-dir",
            shown.display()
        ))),
        Err(error) => {
            Err(error).with_context(|| format!("opening the runtime directory {}", shown.display()))
        }
    }
}

fn check(directory: &OwnedFd, path: &Path, owner: Owner, exempt: u32) -> Result<()> {
    let facts = fstat(directory).with_context(|| format!("looking at {}", path.display()))?;
    match distrust((facts.st_uid, facts.st_mode), geteuid().as_raw(), owner, exempt) {
        None => Ok(()),
        Some(why) => Err(refused(format!(
            "the runtime directory {} {why}, or name another by --runtime-dir",
            path.display()
        ))),
    }
}

fn distrust((user, mode): (u32, u32), us: u32, owner: Owner, exempt: u32) -> Option<String> {
    let is_trusted = user == us || user == 0 || owner == Owner::Asked && us == 0;
    if !is_trusted {
        return Some(format!("belongs to user {user}; run this command as that user"));
    }
    if mode & GROUP_OR_OTHERS_WRITE != 0 && mode & exempt == 0 {
        return Some(format!(
            "can be written by others (mode {:o}); take that right away by 'chmod go-w'",
            mode & 0o7777
        ));
    }
    None
}

/// A file of a private directory. Never through a link, and never waits for the other end of a
/// pipe.
pub(super) fn open_file(directory: &OwnedFd, name: &str, flags: OFlag) -> std::io::Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    Ok(openat(directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into())
}

pub(super) fn read_file(directory: &OwnedFd, name: &str, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_file(directory, name, OFlag::O_RDONLY)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(std::io::Error::other(format!("it is larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// The old content or the new, whenever we die. Relative to the directory's descriptor, which the
/// crate tempfile cannot be; and not synced, since no QEMU survives a power cut.
pub(super) fn replace_file(directory: &OwnedFd, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let new = format!("{name}.new");
    remove_file(directory, &new)?;
    open_file(directory, &new, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?
        .write_all(bytes)?;
    Ok(nix::fcntl::renameat(directory, new.as_str(), directory, name)?)
}

/// No error if there is none.
pub(super) fn remove_file(directory: &OwnedFd, name: &str) -> std::io::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::error::{Class, class_of};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn runtime_directory_of_others_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("run");
        assert!(open(&base, "m", Owner::Trusted).unwrap().is_none());
        create(&base, "m").unwrap();
        create(&base, "m").unwrap();
        assert!(open(&base, "m", Owner::Trusted).unwrap().is_some());
        assert_eq!(std::fs::metadata(base.join("m")).unwrap().permissions().mode() & 0o7777, 0o700);
        let refused = |what: &str| {
            assert_eq!(
                class_of(&open(&base, "m", Owner::Trusted).unwrap_err()),
                Class::Refused,
                "{what}"
            )
        };
        mode(&base, 0o1777);
        assert!(open(&base, "m", Owner::Trusted).is_ok(), "like /tmp");
        mode(&base, 0o777);
        refused("a base that others can write");
        mode(&base, 0o755);
        mode(&base.join("m"), 0o770);
        refused("writable by the group");
        mode(&base.join("m"), 0o700);
        std::fs::rename(base.join("m"), place.path().join("real")).unwrap();
        symlink(place.path().join("real"), base.join("m")).unwrap();
        refused("a link");
        assert_eq!(class_of(&create(&base, "m").unwrap_err()), Class::Refused);
        let linked = place.path().join("linked");
        symlink(&base, &linked).unwrap();
        assert_eq!(class_of(&create(&linked, "other").unwrap_err()), Class::Refused);
        std::fs::write(place.path().join("file"), "").unwrap();
        assert_eq!(
            class_of(&open(place.path(), "file", Owner::Trusted).unwrap_err()),
            Class::Refused
        );
    }

    #[test]
    fn runtime_directory_is_trusted_by_its_owner() {
        let distrust = |user: u32, us: u32, owner: Owner| distrust((user, 0o700), us, owner, 0);
        assert_eq!(distrust(7, 7, Owner::Trusted), None);
        assert_eq!(distrust(0, 7, Owner::Trusted), None);
        assert!(distrust(8, 7, Owner::Trusted).is_some() && distrust(8, 7, Owner::Asked).is_some());
        assert!(distrust(8, 0, Owner::Trusted).is_some());
        assert_eq!(distrust(8, 0, Owner::Asked), None, "root may ask another user's helper");
    }

    #[test]
    fn runtime_files_are_not_reached_through_links() {
        let place = tempfile::tempdir().unwrap();
        create(place.path(), "m").unwrap();
        let directory = open(place.path(), "m", Owner::Trusted).unwrap().unwrap();
        let victim = place.path().join("victim");
        std::fs::write(&victim, "theirs").unwrap();
        symlink(&victim, place.path().join("m/x")).unwrap();
        symlink(&victim, place.path().join("m/x.new")).unwrap();
        assert!(read_file(&directory, "x", 100).is_err());
        assert!(
            open_file(&directory, "x", OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC).is_err()
        );
        replace_file(&directory, "x", b"ours").unwrap();
        assert_eq!(read_file(&directory, "x", 4).unwrap(), b"ours");
        assert!(read_file(&directory, "x", 3).is_err(), "limited");
        assert_eq!(std::fs::read(&victim).unwrap(), b"theirs");
        remove_file(&directory, "x").unwrap();
        remove_file(&directory, "x").unwrap();
    }
}
