//! Checks whether a second QEMU process of this host can replace the old one: its manager, user,
//! namespaces and memory.

use anyhow::{Context, Result};
use std::path::Path;
use vm::error::refused;
use vm::files;
use vm::launch::arguments;
use vm::launch::host_specific::Manager;
use vm::launch::process::QemuProcess;
use vm::process::{self, Process};

/// Required beside the guest's RAM: for QEMU itself, and a reserve for other processes.
const SPARE_BYTES: u64 = 256 << 20;
/// Namespaces that the new QEMU, a child of ours, would not be in.
const NAMESPACES: &[&str] = &["mnt", "net", "pid", "user", "ipc"];

pub(super) fn check(process: &QemuProcess, ram_bytes: u64) -> Result<()> {
    check_manager(process)?;
    check_place(process)?;
    check_memory(available_memory()?, ram_bytes)
}

/// The VM's manager knows the old process, and would see it end.
fn check_manager(process: &QemuProcess) -> Result<()> {
    let options = arguments::parse(&process.words)?;
    let manager = Manager::of(&options).or_else(|| by_parent(process.pid));
    match manager {
        None => Ok(()),
        Some(manager) => Err(refused(format!(
            "{name} manages this VM (pid {}) and would see it end: the domain would be lost to it; let {name} start the VM by \
             Stillpoint's wrapper instead (docs/libvirt.md), or checkpoint it by stream as it is",
            process.pid,
            name = manager.name(),
        ))),
    }
}

fn by_parent(pid: u32) -> Option<Manager> {
    let stat = |pid: u32| process::open(pid).ok()?.stat().ok();
    let parent = stat(stat(pid)?.ppid.unsigned_abs())?;
    ["libvirtd", "virtqemud"].contains(&parent.comm.as_str()).then_some(Manager::Libvirt)
}

fn check_place(process: &QemuProcess) -> Result<()> {
    if process.user != nix::unistd::geteuid().as_raw() {
        return Err(refused(format!(
            "QEMU (pid {}) runs as user {}, and the new one would run as user {}; attach as that user",
            process.pid,
            process.user,
            nix::unistd::geteuid()
        )));
    }
    let there = process::open(process.pid).context("QEMU has ended")?;
    let here = Process::myself().context("looking at our own process")?;
    for name in NAMESPACES {
        let space = process::namespace(&there, name)
            .with_context(|| format!("looking at the {name} namespace of QEMU"))?;
        if space != process::namespace(&here, name).context("looking at our own namespaces")? {
            return Err(refused(format!(
                "QEMU (pid {}) is in another {name} namespace (a container?), where the new one would not be; run Stillpoint there",
                process.pid
            )));
        }
    }
    Ok(())
}

fn check_memory(available: u64, ram_bytes: u64) -> Result<()> {
    let needed = ram_bytes.saturating_add(SPARE_BYTES);
    if available >= needed {
        return Ok(());
    }
    Err(refused(format!(
        "the VM is in memory twice while it moves: that needs {} MiB, and {} MiB are available on this host; free some, or checkpoint it \
         by stream as it is",
        needed >> 20,
        available >> 20
    )))
}

/// Available memory in bytes, of the host or of our control group, whichever is less.
fn available_memory() -> Result<u64> {
    let available = process::available_memory()?;
    Ok(group_room().map_or(available, |room| room.min(available)))
}

/// Bytes that the helper's control group may still use, since the new QEMU is in it; `None` without
/// a limit.
fn group_room() -> Option<u64> {
    let own = process::control_group(&Process::myself().ok()?)?;
    let number = |folder: &Path, file: &str| {
        files::read_text(folder.join(file)).ok()?.trim().parse::<u64>().ok()
    };
    let root = Path::new("/sys/fs/cgroup");
    let mut room: Option<u64> = None;
    for folder in Path::new(own.trim_start_matches('/')).ancestors().map(|path| root.join(path)) {
        if let (Some(most), Some(now)) =
            (number(&folder, "memory.max"), number(&folder, "memory.current"))
        {
            let left = most.saturating_sub(now);
            room = Some(room.map_or(left, |room| room.min(left)));
        }
    }
    room
}

/// The systemd service that QEMU is in: its manager takes the end of that QEMU for the VM's.
pub(super) fn service_of(pid: u32) -> Option<String> {
    service(&process::control_group(&process::open(pid).ok()?)?)
}

fn service(group: &str) -> Option<String> {
    let unit = group.rsplit('/').find(|part| !part.is_empty())?;
    (unit.ends_with(".service") && !unit.starts_with("user@")).then(|| unit.to_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    fn process(words: &[&str]) -> QemuProcess {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        QemuProcess { words, ..QemuProcess::read(std::process::id()).unwrap() }
    }

    #[test]
    fn vms_of_a_manager_are_refused() {
        let error = check_manager(&process(&["-chardev", "socket,id=charmonitor,fd=20"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("libvirt") && error.contains("docs/libvirt.md"), "{error}");
        check_manager(&process(&["-drive", "file=/var/lib/libvirt/images/a.qcow2"])).unwrap();
    }

    #[test]
    fn another_users_process_is_refused() {
        check_place(&process(&[])).unwrap();
        let other = QemuProcess { user: 4_000_000, ..process(&[]) };
        assert!(check_place(&other).unwrap_err().to_string().contains("4000000"));
    }

    #[test]
    fn memory_must_suffice_for_both() {
        check_memory(2 << 30, 1 << 30).unwrap();
        assert!(check_memory(1 << 30, 1 << 30).unwrap_err().to_string().contains("1280 MiB"));
        assert!(available_memory().unwrap() > 0);
    }

    #[test]
    fn services_are_recognised() {
        assert_eq!(service("/system.slice/vm1.service").as_deref(), Some("vm1.service"));
        assert_eq!(service("/user.slice/user-0.slice/session-3.scope"), None);
        assert_eq!(service("/user.slice/user-1000.slice/user@1000.service"), None);
        assert_eq!(service("/"), None);
    }
}
