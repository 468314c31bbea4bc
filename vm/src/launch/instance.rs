//! The instance of an external QEMU. It is derived from the process, so that a helper that attaches
//! again derives the same one, and a reader can check whether that process still runs.
//!
//! `process-PID-START-DIGEST`, where the digest is that of this boot, the store and the VM's name:
//! QEMU's dirty bitmaps carry the instance, and those of one name must never be taken for
//! another's.

use crate::error::VmError;
use crate::process;
use checkpoint_format::VmName;

const PREFIX: &str = "process-";
const DIGEST_LETTERS: usize = 16;

/// The instance of a process of this boot.
///
/// # Errors
/// If the kernel does not tell which boot this is.
pub fn of_process(pid: u32, started: u64, store: &str, name: &VmName) -> Result<String, VmError> {
    let boot = process::boot_id()?;
    let digest = blake3::hash(format!("{boot}\n{store}\n{name}").as_bytes()).to_hex();
    Ok(format!("{PREFIX}{pid}-{started}-{}", &digest[..DIGEST_LETTERS]))
}

/// Whether the process of such an instance runs; `None` for instances of another kind.
pub fn process_runs(instance: &str) -> Option<bool> {
    let (pid, started) = parse(instance)?;
    Some(process::started(pid) == Some(started))
}

fn parse(instance: &str) -> Option<(u32, u64)> {
    let mut parts = instance.strip_prefix(PREFIX)?.splitn(3, '-');
    let (pid, started) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().map(|_| (pid, started))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_process_is_known_again_by_its_start() {
        let pid = std::process::id();
        let started = process::started(pid).unwrap();
        let name: VmName = "m".parse().unwrap();
        let instance = of_process(pid, started, "file:///s", &name).unwrap();
        assert_eq!(instance, of_process(pid, started, "file:///s", &name).unwrap());
        assert_eq!(process_runs(&instance), Some(true));
        let later = of_process(pid, started + 1, "file:///s", &name).unwrap();
        assert_eq!(process_runs(&later), Some(false), "another process got the number");
        assert_eq!(process_runs("6b9e6d2c-70a5-4f3e-9a4b-111111111111"), None);
    }

    #[test]
    fn names_and_stores_are_distinguished() {
        let of = |store: &str, name: &str| of_process(1, 2, store, &name.parse().unwrap()).unwrap();
        assert!(
            of("file:///s", "a") != of("file:///s", "b")
                && of("file:///s", "a") != of("file:///t", "a")
        );
        assert!(of("file:///s", "a").len() <= 64, "a bitmap's tag has 64 letters at most");
    }
}
