//! What QEMU does when I/O of a disk fails.

use super::Started;
use super::auto_id::Board;
use super::line::Line;
use crate::launch::arguments::QemuOption;
use crate::launch::form::Form;
use std::path::Path;

/// Devices that know the policy, by the beginnings of their drivers' names.
const DEVICES: &[&str] =
    &["ide-cd", "ide-hd", "scsi-block", "scsi-cd", "scsi-hd", "usb-storage", "virtio-blk"];
/// The same of `-drive if=`; without it the board chooses one of these.
const INTERFACES: &[&str] = &["none", "virtio", "ide", "scsi"];
const KEYS: [&str; 2] = ["rerror", "werror"];

/// The command line with which QEMU stops the guest when I/O of this disk fails, and repeats what
/// has failed on `cont`: the guest gets no error. None if the line has a policy, or the disk's
/// device knows none. `disk` is its name in the store, `file` its image.
pub fn stop_at_errors(started: &Started<'_>, disk: &str, file: &Path) -> Option<Vec<QemuOption>> {
    let line = Line {
        options: started.options,
        directory: started.directory,
        board: Board::of(started.machine_type),
    };
    let mut options = started.options.to_vec();
    let places = |name: &str| {
        let is_it = |(_, option): &(usize, &QemuOption)| option.name == name;
        started.options.iter().enumerate().filter(is_it).map(|(at, _)| at).collect::<Vec<_>>()
    };
    let drive = places("drive").into_iter().find(|at| line.names_file(*at, file));
    let id = drive.and_then(|at| Form::of(&options[at]).get("id"));
    let uses = |at: &usize| {
        let used = Form::of(&started.options[*at]).get("drive");
        used.is_some() && (used == id || used.as_deref() == Some(disk))
    };
    let devices: Vec<usize> = places("device").into_iter().filter(uses).collect();
    let knows = |at: &usize| {
        let driver = Form::of(&started.options[*at]).get("driver").unwrap_or_default();
        DEVICES.iter().any(|device| driver.starts_with(device))
    };
    let interface = drive.and_then(|at| Form::of(&options[at]).get("if"));
    let is_known = interface.is_none_or(|name| INTERFACES.contains(&name.as_str()));
    let chosen = |at: &usize| KEYS.iter().any(|key| Form::of(&started.options[*at]).has(key));
    let targets = drive.map_or_else(|| devices.clone(), |at| vec![at]);
    let is_possible = is_known && !targets.is_empty() && devices.iter().all(knows);
    if !is_possible || devices.iter().chain(&targets).any(chosen) {
        return None;
    }
    for at in targets {
        let mut form = Form::of(&options[at]);
        KEYS.iter().for_each(|key| form.set(key, "stop"));
        options[at] = form.into_option(&options[at].name);
    }
    Some(options)
}

#[cfg(test)]
mod test {
    use super::super::test::options;
    use super::*;
    use qemu_cmdline::words;

    fn stopping(line: &str) -> Option<String> {
        let options = options(line);
        let started = Started {
            options: &options,
            machine_type: "pc-q35-7.2",
            directory: Path::new("/vm"),
            pid: 1,
        };
        stop_at_errors(&started, "d", Path::new("/vm/d")).map(|options| words(&options).join(" "))
    }

    #[test]
    fn disk_gets_the_policy_where_its_device_knows_it() {
        let stop = "rerror=stop,werror=stop";
        for line in ["-drive file=d", "-drive file=d,if=virtio", "-drive if=none,id=a,file=d"] {
            assert_eq!(stopping(line), Some(format!("{line},{stop}")));
        }
        let (drive, device) = ("-drive if=none,id=a,file=d", "-device virtio-blk-pci,drive=a");
        assert_eq!(
            stopping(&format!("{drive} {device}")),
            Some(format!("{drive},{stop} {device}"))
        );
        let node = "-blockdev driver=qcow2,node-name=d,file.driver=file,file.filename=d";
        let device = "-device scsi-hd,drive=d";
        assert_eq!(stopping(&format!("{node} {device}")), Some(format!("{node} {device},{stop}")));
        for line in [
            "-drive file=other",
            "-drive file=d,if=floppy",
            "-drive file=d,rerror=report",
            "-drive if=none,id=a,file=d -device floppy,drive=a",
            "-drive if=none,id=a,file=d -device ide-hd,drive=a,werror=enospc",
            "-blockdev driver=qcow2,node-name=d,file.driver=file,file.filename=d",
        ] {
            assert_eq!(stopping(line), None, "{line}");
        }
    }
}
