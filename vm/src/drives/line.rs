//! Which option of a command line a running disk comes from.

use super::auto_id::{self, Board};
use super::option;
use crate::error::refused;
use crate::launch::arguments::QemuOption;
use crate::launch::form::Form;
use crate::launch::paths;
use anyhow::Error;
use qmp_bridge::disks::Disk;
use std::collections::HashSet;
use std::path::Path;

/// The first character of the node names that QEMU generates; a user may not begin one so.
const GENERATED: char = '#';
/// QEMU refuses longer node names.
const MAX_NODE_NAME: usize = 31;

pub(super) struct Line<'a> {
    pub options: &'a [QemuOption],
    pub directory: &'a Path,
    pub board: Board,
}

impl Line<'_> {
    /// Gives every disk a name that the next QEMU has for it too: its node's, or where QEMU made
    /// that up, the one that the command line gives or will give.
    pub(super) fn name(&self, disks: &mut [Disk]) {
        for number in 0..disks.len() {
            let disk = &disks[number];
            let given =
                [&disk.node, &disk.root].into_iter().find(|name| !is_generated(name)).cloned();
            let on_line = || {
                self.of_drive(disk)
                    .and_then(|number| option::node_names(&self.options[number]).into_iter().next())
            };
            let name = given
                .or_else(on_line)
                .or_else(|| disk.removable.then(|| self.new_name(disk, disks)));
            if let Some(name) = name {
                disks[number].name = name;
            }
        }
    }

    /// For a medium that was put in at run time.
    fn new_name(&self, disk: &Disk, disks: &[Disk]) -> String {
        let device = disk.device.strip_prefix("/machine/").unwrap_or(&disk.device);
        let safe: String = device
            .chars()
            .map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' })
            .collect();
        let stem = format!("sp-{}", &safe[safe.len().saturating_sub(MAX_NODE_NAME - 6)..]);
        let is_free = |name: &String| {
            !self.defines_node(name) && disks.iter().all(|other| other.name != *name)
        };
        let numbered = (2..100).map(|number| format!("{stem}-{number}"));
        std::iter::once(stem.clone()).chain(numbered).find(is_free).unwrap_or(stem)
    }

    pub(super) fn defines_node(&self, node: &str) -> bool {
        self.of_node(&[node]).is_some()
    }

    /// The option that makes a disk: its topmost node, filters included, which may refer to options
    /// before it.
    pub(super) fn of_disk(&self, disk: &Disk) -> Option<usize> {
        self.of_node(&[&disk.root])
            .or_else(|| self.of_node(&[&disk.node]))
            .or_else(|| self.of_drive(disk))
    }

    pub(super) fn of_node(&self, nodes: &[&str]) -> Option<usize> {
        let makes = |option: &QemuOption| {
            option::node_names(option).iter().any(|name| nodes.contains(&name.as_str()))
        };
        self.options.iter().position(|option| option::is_block(option) && makes(option))
    }

    /// By the drive's id, given or made by QEMU, else by the file.
    fn of_drive(&self, disk: &Disk) -> Option<usize> {
        let hit = self.of_id(&disk.device);
        if hit.is_some_and(|number| disk.removable || self.names_file(number, &disk.file)) {
            return hit;
        }
        let ids = auto_id::ids(self.options, self.board);
        let has_no_id = |number: &usize| self.options[*number].keys().get("id").is_none();
        let mut found = ids
            .iter()
            .map(|(number, _)| *number)
            .filter(has_no_id)
            .filter(|number| self.names_file(*number, &disk.file));
        // Two drives on one file cannot be distinguished.
        found.next().filter(|_| hit.is_none() && found.next().is_none())
    }

    pub(super) fn of_id(&self, id: &str) -> Option<usize> {
        auto_id::ids(self.options, self.board)
            .into_iter()
            .find(|(_, known)| known == id)
            .map(|(number, _)| number)
    }

    /// The `-device` with this id or QOM path.
    pub(super) fn of_device(&self, qdev: &str) -> Option<usize> {
        let id = |number: usize| Form::of(&self.options[number]).get("id");
        let devices = || {
            self.options
                .iter()
                .enumerate()
                .filter(|(_, option)| option.name == "device")
                .map(|(number, _)| number)
        };
        let path = qdev
            .strip_prefix("/machine/peripheral-anon/device[")
            .and_then(|rest| rest.split(']').next()?.parse().ok());
        if let Some(place) = path {
            // Devices without an id are counted in their order.
            return devices().filter(|number| id(*number).is_none()).nth(place);
        }
        let name = qdev
            .strip_prefix("/machine/peripheral/")
            .and_then(|rest| rest.split('/').next())
            .unwrap_or(qdev);
        devices().find(|number| id(*number).as_deref() == Some(name))
    }

    /// Whether the device that has this disk has the one of option `number` on the command line
    /// too. A device can be given another node at run time (`qom-set`, a mirror), which may be on
    /// the command line as well. Whether the medium was changed is checked elsewhere.
    pub(super) fn is_plugged(&self, disk: &Disk, number: usize) -> bool {
        let drive = if disk.is_named {
            Some(disk.device.clone())
        } else {
            let device = disk.qdev.as_deref().and_then(|qdev| self.of_device(qdev));
            device.and_then(|device| Form::of(&self.options[device]).get("drive"))
        };
        let said = drive.and_then(|drive| self.of_node(&[&drive]).or_else(|| self.of_id(&drive)));
        disk.removable
            || said.is_none_or(|said| self.reached(&HashSet::from([said])).contains(&number))
    }

    /// Whether this option, or one that it refers to, names the file.
    pub(super) fn names_file(&self, number: usize, file: &Path) -> bool {
        let reached = self.reached(&HashSet::from([number]));
        reached.iter().any(|number| {
            paths::is_named(&[option::on_file(&self.options[*number])], self.directory, file)
        })
    }

    /// These options and all whose nodes they refer to.
    pub(super) fn reached(&self, from: &HashSet<usize>) -> HashSet<usize> {
        let mut reached = from.clone();
        let mut open: Vec<usize> = from.iter().copied().collect();
        while let Some(number) = open.pop() {
            for (key, value) in option::scalars(&self.options[number]) {
                if option::last(&key) == "node-name" {
                    continue;
                }
                let found = self.of_node(&[&value]).filter(|found| reached.insert(*found));
                open.extend(found);
            }
        }
        reached
    }
}

pub(super) fn is_generated(name: &str) -> bool {
    name.starts_with(GENERATED)
}

/// A disk that the command line says nothing of.
pub(super) fn moved(disk: &Disk) -> Error {
    refused(format!(
        "disk {} is on {} now, which the VM's command line does not name (a snapshot or mirror was made at run time?); \
         start the VM again on that file",
        disk.device,
        disk.file.display()
    ))
}
