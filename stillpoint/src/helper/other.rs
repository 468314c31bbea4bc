//! The helper that holds a VM, as another process sees it: signalled only if it is one, and never a
//! later process of its number.

use anyhow::{Context, Result};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use vm::error::refused;
use vm::files;
use vm::runtime_dir::RuntimeDir;

pub struct OtherHelper {
    pub pid: Pid,
    /// Of that process alone, whatever becomes of its number.
    descriptor: OwnedFd,
}

impl OtherHelper {
    /// The process that `helper.pid` names; none if it has ended. Refused if it is not this VM's
    /// helper.
    pub fn find(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let pid = runtime.helper_pid_of_holder()?;
        let number =
            rustix::process::Pid::from_raw(pid.as_raw()).context("a process id is above zero")?;
        let descriptor = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("opening process {pid}")),
        };
        // After the descriptor is open: what is proven is proven of that very process.
        if runtime.is_locked_by(pid) || is_helper_of(pid, runtime) {
            return Ok(Some(Self { pid, descriptor }));
        }
        Err(refused(format!(
            "{} names process {pid}, which is no helper of this VM, so it is left alone; end the helper by hand",
            runtime.helper_pid().display()
        )))
    }

    pub fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(&self.descriptor, signal) {
            tracing::debug!(pid = %self.pid, %error, "signalling the other helper");
        }
    }
}

/// Where the kernel's table of locks does not show other processes: this program, as the helper of
/// that VM.
fn is_helper_of(pid: Pid, runtime: &RuntimeDir) -> bool {
    let file = |path: String| std::fs::metadata(path).map(|facts| (facts.dev(), facts.ino())).ok();
    let program = file(format!("/proc/{pid}/exe"));
    let line = files::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let name = runtime.path().file_name().unwrap_or_default();
    let is_word = |word: &str| words.contains(&word.as_bytes());
    program.is_some()
        && program == file("/proc/self/exe".to_owned())
        && (is_word("helper") || is_word("attach"))
        && words.contains(&name.as_encoded_bytes())
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::exit::{REFUSED, code_of};
    use std::process::{Command, Stdio};

    /// A number that a file names proves nothing.
    #[test]
    fn take_over_leaves_other_processes_alone() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        let mut child =
            Command::new("sh").args(["-c", "read helper m"]).stdin(Stdio::piped()).spawn().unwrap();
        runtime.replace("helper.pid", child.id().to_string().as_bytes()).unwrap();
        assert_eq!(code_of(&OtherHelper::find(&runtime).err().unwrap()), REFUSED);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(OtherHelper::find(&runtime).unwrap().is_none());
        // The holder of the lock is one: this process.
        let _lock = runtime.lock_helper().unwrap();
        runtime.replace("helper.pid", std::process::id().to_string().as_bytes()).unwrap();
        assert_eq!(OtherHelper::find(&runtime).unwrap().unwrap().pid, Pid::this());
    }
}
