//! The files that QEMU has open. A path may lead to another file by now, or to none; what the guest
//! sees is the open one.

use crate::error::{VmError, refused};
use anyhow::{Context, Result};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What the kernel appends to the path of a file that was deleted.
const DELETED: &str = " (deleted)";

/// Device and inode.
type FileId = (u64, u64);

/// The files that a process holds open, by device and inode.
#[derive(Debug, Default)]
pub struct OpenFiles {
    open: HashSet<FileId>,
    /// By the path that it had: which file it is, and a path under `/proc` that leads to the
    /// content.
    deleted: HashMap<PathBuf, Vec<(FileId, PathBuf)>>,
}

impl OpenFiles {
    /// # Errors
    /// Where `/proc/PID/fd` cannot be read: another user's process, or one that has ended.
    pub fn of(pid: u32) -> Result<Self, VmError> {
        let folder = format!("/proc/{pid}/fd");
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("reading QEMU's open files in {folder}"))?;
        let mut files = Self::default();
        for descriptor in entries.flatten().map(|entry| entry.path()) {
            let Ok(facts) = std::fs::metadata(&descriptor) else { continue };
            let identity = (facts.dev(), facts.ino());
            files.open.insert(identity);
            let link = std::fs::read_link(&descriptor).unwrap_or_default();
            let gone = link
                .to_str()
                .and_then(|link| link.strip_suffix(DELETED))
                .filter(|_| facts.is_file() && facts.nlink() == 0);
            if let Some(path) = gone {
                let known = files.deleted.entry(PathBuf::from(path)).or_default();
                if known.iter().all(|(other, _)| *other != identity) {
                    known.push((identity, descriptor));
                }
            }
        }
        Ok(files)
    }

    /// What became of the file at this path, where it is none that QEMU has open.
    pub fn moved(&self, path: &Path) -> Option<&'static str> {
        match std::fs::metadata(path) {
            Ok(facts) if self.open.contains(&(facts.dev(), facts.ino())) => None,
            Ok(_) => Some("another file is at its path"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Some("it was deleted or moved")
            }
            // Whether QEMU may open it is another question.
            Err(_) => None,
        }
    }

    /// The path by which the content of QEMU's file can be read: its own, or where it was deleted
    /// while QEMU has it open, that of a descriptor.
    ///
    /// # Errors
    /// A refusal where another file is at that path, and the open one cannot be identified.
    pub fn readable(&self, path: &Path) -> Result<PathBuf, VmError> {
        let here = std::fs::metadata(path);
        if here.as_ref().is_ok_and(|facts| self.open.contains(&(facts.dev(), facts.ino()))) {
            return Ok(path.to_owned());
        }
        match self.deleted.get(&real_path(path)).map(Vec::as_slice) {
            Some([(_, descriptor)]) => Ok(descriptor.clone()),
            Some([_, _, ..]) => Err(refused(format!(
                "QEMU has several deleted files open that were all {}; which one a disk shows is unknown: change the medium, or start the VM again",
                path.display()
            ))
            .into()),
            _ => Err(refused(match here {
                Ok(_) => format!(
                    "{} was replaced by another file since QEMU opened it; put the old one back, or start the VM again",
                    path.display()
                ),
                Err(error) => format!(
                    "{}: {error}; put the file back where it was, or start the VM again",
                    path.display()
                ),
            })
            .into()),
        }
    }
}

/// The path that the kernel tells of a file that is gone: without links.
fn real_path(path: &Path) -> PathBuf {
    const MAX_LINKS: usize = 8;
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { break };
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let real = folder.join(name);
        match std::fs::read_link(&real) {
            Ok(target) => path = folder.join(target),
            Err(_) => return real,
        }
    }
    path
}

#[cfg(test)]
mod test {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn open_file_is_readable_after_it_was_deleted_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let path = folder.join("medium.iso");
        std::fs::write(&path, "old").unwrap();
        let read = |files: &OpenFiles| {
            let mut text = String::new();
            File::open(files.readable(&path).unwrap()).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let first = File::open(&path).unwrap();
        assert_eq!(OpenFiles::of(std::process::id()).unwrap().readable(&path).unwrap(), path);
        let files = OpenFiles::of(std::process::id()).unwrap();
        assert_eq!(files.moved(&path), None);
        std::fs::remove_file(&path).unwrap();
        assert!(files.moved(&path).is_some_and(|what| what.contains("deleted")));
        assert_eq!(read(&OpenFiles::of(std::process::id()).unwrap()), "old");
        let link = folder.join("link.iso");
        std::os::unix::fs::symlink("medium.iso", &link).unwrap();
        assert!(
            OpenFiles::of(std::process::id()).unwrap().readable(&link).is_ok(),
            "by a link to it"
        );
        std::fs::write(&path, "new").unwrap();
        assert!(files.moved(&path).is_some_and(|what| what.contains("another file")));
        assert_eq!(
            read(&OpenFiles::of(std::process::id()).unwrap()),
            "old",
            "another file has its path"
        );
        let second = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = OpenFiles::of(std::process::id()).unwrap().readable(&path).unwrap_err();
        assert_eq!(error.class(), crate::error::Class::Refused, "{error}");
        drop((first, second));
        assert!(OpenFiles::of(std::process::id()).unwrap().readable(&path).is_err());
    }
}
