//! Reads whole files, each with a limit, because even a file of the kernel can be as long as
//! another process makes it; and locks files.

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// Limit in bytes for files of the kernel about a process or the host. The largest are memory maps,
/// command lines and environments.
const MAX_KERNEL_FILE: u64 = 16 << 20;
/// A killed process keeps its locks until the last of its threads has ended.
const RELEASE: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Reads a file of the kernel or of this project, of at most 16 MiB.
///
/// # Errors
/// If it cannot be read or is longer.
pub fn read(path: impl AsRef<Path>) -> std::io::Result<Vec<u8>> {
    read_at_most(path.as_ref(), MAX_KERNEL_FILE)
}

/// Reads such a file as text.
///
/// # Errors
/// If it cannot be read, is longer or no UTF-8.
pub fn read_text(path: impl AsRef<Path>) -> std::io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| Error::new(ErrorKind::InvalidData, error))
}

/// Reads any file, of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    read_at_most(path, limit).with_context(|| format!("reading {}", path.display()))
}

/// Locks a file for this process alone. Waits up to one second.
///
/// # Errors
/// The file, if another process holds the lock for longer than the timeout.
pub fn lock(mut file: File) -> Result<Flock<File>, File> {
    let deadline = Instant::now() + RELEASE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, _)) if Instant::now() >= deadline => return Err(file),
            Err((file, _)) => file,
        };
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn read_at_most(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Not by its length: that of a pipe or a device is 0.
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(Error::new(
            ErrorKind::FileTooLarge,
            format!("it is longer than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn file_without_an_end_is_an_error() {
        assert_eq!(
            read_at_most(Path::new("/dev/zero"), 100).unwrap_err().kind(),
            ErrorKind::FileTooLarge
        );
        assert_eq!(read_limited(Path::new("/dev/null"), 0).unwrap(), b"");
        assert!(
            format!("{:#}", read_limited(Path::new("/dev/zero"), 1).unwrap_err())
                .contains("/dev/zero")
        );
    }
}
