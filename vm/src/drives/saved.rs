//! The command line that makes the drives as they are.

use super::auto_id;
use super::line::{self, Line};
use super::option::{self, Edit};
use crate::error::refused;
use crate::launch::arguments::{KeyList, QemuOption};
use crate::launch::form::Form;
use anyhow::Result;
use qmp_bridge::disks::{Disk, EmptyDrive};
use serde_json::json;
use std::collections::HashSet;
use std::path::Path;

/// What a `-drive` says of the drive and not of its medium.
const DRIVE_KEYS: &[&str] = &[
    "bus",
    "copy-on-read",
    "group",
    "id",
    "if",
    "index",
    "media",
    "read-only",
    "readonly",
    "rerror",
    "stats-account-failed",
    "stats-account-invalid",
    "stats-intervals",
    "unit",
    "werror",
];
/// Limits of the drive, by the beginning of their names.
const LIMITS: &[&str] = &["bps", "iops", "throttling."];
/// How a medium is used, whichever it is.
const MEDIUM_KEYS: &[&str] = &[
    "aio",
    "cache",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
    "detect-zeroes",
    "discard",
];

/// Also what has changed since the start, if anything.
pub(super) fn command_line(
    line: &Line<'_>,
    disks: &[Disk],
    empty: &[EmptyDrive],
) -> Result<(Vec<QemuOption>, Option<String>)> {
    let options = line.options.iter().cloned().map(Some).collect();
    let mut saved = Saved { line, options, made_by: HashSet::new(), changed: None };
    disks.iter().try_for_each(|disk| saved.disk(disk))?;
    empty.iter().try_for_each(|drive| saved.empty(drive))?;
    saved.drop_unused_nodes(disks);
    saved.check(disks)?;
    Ok((saved.options.into_iter().flatten().collect(), saved.changed))
}

struct Saved<'a> {
    line: &'a Line<'a>,
    options: Vec<Option<QemuOption>>,
    /// Options that make the disks that are there.
    made_by: HashSet<usize>,
    changed: Option<String>,
}

impl Saved<'_> {
    fn disk(&mut self, disk: &Disk) -> Result<()> {
        match self.line.of_disk(disk) {
            Some(number) if self.makes(number, disk) && self.line.is_plugged(disk, number) => {
                self.keep(number, disk);
                self.plug(disk, &disk.root)
            }
            Some(number) if disk.removable && self.line.options[number].name == "drive" => {
                self.options[number] = Some(with_medium(&self.line.options[number], disk));
                self.made_by.insert(number);
                self.change(&disk.device);
                Ok(())
            }
            None if disk.removable => self.new_medium(disk),
            _ => Err(line::moved(disk)),
        }
    }

    fn change(&mut self, device: &str) {
        self.changed.get_or_insert_with(|| format!("the medium of drive {device} was changed"));
    }

    /// Whether the option as it is makes this disk.
    fn makes(&self, number: usize, disk: &Disk) -> bool {
        let said = ["format", "driver"]
            .into_iter()
            .find_map(|key| option::get(&self.line.options[number], key));
        let is_format = |driver: &str| matches!(driver, "raw" | "qcow2");
        let other_format =
            said.is_some_and(|driver| is_format(&driver) && driver != disk.format.as_str());
        let option = &self.line.options[number];
        let other_access =
            option.name == "drive" && option::is_read_only(option) && !disk.read_only;
        !(disk.removable && (other_format || other_access))
            && self.line.names_file(number, &disk.file)
    }

    /// A restored image names its chain itself, as it is now; and it is a file, wherever the old
    /// one was.
    fn keep(&mut self, number: usize, disk: &Disk) {
        let has_chain = !disk.backing.is_empty();
        let is_below = |key: &str| key.split('.').any(|part| part == "backing");
        for number in self.line.reached(&HashSet::from([number])) {
            let Some(option) = &self.options[number] else { continue };
            let option = if has_chain {
                option::rewrite(option, &mut |key, _| {
                    if is_below(key) { Edit::Drop } else { Edit::Keep }
                })
            } else {
                option.clone()
            };
            self.options[number] = Some(option::on_file(&option));
        }
        // Whatever made it so: the rights of the old file, say.
        if let Some(option) =
            self.options[number].take_if(|option| disk.read_only && !option::is_read_only(option))
        {
            let mut form = Form::of(&option);
            form.set_on("read-only");
            self.options[number] = Some(form.into_option(&option.name));
        }
        self.made_by.insert(number);
    }

    /// A medium that no option names, in a drive that QEMU made by itself or that belongs to a
    /// device alone.
    fn new_medium(&mut self, disk: &Disk) -> Result<()> {
        self.change(&disk.device);
        if let Some(drive) = auto_id::default_drive(&disk.device, self.line.board) {
            self.options.push(Some(with_medium(&drive, disk)));
            return Ok(());
        }
        let node = json!({
            "driver": disk.format.as_str(), "node-name": disk.name, "read-only": disk.read_only,
            "file": { "driver": "file", "filename": disk.file.to_string_lossy() },
        });
        self.options.push(Some(QemuOption::with("blockdev", node.to_string())));
        self.plug(disk, &disk.name)
    }

    /// A device that has its drive alone names the node that is in it.
    fn plug(&mut self, disk: &Disk, node: &str) -> Result<()> {
        let Some(qdev) = disk.qdev.as_deref().filter(|_| disk.removable && !disk.is_named) else {
            return Ok(());
        };
        let number = self.line.of_device(qdev).ok_or_else(|| line::moved(disk))?;
        if let Some(option) = &self.options[number] {
            let mut form = Form::of(option);
            if form.get("drive").as_deref() != Some(node) {
                form.set("drive", node);
                self.options[number] = Some(form.into_option("device"));
                self.change(&disk.device);
            }
        }
        Ok(())
    }

    /// A drive that is empty begins empty.
    fn empty(&mut self, drive: &EmptyDrive) -> Result<()> {
        if drive.is_named {
            if let Some(number) = self.line.of_id(&drive.device)
                && has_medium(&self.line.options[number])
            {
                self.options[number] = Some(only(&self.line.options[number], DRIVE_KEYS));
                self.change(&drive.device);
            }
            return Ok(());
        }
        let number = drive.qdev.as_deref().and_then(|qdev| self.line.of_device(qdev));
        if let Some(option) = number.and_then(|number| self.options[number].as_mut()) {
            let mut form = Form::of(option);
            if form.has("drive") {
                form.remove("drive");
                *option = form.into_option("device");
                self.change(&drive.device);
            }
        }
        Ok(())
    }

    /// Nodes of chains that the images name themselves, and nodes that are gone.
    fn drop_unused_nodes(&mut self, disks: &[Disk]) {
        // As the options are now: what they do not refer to any more is not needed.
        let now: Vec<QemuOption> = self.options.iter().flatten().cloned().collect();
        let places: Vec<usize> =
            (0..self.options.len()).filter(|number| self.options[*number].is_some()).collect();
        let line = Line { options: &now, ..*self.line };
        let made: HashSet<usize> = disks
            .iter()
            .filter_map(|disk| line.of_disk(disk).or_else(|| line.of_node(&[&disk.name])))
            .collect();
        let reached = line.reached(&made);
        for (number, place) in places.into_iter().enumerate() {
            if now[number].name == "blockdev" && !reached.contains(&number) {
                self.options[place] = None;
            }
        }
    }

    /// Nothing that is left may open a file that no checkpoint carries.
    fn check(&self, disks: &[Disk]) -> Result<()> {
        let nodes: HashSet<String> = self
            .options
            .iter()
            .flatten()
            .filter(|option| option::is_block(option))
            .flat_map(option::node_names)
            .collect();
        for (number, option) in self.options.iter().enumerate() {
            let Some(option) = option else { continue };
            let is_gone = option.name == "drive"
                && has_medium(option)
                && !self.made_by.contains(&number)
                && number < self.line.options.len();
            if is_gone {
                return Err(refused(format!(
                    "-drive {} made a drive that is not in the VM any more; start the VM again without it",
                    option.value()
                )));
            }
            let drive = Form::of(option).get("drive").filter(|_| option.name == "device");
            let was_node = |node: &String| self.line.defines_node(node) && !nodes.contains(node);
            if let Some(node) = drive.filter(was_node) {
                return Err(refused(format!(
                    "-device {} has node {node}, which is not in the VM any more",
                    option.value()
                )));
            }
        }
        match disks.iter().find(|disk| line::is_generated(&disk.name)) {
            Some(disk) => Err(line::moved(disk)),
            None => Ok(()),
        }
    }
}

fn has_medium(option: &QemuOption) -> bool {
    option::scalars(option)
        .iter()
        .any(|(key, value)| (key == "file" || key.starts_with("file.")) && !value.is_empty())
}

/// A `-drive` with another medium in it.
fn with_medium(option: &QemuOption, disk: &Disk) -> QemuOption {
    let mut keys = only(option, &[DRIVE_KEYS, MEDIUM_KEYS].concat())
        .keys()
        .without("read-only", false)
        .without("readonly", false);
    keys.push(Some("file"), disk.file.to_string_lossy());
    keys.push(Some("format"), disk.format.as_str());
    keys.push(Some("node-name"), disk.name.as_str());
    if disk.read_only && keys.get("media") != Some("cdrom") {
        keys.push(Some("read-only"), "on");
    }
    QemuOption::with("drive", keys.to_string())
}

fn only(option: &QemuOption, names: &[&str]) -> QemuOption {
    let is_kept =
        |key: &&str| names.contains(key) || LIMITS.iter().any(|limit| key.starts_with(limit));
    let mut kept = KeyList::default();
    for (key, value) in option.keys().iter() {
        if let Some(key) = key.filter(|key| is_kept(key)) {
            kept.push(Some(key), value);
        }
    }
    QemuOption::with("drive", kept.to_string())
}

/// A restored image says itself what is below it, also that nothing is, and a disk whose blocks
/// arrive stands on something at first: so no option says that nothing is below.
pub fn on_what_images_name(options: Vec<QemuOption>) -> Vec<QemuOption> {
    let by_header = |option: QemuOption| {
        if !option::is_block(&option) {
            return option;
        }
        option::rewrite(&option, &mut |key, value| match (option::last(key), value) {
            ("backing", None | Some("")) if option::is_nothing(&option, key) => Edit::Drop,
            _ => Edit::Keep,
        })
    };
    options.into_iter().map(by_header).collect()
}

/// The other way round, for a disk that a restore puts on a block device: nodes of driver `file` on
/// that path become `host_device`.
pub fn as_device(options: Vec<QemuOption>, path: &Path) -> Vec<QemuOption> {
    let text = path.to_string_lossy();
    let on_device = |option: QemuOption| {
        let scalars = option::scalars(&option);
        let group = |key: &str| {
            key.rsplit_once('.').map_or(String::new(), |(group, _)| format!("{group}."))
        };
        let here: HashSet<String> = scalars
            .iter()
            .filter(|(key, value)| option::last(key) == "filename" && *value == text)
            .map(|(key, _)| group(key))
            .collect();
        option::rewrite(&option, &mut |key, value| match (option::last(key), value) {
            ("driver", Some("file")) if here.contains(&group(key)) => {
                Edit::Set("host_device".to_owned())
            }
            _ => Edit::Keep,
        })
    };
    options
        .into_iter()
        .map(|option| if option::is_block(&option) { on_device(option) } else { option })
        .collect()
}
