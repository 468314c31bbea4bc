//! One helper for one QEMU, from whatever runtime directory, of whatever user.
//!
//! Two would take each other's fleecing overlays, bitmaps and marks apart. The lock is on the
//! directory `/proc/PID/fd` of the QEMU: it belongs to the process and ends with it, only its user
//! and root can open it, and the kernel releases it when the helper ends, however that happens.

use crate::error::refused;
use crate::runtime_dir;
use anyhow::Result;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::time::{Duration, Instant};

/// A killed helper keeps its locks until the last of its threads is gone.
const RELEASE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// Held as long as the helper works on that QEMU.
#[derive(Debug)]
pub struct QemuLock {
    _lock: Flock<File>,
}

impl QemuLock {
    /// Refused while another process holds it.
    pub fn take(qemu: u32) -> Result<Self> {
        let path = format!("/proc/{qemu}/fd");
        let directory = File::open(&path);
        let mut file = directory.map_err(|error| {
            refused(format!("{path} cannot be opened: {error}; Stillpoint must run as root or as the user of that QEMU, on the same host"))
        })?;
        let end = Instant::now() + RELEASE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { _lock: lock }),
                Err((file, _)) => file,
            };
            if Instant::now() >= end {
                return Err(refused(format!(
                    "QEMU (pid {qemu}) has a helper already: {}; use that one, or end it",
                    runtime_dir::flock_holder(&file)
                        .unwrap_or_else(|| "a process that cannot be seen from here".to_owned())
                )));
            }
            std::thread::sleep(POLL);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::error::{Class, class_of};

    #[test]
    fn helper_of_a_qemu_is_one() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lock = QemuLock::take(child.id()).unwrap();
        let error = QemuLock::take(child.id()).unwrap_err();
        assert_eq!(class_of(&error), Class::Refused);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        QemuLock::take(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(class_of(&QemuLock::take(child.id()).unwrap_err()), Class::Refused);
    }
}
