//! The user's options in the one shape that is saved with every checkpoint: every drive has a node name, the machine
//! type is the versioned one, nothing depends on files other than those that a checkpoint carries.

use super::arguments::{KeyList, QemuOption};
use super::probe::QemuFacts;
use anyhow::{Context, Result, bail};
use qemu_cmdline::size;

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
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normalized {
    pub options: Vec<QemuOption>,
    /// Versioned, as `pc-q35-10.0`.
    pub machine_type: String,
    pub ram_bytes: u64,
    /// The id that the RAM block gets: the machine's `default-ram-id`.
    pub ram_block: String,
}

pub fn normalize(options: Vec<QemuOption>, facts: &QemuFacts) -> Result<Normalized> {
    let wanted = machine_type(&options);
    let machine = facts.machine(wanted.as_deref())?;
    if machine.name == "none" {
        bail!("machine type none has no guest to checkpoint; name another by -machine");
    }
    let Some(ram_block) = machine.default_ram_id.clone() else {
        bail!("machine type {} has no main RAM of its own; Stillpoint knows pc, q35 and microvm", machine.name);
    };
    let ram_bytes = ram_bytes(&options)?;
    let mut drives = 0;
    let options = options.into_iter().map(|option| name_drive(option, &mut drives)).collect();
    Ok(Normalized { options: pin_machine(options, &machine.name), machine_type: machine.name.clone(), ram_bytes, ram_block })
}

/// Alone in its list, a word without `=` is the type.
fn machine_type(options: &[QemuOption]) -> Option<String> {
    let machines = options.iter().filter(|option| is_machine(option));
    machines.rev().find_map(|option| option.keys().get_or_implied("type").map(str::to_owned))
}

pub fn is_machine(option: &QemuOption) -> bool {
    option.name == "machine" || option.name == "M"
}

/// Takes the type out of every `-machine` and says the versioned one last; the other keys stay where they are.
fn pin_machine(options: Vec<QemuOption>, versioned: &str) -> Vec<QemuOption> {
    let mut pinned = Vec::new();
    for option in options {
        if !is_machine(&option) {
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
            bytes = size::ram_bytes(size).with_context(|| format!("QEMU option -m {}", option.value()))?;
        }
    }
    // QEMU takes `-m 0` for nothing said.
    Ok(if bytes == 0 { DEFAULT_RAM_BYTES } else { bytes })
}

/// A drive's node name is the name of its space in the store, so it must be the same at every start.
fn name_drive(option: QemuOption, drives: &mut usize) -> QemuOption {
    let short = DRIVE_SHORTHANDS.iter().find(|(name, _)| *name == option.name);
    let mut keys = match short {
        Some((_, extra)) => {
            let mut keys = KeyList::parse(extra);
            keys.push(Some("file"), option.value());
            keys
        }
        None if option.name == "drive" => option.keys(),
        None => return option,
    };
    let number = *drives;
    *drives += 1;
    let has_medium = keys.get("file").is_some_and(|file| !file.is_empty());
    if has_medium && keys.get("node-name").is_none() {
        let name = node_name(keys.get("id"), number);
        keys.push(Some("node-name"), name);
    }
    QemuOption::with("drive", keys.to_string())
}

fn node_name(id: Option<&str>, number: usize) -> String {
    let from_id = id.map(|id| format!("sp-{id}")).filter(|name| name.len() <= MAX_NODE_NAME);
    from_id.unwrap_or_else(|| format!("sp-drive{number}"))
}

#[cfg(test)]
mod test {
    use super::super::arguments::{parse, words};
    use super::super::probe::{MachineType, QemuFacts};
    use super::*;

    fn facts() -> QemuFacts {
        let machine = |name: &str, alias: Option<&str>, is_default| MachineType {
            name: name.to_owned(),
            alias: alias.map(str::to_owned),
            is_default,
            default_ram_id: Some("pc.ram".to_owned()),
        };
        QemuFacts {
            version: "10.0.2".to_owned(),
            machines: vec![
                machine("pc-i440fx-10.0", Some("pc"), true),
                machine("pc-q35-10.0", Some("q35"), false),
                machine("pc-q35-9.2", None, false),
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
    fn no_machine_is_the_default_machine() {
        let (line, normalized) = run("-m 64").unwrap();
        assert_eq!(line, "-m 64 -machine type=pc-i440fx-10.0");
        assert_eq!((normalized.ram_bytes, normalized.ram_block.as_str()), (64 << 20, "pc.ram"));
    }

    #[test]
    fn drives_get_steady_node_names() {
        let (line, _) = run("-hda a.img -drive file=b,,c.qcow2,id=data -drive file=c,node-name=mine -cdrom x.iso").unwrap();
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
    fn an_unknown_machine_is_refused_by_name() {
        let error = run("-machine virt").unwrap_err();
        assert!(error.to_string().contains("virt"), "{error}");
    }
}
