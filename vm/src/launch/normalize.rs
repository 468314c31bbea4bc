//! The user's options in the one shape that is saved with every checkpoint: every drive has a node
//! name, the VM type is the versioned one, nothing depends on files other than those that a
//! checkpoint carries.

use super::arguments::{KeyList, QemuOption};
use super::form::Form;
use super::qemu_binary::QemuFacts;
use crate::error::{VmError, refused};
use anyhow::{Context, Result};
use qemu_cmdline::size;
use qmp_bridge::quirks::{self, Release};
use std::collections::{HashMap, HashSet};

/// QEMU's own default.
const DEFAULT_RAM_BYTES: u64 = 128 << 20;
/// QEMU refuses longer node names.
const MAX_NODE_NAME: usize = 31;

/// Shorthands for drives: option, interface, index, media.
const DRIVE_SHORTHANDS: &[(&str, &str)] = &[
    ("hda", "index=0,media=disk"),
    ("hdb", "index=1,media=disk"),
    ("hdc", "index=2,media=disk"),
    ("hdd", "index=3,media=disk"),
    ("cdrom", "index=2,media=cdrom"),
    ("fda", "if=floppy,index=0"),
    ("fdb", "if=floppy,index=1"),
    ("pflash", "if=pflash"),
    ("mtdblock", "if=mtd"),
    ("sd", "if=sd"),
];

/// A command line that does not depend on the QEMU that reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normalized {
    /// Without `-readconfig`, every drive named, the machine type versioned, the memory ours.
    pub options: Vec<QemuOption>,
    /// Versioned, as `pc-q35-10.0`.
    pub machine_type: String,
    /// Main memory, in bytes.
    pub ram_bytes: u64,
    /// The id that the RAM block gets: the VM's `default-ram-id`.
    pub ram_block: String,
}

/// Makes it from the options of a user.
///
/// # Errors
/// Refused where they ask for memory that cannot be ours; of class usage where QEMU would not read
/// them.
pub fn normalize(options: Vec<QemuOption>, facts: &QemuFacts) -> Result<Normalized, VmError> {
    let wanted = machine_type(&options);
    let kind = facts.machine_type(wanted.as_deref())?;
    if kind.name == "none" {
        return Err(refused(
            "machine type none has no guest to checkpoint; name another by -machine",
        )
        .into());
    }
    let Some(ram_block) = kind.default_ram_id.clone() else {
        return Err(refused(format!(
            "machine type {} has no main RAM of its own; Stillpoint knows pc, q35 and microvm",
            kind.name
        ))
        .into());
    };
    let release = Release::of_machine_type(&kind.name);
    if release.is_some_and(|release| release.has(quirks::MACHINE_TYPE_HAS_SHORT_STREAM)) {
        return Err(refused(format!(
            "machine type {} writes its state in a form of QEMU 2.3 and before, which Stillpoint does not read; use a machine type of 2.4 or later",
            kind.name
        ))
        .into());
    }
    let ram_bytes = ram_bytes(&options)?;
    let options = name_drives(options);
    Ok(Normalized {
        options: pin_machine_type(options, &kind.name),
        machine_type: kind.name.clone(),
        ram_bytes,
        ram_block,
    })
}

/// Alone in its list, a word without `=` is the type.
fn machine_type(options: &[QemuOption]) -> Option<String> {
    let machine_options = options.iter().filter(|option| is_machine_option(option));
    machine_options.rev().find_map(|option| option.keys().get_or_implied("type").map(str::to_owned))
}

pub(crate) fn is_machine_option(option: &QemuOption) -> bool {
    option.name == "machine" || option.name == "M"
}

/// Takes the type out of every `-machine` and says the versioned one last; the other keys stay
/// where they are.
fn pin_machine_type(options: Vec<QemuOption>, versioned: &str) -> Vec<QemuOption> {
    let mut pinned = Vec::new();
    for option in options {
        if !is_machine_option(&option) {
            pinned.push(option);
            continue;
        }
        let mut rest = KeyList::default();
        for (key, value) in option.keys().iter() {
            if key.is_some_and(|key| key != "type") {
                rest.push(key, value);
            }
        }
        if rest.iter().next().is_some() {
            pinned.push(QemuOption::with("machine", rest.to_string()));
        }
    }
    pinned.push(QemuOption::with("machine", format!("type={versioned}")));
    pinned
}

fn ram_bytes(options: &[QemuOption]) -> Result<u64> {
    let mut bytes = DEFAULT_RAM_BYTES;
    for option in options.iter().filter(|option| option.name == "m") {
        if let Some(size) = option.keys().get_or_implied("size") {
            bytes = size::ram_bytes(size)
                .with_context(|| format!("QEMU option -m {}", option.value()))?;
        }
    }
    // QEMU takes `-m 0` for nothing said.
    Ok(if bytes == 0 { DEFAULT_RAM_BYTES } else { bytes })
}

/// A drive's node name is the name of its space in the store, so it must be the same at every
/// start.
fn name_drives(options: Vec<QemuOption>) -> Vec<QemuOption> {
    let drives: Vec<(usize, KeyList)> =
        options.iter().enumerate().filter_map(|(at, option)| Some((at, drive(option)?))).collect();
    // Names that the user gave come first, then those of ids: neither must depend on how many
    // drives there are.
    let mut taken: HashSet<String> = options.iter().flat_map(node_names).collect();
    let unnamed = |keys: &KeyList| has_medium(keys) && keys.get("node-name").is_none();
    let mut names: HashMap<usize, String> = HashMap::new();
    for (at, keys) in drives.iter().filter(|(_, keys)| unnamed(keys)) {
        let of_id =
            keys.get("id").map(|id| format!("sp-{id}")).filter(|name| name.len() <= MAX_NODE_NAME);
        if let Some(name) = of_id.filter(|name| taken.insert(name.clone())) {
            names.insert(*at, name);
        }
    }
    let mut named = options;
    for (number, (at, mut keys)) in drives.into_iter().enumerate() {
        if unnamed(&keys) {
            let name = names.remove(&at).unwrap_or_else(|| numbered(number, &mut taken));
            keys.push(Some("node-name"), name);
        }
        named[at] = QemuOption::with("drive", keys.to_string());
    }
    named
}

/// The option as a `-drive`, if it is one.
fn drive(option: &QemuOption) -> Option<KeyList> {
    if option.name == "drive" {
        return Some(option.keys());
    }
    let (_, extra) = DRIVE_SHORTHANDS.iter().find(|(name, _)| *name == option.name)?;
    let mut keys = KeyList::parse(extra);
    keys.push(Some("file"), option.value());
    Some(keys)
}

/// A file as `file=`, or in dotted keys (`file.filename=`).
fn has_medium(keys: &KeyList) -> bool {
    let is_file = |(key, value): (Option<&str>, &str)| match key {
        Some("file" | "filename") => !value.is_empty(),
        Some(key) => key.starts_with("file."),
        None => false,
    };
    keys.iter().any(is_file)
}

fn node_names(option: &QemuOption) -> Vec<String> {
    if !["drive", "blockdev"].contains(&option.name.as_str()) {
        return Vec::new();
    }
    let scalars = Form::of(option).deep_scalars();
    scalars
        .into_iter()
        .filter(|(key, _)| key.rsplit('.').next() == Some("node-name"))
        .map(|(_, value)| value)
        .collect()
}

fn numbered(number: usize, taken: &mut HashSet<String>) -> String {
    let first = format!("sp-drive{number}");
    let more = (2..).map(|count| format!("sp-drive{number}-{count}"));
    let name = std::iter::once(first.clone())
        .chain(more)
        .find(|name| !taken.contains(name))
        .unwrap_or(first);
    taken.insert(name.clone());
    name
}

#[cfg(test)]
mod test {
    use super::super::arguments::{parse, words};
    use super::super::qemu_binary::QemuFacts;
    use super::*;
    use qmp_bridge::qmp::replies::MachineType;

    fn facts() -> QemuFacts {
        let vm = |name: &str, alias: Option<&str>, is_default| MachineType {
            name: name.to_owned(),
            alias: alias.map(str::to_owned),
            is_default,
            default_ram_id: Some("pc.ram".to_owned()),
        };
        QemuFacts {
            version: "10.0.2".to_owned(),
            machine_types: vec![
                vm("pc-i440fx-10.0", Some("pc"), true),
                vm("pc-q35-10.0", Some("q35"), false),
                vm("pc-q35-9.2", None, false),
                vm("pc-i440fx-2.3", None, false),
                vm("pc-i440fx-2.4", None, false),
            ],
        }
    }

    fn run(line: &str) -> Result<(String, Normalized)> {
        let list: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let normalized = normalize(parse(&list)?, &facts())?;
        Ok((words(&normalized.options).join(" "), normalized))
    }

    #[test]
    fn an_alias_becomes_the_versioned_type_and_other_keys_stay() {
        let (line, normalized) = run("-M q35,usb=off -m 1G").unwrap();
        assert_eq!(line, "-machine usb=off -m 1G -machine type=pc-q35-10.0");
        assert_eq!(normalized.ram_bytes, 1 << 30);
    }

    #[test]
    fn no_vm_is_the_default_vm() {
        let (line, normalized) = run("-m 64").unwrap();
        assert_eq!(line, "-m 64 -machine type=pc-i440fx-10.0");
        assert_eq!((normalized.ram_bytes, normalized.ram_block.as_str()), (64 << 20, "pc.ram"));
    }

    #[test]
    fn drives_get_stable_node_names() {
        let (line, _) = run(
            "-hda a.img -drive file=b,,c.qcow2,id=data -drive file=c,node-name=mine -cdrom x.iso",
        )
        .unwrap();
        assert!(
            line.starts_with(
                "-drive index=0,media=disk,file=a.img,node-name=sp-drive0 \
             -drive file=b,,c.qcow2,id=data,node-name=sp-data -drive file=c,node-name=mine \
             -drive index=2,media=cdrom,file=x.iso,node-name=sp-drive3"
            ),
            "{line}"
        );
    }

    #[test]
    fn an_unknown_vm_is_refused_by_name() {
        let error = run("-machine virt").unwrap_err();
        assert!(error.to_string().contains("virt"), "{error}");
    }

    #[test]
    fn machine_types_with_the_old_stream_are_refused() {
        let error = run("-machine pc-i440fx-2.3").unwrap_err();
        assert!(
            error.to_string().contains("pc-i440fx-2.3") && error.to_string().contains(';'),
            "{error}"
        );
        run("-machine pc-i440fx-2.4").unwrap();
    }

    #[test]
    fn node_names_do_not_collide() {
        for (line, names) in [
            ("-drive file=b,id=drive1 -drive file=a,index=1", &["sp-drive1", "sp-drive1-2"][..]),
            ("-drive file=a,index=1 -drive file=b,id=drive0", &["sp-drive0-2", "sp-drive0"]),
            ("-drive file=a,id=x -drive file=b,node-name=sp-x", &["sp-drive0", "sp-x"]),
            (
                "-drive file=a -blockdev driver=raw,node-name=n,file.node-name=sp-drive0",
                &["sp-drive0-2"],
            ),
            ("-drive file=a -drive file=b", &["sp-drive0", "sp-drive1"]),
        ] {
            let (_, normalized) = run(line).unwrap();
            let drives = normalized.options.iter().filter(|option| option.name == "drive");
            let found: Vec<String> = drives
                .filter_map(|option| option.keys().get("node-name").map(str::to_owned))
                .collect();
            assert_eq!(found, names, "{line}");
        }
    }

    #[test]
    fn a_drive_in_dotted_keys_has_a_name_too() {
        let (line, _) = run("-drive driver=qcow2,file.driver=file,file.filename=d.qcow2,if=none,id=d -drive if=none,id=e").unwrap();
        assert!(line.contains("if=none,id=d,node-name=sp-d -drive if=none,id=e "), "{line}");
    }
}
