//! A store on a file system of a few MiB, to fill it up.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted tmpfs; unmounted on drop. Needs root.
pub struct SmallStore {
    path: PathBuf,
}

impl SmallStore {
    /// None, and a line on stderr, without the right to mount.
    pub fn mount(path: PathBuf, mib: u64) -> Option<Self> {
        std::fs::create_dir_all(&path).expect("a directory");
        let size = format!("size={mib}m");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "stillpoint-test"])
            .arg(&path)
            .status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Self { path });
        }
        eprintln!("NOT TESTED with a full file system: mounting a tmpfs needs root");
        None
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves only `bytes` free, until the value is dropped.
    pub fn fill_but(&self, bytes: u64) -> impl Drop + use<> {
        struct Ballast(PathBuf);
        impl Drop for Ballast {
            fn drop(&mut self) {
                std::fs::remove_file(&self.0).expect("the test made it");
            }
        }
        let facts = nix::sys::statvfs::statvfs(&self.path).expect("it is mounted");
        let free = facts.blocks_available() * facts.fragment_size();
        let path = self.path.join("ballast");
        std::fs::write(&path, vec![1; free.saturating_sub(bytes) as usize]).expect("there is room");
        Ballast(path)
    }
}

impl Drop for SmallStore {
    fn drop(&mut self) {
        // Lazily: a helper that is being killed may still hold a file.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
