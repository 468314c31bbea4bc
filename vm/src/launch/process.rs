//! A QEMU process as the kernel shows it: who it is, so that it is not taken for a later one of the
//! same number, and how it was started.

use crate::files::read_limited;
use anyhow::{Context, Result, bail};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The kernel's own limit for one argument is 128 KiB; libvirt's longest lines have some 20 KiB in
/// all.
const MAX_COMMAND_LINE_BYTES: u64 = 4 << 20;
const MAX_STAT_BYTES: u64 = 4096;
/// Field 22 of `stat`, counted from the state, which is field 3.
const START_TIME: usize = 22 - 3;
/// A killed process with a large memory takes a while to go.
const END: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// What the kernel puts behind the path of a program that was replaced since.
const DELETED: &str = " (deleted)";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuProcess {
    pub pid: u32,
    /// In the kernel's ticks since boot.
    pub started: u64,
    /// The program's file, which may have been replaced since.
    pub program: PathBuf,
    pub directory: PathBuf,
    /// Its arguments, without the program.
    pub words: Vec<String>,
    /// Whose process it is.
    pub user: u32,
}

impl QemuProcess {
    pub fn read(pid: u32) -> Result<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let about = |file: &str| {
            format!(
                "reading {}/{file}; Stillpoint must run as root or as the user of that QEMU, on the same host",
                folder.display()
            )
        };
        let program = std::fs::read_link(folder.join("exe")).with_context(|| about("exe"))?;
        let directory = std::fs::read_link(folder.join("cwd")).with_context(|| about("cwd"))?;
        let line = read_limited(&folder.join("cmdline"), MAX_COMMAND_LINE_BYTES)
            .with_context(|| about("cmdline"))?;
        let user = std::fs::metadata(&folder).with_context(|| about(""))?.uid();
        let started = started(pid).with_context(|| format!("process {pid} has ended"))?;
        Ok(Self {
            pid,
            started,
            program: without_deleted(&program),
            directory,
            words: words(pid, &line)?,
            user,
        })
    }

    /// The network device behind a descriptor of the process, if it is a tap.
    pub fn tap(&self, descriptor: &str) -> Option<String> {
        let number: u32 = descriptor.parse().ok()?;
        let facts =
            read_limited(Path::new(&format!("/proc/{}/fdinfo/{number}", self.pid)), MAX_STAT_BYTES)
                .ok()?;
        let text = String::from_utf8_lossy(&facts).into_owned();
        text.lines()
            .find_map(|line| Some(line.strip_prefix("iff:")?.trim().to_owned()))
            .filter(|name| !name.is_empty())
    }
}

/// Whether a process is a QEMU that runs a VM, by its program's name: `qemu-system-x86_64`,
/// `qemu-kvm`, `kvm`.
pub fn runs_qemu(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|program| is_qemu_program(&without_deleted(&program)))
}

fn is_qemu_program(program: &Path) -> bool {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    name == "kvm" || name.contains("qemu-system-") || name.contains("qemu-kvm")
}

fn without_deleted(path: &Path) -> PathBuf {
    path.to_str()
        .and_then(|text| text.strip_suffix(DELETED))
        .map_or_else(|| path.to_owned(), PathBuf::from)
}

fn words(pid: u32, line: &[u8]) -> Result<Vec<String>> {
    let Ok(text) = std::str::from_utf8(line) else {
        bail!(
            "the command line of process {pid} is not valid UTF-8; start that VM with paths that are"
        );
    };
    let mut words = text.strip_suffix('\0').unwrap_or(text).split('\0').map(str::to_owned);
    match words.next() {
        Some(program) if !program.is_empty() => Ok(words.collect()),
        _ => bail!("process {pid} shows no command line; is it ending?"),
    }
}

/// When a process began; `None` when there is none or only what is left of one.
pub fn started(pid: u32) -> Option<u64> {
    let stat = read_limited(Path::new(&format!("/proc/{pid}/stat")), MAX_STAT_BYTES).ok()?;
    start_time(&String::from_utf8_lossy(&stat))
}

fn start_time(stat: &str) -> Option<u64> {
    // The name stands in parentheses and may hold any letter.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let is_gone = matches!(fields.first(), Some(&"Z" | &"X"));
    fields.get(START_TIME).filter(|_| !is_gone)?.parse().ok()
}

/// Ends the process that began then, for good, and waits until it is gone. A later one of its
/// number is left alone.
pub fn end(pid: u32, began: u64) -> Result<()> {
    let number = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .with_context(|| format!("{pid} is no process id"))?;
    let Ok(descriptor) = pidfd_open(number, PidfdFlags::empty()) else { return Ok(()) };
    let until = Instant::now() + END;
    // Asked after the descriptor was opened: it is that very process's.
    while started(pid) == Some(began) {
        pidfd_send_signal(&descriptor, Signal::KILL)
            .or_else(gone)
            .with_context(|| format!("ending process {pid}"))?;
        if Instant::now() >= until {
            bail!("process {pid} does not end; end it by hand");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn gone(error: rustix::io::Errno) -> rustix::io::Result<()> {
    if error == rustix::io::Errno::SRCH { Ok(()) } else { Err(error) }
}

/// Running QEMUs that have one of these sockets open.
pub fn qemus_with_socket(inodes: &HashSet<u64>) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|pid| runs_qemu(*pid) && holds_socket(*pid, inodes)).collect()
}

fn holds_socket(pid: u32, inodes: &HashSet<u64>) -> bool {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
    targets.any(|target| socket_inode(&target).is_some_and(|inode| inodes.contains(&inode)))
}

fn socket_inode(target: &Path) -> Option<u64> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 19 20";
        assert_eq!(start_time(&format!("7 (a) S) b) S {rest}")), Some(4242));
        assert_eq!(start_time(&format!("7 (a) Z {rest}")), None, "a zombie does not run");
        assert_eq!(start_time("7 (a) S 1 2"), None);
    }

    #[test]
    fn this_process_is_found_and_is_no_qemu() {
        let own = QemuProcess::read(std::process::id()).unwrap();
        assert_eq!(own.started, started(std::process::id()).unwrap());
        assert_eq!(own.directory, std::env::current_dir().unwrap());
        assert!(!runs_qemu(own.pid) && own.tap("0").is_none());
        assert!(QemuProcess::read(0).is_err());
    }

    #[test]
    fn programs_that_are_a_qemu() {
        let is = |path: &str| is_qemu_program(&without_deleted(Path::new(path)));
        assert!(
            [
                "/usr/bin/qemu-system-x86_64",
                "/usr/libexec/qemu-kvm",
                "/usr/bin/kvm (deleted)",
                "/nix/x/.qemu-system-x86_64-wrapped"
            ]
            .into_iter()
            .all(is)
        );
        assert!(
            !["/usr/sbin/libvirtd", "/usr/bin/qemu-storage-daemon", "/usr/bin/socat"]
                .into_iter()
                .any(is)
        );
    }

    #[test]
    fn process_is_ended_only_if_it_is_the_one() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let began = started(child.id()).unwrap();
        end(child.id(), began + 1).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "another process of its number");
        end(child.id(), began).unwrap();
        assert!(!child.wait().unwrap().success());
        end(child.id(), began).unwrap();
    }

    #[test]
    fn words_are_split_at_zeros() {
        assert_eq!(words(1, b"qemu\0-m\0\0a b\0").unwrap(), ["-m", "", "a b"]);
        assert!(words(1, b"").is_err() && words(1, b"qemu\0\xff\0").is_err());
    }
}
