//! A store on a file system of a few MiB, to fill it up.

use crate::assert_root;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted tmpfs; unmounted on drop. Needs root.
pub struct SmallStore {
    path: PathBuf,
}

impl SmallStore {
    pub fn mount(path: PathBuf, mib: u64) -> Self {
        assert_root("mounting a tmpfs");
        std::fs::create_dir_all(&path).expect("a directory");
        let size = format!("size={mib}m");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "stillpoint-test"])
            .arg(&path)
            .status();
        assert!(status.is_ok_and(|status| status.success()), "mounting a tmpfs (package mount)");
        Self { path }
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
