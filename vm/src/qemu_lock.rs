//! One helper for one QEMU, from whatever runtime directory, of whatever user.
//!
//! Two would take each other's fleecing overlays, bitmaps and marks apart. The lock is on the
//! directory `/proc/PID/fd` of the QEMU: it belongs to the process and ends with it, only its user
//! and root can open it, and the kernel releases it when the helper ends, however that happens.

use crate::error::refused;
use crate::files;
use crate::runtime_dir;
use anyhow::Result;
use nix::fcntl::Flock;
use std::fs::File;

/// Held as long as the helper works on that QEMU.
#[derive(Debug)]
pub(crate) struct QemuLock {
    _lock: Flock<File>,
}

impl QemuLock {
    /// Refused while another process holds it.
    pub(crate) fn take(qemu: u32) -> Result<Self> {
        let path = format!("/proc/{qemu}/fd");
        let directory = File::open(&path);
        let file = directory.map_err(|error| {
            refused(format!("{path} cannot be opened: {error}; Stillpoint must run as root or as the user of that QEMU, on the same host"))
        })?;
        let lock = files::lock(file).map_err(|file| {
            refused(format!(
                "QEMU (pid {qemu}) has a helper already: {}; use that one, or end it",
                runtime_dir::flock_holder(&file)
                    .unwrap_or_else(|| "a process that cannot be seen from here".to_owned())
            ))
        })?;
        Ok(Self { _lock: lock })
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
