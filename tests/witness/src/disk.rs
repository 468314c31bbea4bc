//! Files and block devices as media: every access goes past the guest's page cache.
//!
//! The cache is part of RAM: a record read from it would prove nothing about the disk. `O_DIRECT`
//! is used where it can be had; on file systems without it (tmpfs) the start line says `cached`.

use crate::journal::Medium;
use crate::page::{PAGE_BYTES, Page};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

pub(crate) struct Disk {
    file: File,
    bytes: u64,
    direct: bool,
}

impl Disk {
    /// Opens a device as it is; a regular file is made, or made again, with `file_bytes` allocated
    /// bytes.
    pub(crate) fn open_journal(path: &Path, file_bytes: u64) -> io::Result<Self> {
        if !is_device(path) {
            allocate(path, file_bytes)?;
        }
        Self::open(path, true)
    }

    pub(crate) fn open_read_only(path: &Path) -> io::Result<Self> {
        Self::open(path, false)
    }

    fn open(path: &Path, write: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        let (mut file, direct) = match options.clone().custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (options.open(path)?, false)
            }
            Err(error) => return Err(error),
        };
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Disk { file, bytes, direct })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }
}

fn is_device(path: &Path) -> bool {
    // Symlinks are followed: /dev/disk/by-id names are devices too.
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Writes the file's zeros out, so that records later overwrite blocks in place.
fn allocate(path: &Path, bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    let zeros = vec![0; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..length as usize], at)?;
        at += length;
    }
    file.sync_all()
}

impl Medium for Disk {
    fn read_page(&mut self, place: u64, page: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(page.bytes_mut(), place * PAGE_BYTES as u64)
    }

    fn write_page(&mut self, place: u64, page: &Page) -> io::Result<()> {
        self.file.write_all_at(page.bytes(), place * PAGE_BYTES as u64)
    }

    fn make_durable(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_journal_file_is_allocated_and_keeps_what_is_written() {
        let path = std::env::temp_dir().join(format!("witness-disk-{}", std::process::id()));
        let mut disk =
            Disk::open_journal(&path, 3 * PAGE_BYTES as u64).expect("temp dir is writable");
        assert_eq!(disk.bytes(), 3 * PAGE_BYTES as u64);
        let mut page = Page::zeroed();
        page.bytes_mut()[7] = 9;
        disk.write_page(2, &page).expect("in range");
        disk.make_durable().expect("temp dir is writable");
        let mut back = Page::zeroed();
        disk.read_page(2, &mut back).expect("in range");
        assert_eq!(back.bytes(), page.bytes());
        assert!(disk.read_page(3, &mut back).is_err());
        std::fs::remove_file(&path).expect("it was just written");
    }
}
