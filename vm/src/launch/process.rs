//! A QEMU process as the kernel shows it: who it is, so that it is not taken for a later one of the
//! same number, and how it was started.

use crate::error::VmError;
use crate::process::{self, Process, started};
use anyhow::{Context, Result, bail};
use procfs::process::FDTarget;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// What the kernel puts behind the path of a program that was replaced since.
const DELETED: &str = " (deleted)";

/// What the kernel tells of a QEMU process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuProcess {
    /// Its process ID.
    pub pid: u32,
    /// In the kernel's ticks since boot.
    pub started: u64,
    /// The program's file, which may have been replaced since.
    pub program: PathBuf,
    /// Its working directory.
    pub directory: PathBuf,
    /// Its arguments, without the program.
    pub words: Vec<String>,
    /// Whose process it is.
    pub user: u32,
}

impl QemuProcess {
    /// Of a process that runs.
    ///
    /// # Errors
    /// If it does not, or this user may not read it.
    pub fn read(pid: u32) -> Result<Self, VmError> {
        let about = || {
            format!(
                "reading /proc/{pid}; Stillpoint must run as root or as the user of that QEMU, \
                 on the same host"
            )
        };
        let process = process::open(pid).with_context(about)?;
        Ok(Self {
            pid,
            program: without_deleted(&process.exe().with_context(about)?),
            directory: process.cwd().with_context(about)?,
            words: words(pid, process::command_line(&process).with_context(about)?)?,
            user: process.uid().with_context(about)?,
            started: started(pid).with_context(|| format!("process {pid} has ended"))?,
        })
    }

    /// The network device behind a descriptor of the process, if it is a tap.
    pub fn tap(&self, descriptor: &str) -> Option<String> {
        let number: u32 = descriptor.parse().ok()?;
        // procfs has no type for it.
        let facts = process::read(&process::open(self.pid).ok()?, &format!("fdinfo/{number}"));
        let text = String::from_utf8_lossy(&facts.ok()?).into_owned();
        text.lines()
            .find_map(|line| Some(line.strip_prefix("iff:")?.trim().to_owned()))
            .filter(|name| !name.is_empty())
    }
}

/// Whether a process is a QEMU that runs a VM, by its program's name: `qemu-system-x86_64`,
/// `qemu-kvm`, `kvm`.
pub fn runs_qemu(pid: u32) -> bool {
    process::open(pid).is_ok_and(|process| is_qemu(&process))
}

fn is_qemu(process: &Process) -> bool {
    process.exe().is_ok_and(|program| is_qemu_program(&without_deleted(&program)))
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

fn words(pid: u32, line: Vec<Vec<u8>>) -> Result<Vec<String>> {
    let words: Result<Vec<String>, _> = line.into_iter().map(String::from_utf8).collect();
    let Ok(mut words) = words else {
        bail!(
            "the command line of process {pid} is not valid UTF-8; start that VM with paths that are"
        );
    };
    match words.first() {
        Some(program) if !program.is_empty() => Ok(words.split_off(1)),
        _ => bail!("process {pid} shows no command line; is it ending?"),
    }
}

/// Running QEMUs that have one of these sockets open.
pub fn qemus_with_socket(inodes: &HashSet<u64>) -> Vec<u32> {
    let holds_socket = |process: &Process| {
        let mut files = process.fd().into_iter().flatten().flatten();
        files.any(|file| matches!(file.target, FDTarget::Socket(inode) if inodes.contains(&inode)))
    };
    let holders = process::all().filter(|process| is_qemu(process) && holds_socket(process));
    holders.map(|process| process.pid.unsigned_abs()).collect()
}

#[cfg(test)]
mod test {
    use super::*;

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
    fn words_follow_the_program() {
        let line = |words: &[&[u8]]| words.iter().map(|word| word.to_vec()).collect();
        assert_eq!(words(1, line(&[b"qemu", b"-m", b"", b"a b"])).unwrap(), ["-m", "", "a b"]);
        assert!(words(1, line(&[b""])).is_err() && words(1, line(&[b"qemu", b"\xff"])).is_err());
    }
}
