//! Damage as disks and mistaken people do it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug)]
pub enum Damage {
    /// One bit at this place, counted in thousandths of the file.
    Flip(u64),
    /// Cut to this many thousandths.
    Truncate(u64),
    /// Bytes after the end.
    Append,
    /// Another file's content of the same length.
    Zeroes,
    Remove,
}

impl Damage {
    pub fn apply(self, path: &Path) {
        let len = std::fs::metadata(path).expect("a file of the store").len();
        let at = |thousandths: u64| (len * thousandths / 1000).min(len.saturating_sub(1));
        let file = || File::options().read(true).write(true).open(path).expect("the test owns it");
        match self {
            Damage::Flip(place) => {
                let mut byte = [0];
                file().read_exact_at(&mut byte, at(place)).expect("inside the file");
                file().write_all_at(&[byte[0] ^ 0x10], at(place)).expect("the test owns it");
            }
            Damage::Truncate(place) => file().set_len(at(place)).expect("the test owns it"),
            Damage::Append => file().write_all_at(b"appended", len).expect("the test owns it"),
            Damage::Zeroes => {
                file().write_all_at(&vec![0; len as usize], 0).expect("the test owns it")
            }
            Damage::Remove => std::fs::remove_file(path).expect("the test owns it"),
        }
    }
}

/// Every file below a directory.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

pub fn copy_tree(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(file.strip_prefix(from).expect("it is below"));
        std::fs::create_dir_all(target.parent().expect("it has one")).expect("a directory");
        std::fs::copy(&file, target).expect("a copy");
    }
}
