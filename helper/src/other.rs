//! The helper that holds a VM, as another process sees it: signalled only if it is one, and never a
//! later process of its number.

use anyhow::Result;
use nix::unistd::Pid;
use rustix::fs::OFlags;
use std::os::unix::fs::MetadataExt;
use vm::error::refused;
use vm::process::{self, Process, ProcessFd, Signal};
use vm::runtime_dir::RuntimeDir;

pub(crate) struct OtherHelper {
    pub pid: Pid,
    /// Of that process alone, whatever becomes of its number.
    process: ProcessFd,
}

impl OtherHelper {
    /// The process that `helper.pid` names; none if it has ended. Refused if it is not this VM's
    /// helper.
    pub(crate) fn find(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let pid = runtime.helper_pid_of_holder()?;
        let number = pid.as_raw().unsigned_abs();
        let Some(process) = ProcessFd::open(number)? else { return Ok(None) };
        // After the pidfd is open: what is proven is proven of that very process.
        if runtime.is_locked_by(pid) || is_ours(number, &["helper", "attach"], runtime) {
            return Ok(Some(Self { pid, process }));
        }
        Err(refused(format!(
            "{} names process {pid}, which is no helper of this VM, so it is left alone; end the helper by hand",
            runtime.helper_pid().display()
        )))
    }

    /// Before the helper is killed, so that no other takes its place.
    pub(crate) fn end_supervisor(&self, runtime: &RuntimeDir) {
        let stat = process::open(self.pid.as_raw().unsigned_abs()).and_then(|helper| helper.stat());
        let Some(parent) = stat.ok().and_then(|stat| u32::try_from(stat.ppid).ok()) else { return };
        // Opened before it is looked at, as the helper's own.
        let Ok(Some(supervisor)) = ProcessFd::open(parent) else { return };
        if is_ours(parent, &["supervise"], runtime)
            && let Err(error) = supervisor.signal(Signal::KILL)
        {
            let error = format!("{error:#}");
            tracing::debug!(pid = parent, error, "ending the other helper's supervisor");
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Err(error) = self.process.signal(signal) {
            let error = format!("{error:#}");
            tracing::debug!(pid = %self.pid, error, "signalling the other helper");
        }
    }
}

/// This program, by one of these commands, for that VM. Of the helper asked only where the kernel's
/// table of locks does not show other processes.
fn is_ours(pid: u32, commands: &[&str], runtime: &RuntimeDir) -> bool {
    let program = |process: &Process| {
        let facts = process.open_relative_flags("exe", OFlags::PATH).ok()?.metadata().ok()?;
        Some((facts.dev(), facts.ino()))
    };
    let (Ok(process), Ok(own)) = (process::open(pid), Process::myself()) else { return false };
    let words = process::command_line(&process).unwrap_or_default();
    let name = runtime.path().file_name().unwrap_or_default();
    let is_word = |word: &[u8]| words.iter().any(|other| other == word);
    program(&process).is_some_and(|there| Some(there) == program(&own))
        && commands.iter().any(|command| is_word(command.as_bytes()))
        && is_word(name.as_encoded_bytes())
}

#[cfg(test)]
mod test {
    use super::*;
    use std::process::{Command, Stdio};
    use vm::error::{Class, class_of};

    /// A number that a file names proves nothing.
    #[test]
    fn take_over_leaves_other_processes_alone() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        let mut child =
            Command::new("sh").args(["-c", "read helper m"]).stdin(Stdio::piped()).spawn().unwrap();
        runtime.replace("helper.pid", child.id().to_string().as_bytes()).unwrap();
        assert_eq!(class_of(&OtherHelper::find(&runtime).err().unwrap()), Class::Refused);
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
