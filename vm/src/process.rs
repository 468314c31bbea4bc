//! Processes of this host: read by the crate [`procfs`], signalled and waited for by pidfd.
//!
//! [`procfs::process::Process`] holds a file descriptor of `/proc/PID` and reads what is in it.
//! When the process has ended, reading fails with [`ProcError::NotFound`], also if its number has
//! been given to another one. Not so for what is only reachable by a path, like the open files and
//! the memory that other modules open: who needs it of one certain process compares
//! [`started`] after opening.
//!
//! The kernel bounds the length of its records (`stat`, `status`). What a process can make as long
//! as it likes (command line, environment, memory map) is read here, with a limit.

use crate::error::VmError;
use anyhow::{Context, anyhow};
use dirty_tracker::parse_maps;
use procfs::process::{MemoryMaps, all_processes};
use procfs::{Current, Meminfo, ProcError, ProcResult, ProcessCGroups};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub use procfs::process::Process;
pub use rustix::process::Signal;

/// Some 200 bytes for each mapping; the longest command lines, libvirt's, have 20 KiB.
const MAX_BYTES: u64 = 16 << 20;
/// A killed process with a large memory takes a while to go.
const END: Duration = Duration::from_secs(30);

/// # Errors
/// [`ProcError::NotFound`] when there is none of that number.
pub fn open(pid: u32) -> ProcResult<Process> {
    Process::new(i32::try_from(pid).map_err(|_| ProcError::NotFound(None))?)
}

/// All that can be seen from here.
pub fn all() -> impl Iterator<Item = Process> {
    all_processes().into_iter().flatten().flatten()
}

/// The words of its command line, beginning with the program.
///
/// # Errors
/// Where they cannot be read, or are too long.
pub fn command_line(process: &Process) -> ProcResult<Vec<Vec<u8>>> {
    words(process, "cmdline")
}

/// Its environment as it was at its start: words of the form `NAME=VALUE`.
///
/// # Errors
/// Where it cannot be read, or is too long.
pub fn environment(process: &Process) -> ProcResult<Vec<Vec<u8>>> {
    words(process, "environ")
}

/// Its memory map, ascending by address.
///
/// # Errors
/// Where it cannot be read, or is too long.
pub fn memory_maps(process: &Process) -> ProcResult<MemoryMaps> {
    parse_maps(&read(process, "maps")?)
}

fn words(process: &Process, file: &str) -> ProcResult<Vec<Vec<u8>>> {
    let bytes = read(process, file)?;
    let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    Ok(text.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
}

/// A file of `/proc/PID`.
///
/// # Errors
/// Where it cannot be read, or is too long.
pub fn read(process: &Process, file: &str) -> ProcResult<Vec<u8>> {
    let mut bytes = Vec::new();
    process.open_relative(file)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ProcError::Other(format!("{file} is longer than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// When a process began, in the kernel's ticks since boot; `None` when there is none or only what
/// is left of one.
pub fn started(pid: u32) -> Option<u64> {
    let stat = open(pid).ok()?.stat().ok()?;
    // A zombie has ended and was not waited for yet.
    (!matches!(stat.state, 'Z' | 'X')).then_some(stat.starttime)
}

/// Which namespace of a kind (`pid`, `net`) it is in; `None` where the kernel has no such kind.
///
/// # Errors
/// Where they cannot be read.
pub fn namespace(process: &Process, kind: &str) -> ProcResult<Option<u64>> {
    Ok(process.namespaces()?.0.get(OsStr::new(kind)).map(|namespace| namespace.identifier))
}

/// Its place in the hierarchy of control groups (version 2).
pub fn control_group(process: &Process) -> Option<String> {
    let groups = process.read::<_, ProcessCGroups>("cgroup").ok()?;
    groups.into_iter().find(|group| group.hierarchy == 0).map(|group| group.pathname)
}

/// What the host can give without swapping, in bytes, as the kernel estimates it.
///
/// # Errors
/// Where the kernel does not say.
pub fn available_memory() -> Result<u64, VmError> {
    let facts = Meminfo::current().context("asking the kernel for free memory")?;
    Ok(facts.mem_available.context("the kernel does not say how much memory is available")?)
}

/// Of the kernel that runs, from its boot to its end.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn boot_id() -> Result<String, VmError> {
    Ok(procfs::sys::kernel::random::boot_id().context("asking for the boot's id")?)
}

/// One process, whatever becomes of its number.
#[derive(Debug)]
pub struct ProcessFd(OwnedFd);

impl ProcessFd {
    /// `None`: it has ended, and its parent knows.
    ///
    /// # Errors
    /// When `pid` is no process id, or the kernel gives no descriptor.
    pub fn open(pid: u32) -> Result<Option<Self>, VmError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.with_context(|| format!("{pid} is no process id"))?;
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(descriptor) => Ok(Some(Self(descriptor))),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(anyhow!(error).context(format!("opening process {pid}")).into()),
        }
    }

    /// No error if it has ended.
    ///
    /// # Errors
    /// When this user may not signal it.
    pub fn signal(&self, signal: Signal) -> Result<(), VmError> {
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(anyhow!(error).context("signalling the process").into()),
        }
    }

    /// Until all its threads have ended; false if they have not within `timeout`.
    ///
    /// # Errors
    /// When the kernel does not wait for it.
    pub fn wait(&self, timeout: Duration) -> Result<bool, VmError> {
        let timeout = timeout.try_into().context("a timeout is at most some years")?;
        let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
        Ok(poll(&mut ended, Some(&timeout)).context("waiting for the end of a process")? == 1)
    }
}

/// Ends the process that began then, for good, and waits until it is gone. A later one of its
/// number is left alone.
///
/// # Errors
/// When it cannot be ended, or does not end within 30 s.
pub fn end(pid: u32, began: u64) -> Result<(), VmError> {
    let Some(process) = ProcessFd::open(pid)? else { return Ok(()) };
    // Asked after the pidfd was opened: it is that very process's.
    if started(pid) != Some(began) {
        return Ok(());
    }
    process.signal(Signal::KILL).with_context(|| format!("ending process {pid}"))?;
    if !process.wait(END)? {
        return Err(anyhow!("process {pid} does not end; end it by hand").into());
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    fn child() -> Child {
        Command::new("sh")
            .args(["-c", "read line", "a b", ""])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn process_is_ended_only_if_it_is_the_one() {
        let mut child = child();
        let began = started(child.id()).unwrap();
        end(child.id(), began + 1).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "another process of its number");
        end(child.id(), began).unwrap();
        assert_eq!(started(child.id()), None, "a zombie does not run");
        assert!(!child.wait().unwrap().success());
        end(child.id(), began).unwrap();
        assert!(ProcessFd::open(0).is_err() && ProcessFd::open(child.id()).unwrap().is_none());
    }

    #[test]
    fn process_that_is_gone_is_not_found() {
        let mut child = child();
        let process = open(child.id()).unwrap();
        // A process shows no arguments for a moment while it starts.
        let end = Instant::now() + END;
        while command_line(&process).unwrap().len() < 5 && Instant::now() < end {}
        assert_eq!(command_line(&process).unwrap()[2..], [&b"read line"[..], b"a b", b""]);
        assert!(!environment(&process).unwrap().is_empty());
        let waited = ProcessFd::open(child.id()).unwrap().unwrap();
        assert!(!waited.wait(Duration::ZERO).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(waited.wait(Duration::ZERO).unwrap());
        waited.signal(Signal::TERM).unwrap();
        for error in [command_line(&process).unwrap_err(), process.stat().unwrap_err()] {
            assert!(matches!(error, ProcError::NotFound(_)), "{error}");
        }
        for pid in [0, child.id(), u32::MAX] {
            assert!(matches!(open(pid), Err(ProcError::NotFound(_))));
        }
    }

    #[test]
    fn memory_map_of_this_process_is_read() {
        let text = String::from("here");
        let here = text.as_ptr() as u64;
        let maps = memory_maps(&Process::myself().unwrap()).unwrap();
        assert!(maps.iter().any(|mapping| (mapping.address.0..mapping.address.1).contains(&here)));
        assert!(available_memory().unwrap() > 0);
    }
}
