//! `-readconfig FILE` turned into the options that it stands for, so that a VM's whole command line
//! can be saved with its checkpoints and used on a host that lacks the file.

use super::arguments::{KeyList, QemuOption};
use crate::files;
use anyhow::{Context, Result, bail};
use std::path::Path;

/// More than any real configuration; a larger file is something else.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Config groups whose option has another name than the group.
const RENAMED: &[(&str, &str)] = &[("memory", "m"), ("smp-opts", "smp"), ("boot-opts", "boot")];

/// Replaces each `-readconfig` by its options, in its place.
///
/// # Errors
/// Refused if a file cannot be read or says what no option can.
pub fn expand(options: Vec<QemuOption>) -> Result<Vec<QemuOption>> {
    expand_in(options, Path::new(""))
}

/// The same for a process whose relative paths belong to `directory`.
pub(crate) fn expand_in(options: Vec<QemuOption>, directory: &Path) -> Result<Vec<QemuOption>> {
    let mut expanded = Vec::new();
    for option in options {
        match option.name.as_str() {
            "readconfig" => expanded.extend(read(&directory.join(option.value()))?),
            "set" => set(&mut expanded, option.value())?,
            _ => expanded.push(option),
        }
    }
    Ok(expanded)
}

/// `-set GROUP.ID.KEY=VALUE` changes an option that stands before it; the saved command line has it
/// in its place.
fn set(options: &mut [QemuOption], text: &str) -> Result<()> {
    let parts = text.split_once('=').and_then(|(place, value)| {
        let (group, rest) = place.split_once('.')?;
        let (id, key) = rest.split_once('.')?;
        Some((group, id, key, value))
    });
    let Some((group, id, key, value)) = parts else {
        bail!("QEMU option -set {text}: expected GROUP.ID.KEY=VALUE")
    };
    let is_it =
        |option: &&mut QemuOption| option.name == group && option.keys().get("id") == Some(id);
    let Some(option) = options.iter_mut().find(is_it) else {
        bail!("QEMU option -set {text}: no -{group} before it has id={id}")
    };
    let mut keys = option.keys();
    keys.push(Some(key), value);
    *option = QemuOption::with(group, keys.to_string());
    Ok(())
}

fn read(path: &Path) -> Result<Vec<QemuOption>> {
    let about = || format!("reading the QEMU configuration {} (-readconfig)", path.display());
    let text =
        String::from_utf8(files::read_limited(path, MAX_CONFIG_BYTES)?).with_context(about)?;
    parse(&text).with_context(about)
}

struct Group {
    name: String,
    list: KeyList,
}

impl Group {
    fn into_option(self) -> QemuOption {
        let renamed = RENAMED.iter().find(|(group, _)| *group == self.name);
        let name = renamed.map_or(self.name.as_str(), |(_, option)| option);
        QemuOption::with(name, self.list.to_string())
    }
}

fn parse(text: &str) -> Result<Vec<QemuOption>> {
    let mut options = Vec::new();
    let mut open: Option<Group> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            options.extend(open.take().map(Group::into_option));
            open = Some(open_group(head));
            continue;
        }
        let entry = line.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
        let quoted =
            entry.and_then(|(key, value)| Some((key, value.strip_prefix('"')?.strip_suffix('"')?)));
        match (quoted, &mut open) {
            (Some((key, value)), Some(group)) => group.list.push(Some(key), value),
            _ => bail!(
                "line {}: expected '[group]' or 'key = \"value\"', found '{line}'",
                number + 1
            ),
        }
    }
    options.extend(open.map(Group::into_option));
    Ok(options)
}

/// `device "net0"` or `machine`.
fn open_group(head: &str) -> Group {
    let (name, id) = match head.split_once('"') {
        Some((name, id)) => (name.trim(), Some(id.trim_end_matches('"'))),
        None => (head.trim(), None),
    };
    let mut list = KeyList::default();
    if let Some(id) = id {
        list.push(Some("id"), id);
    }
    Group { name: name.to_owned(), list }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn groups_become_options_in_order() {
        let text = "# a VM\n[machine]\n  type = \"q35\"\n\n[memory]\n size = \"1024\"\n\
                    [drive \"root\"]\n file = \"a,b.qcow2\"\n if = \"none\"\n";
        let options = parse(text).unwrap();
        assert_eq!(options[0], QemuOption::with("machine", "type=q35"));
        assert_eq!(options[1], QemuOption::with("m", "size=1024"));
        assert_eq!(options[2], QemuOption::with("drive", "id=root,file=a,,b.qcow2,if=none"));
    }

    #[test]
    fn what_is_set_later_stands_in_its_place() {
        let words = [
            "-drive",
            "file=a,id=d",
            "-set",
            "drive.d.snapshot=on",
            "-device",
            "x,id=n",
            "-set",
            "device.n.romfile=/r,1",
        ];
        let options = super::super::arguments::parse(&words.map(str::to_owned)).unwrap();
        let options = expand(options).unwrap();
        assert_eq!(options[0], QemuOption::with("drive", "file=a,id=d,snapshot=on"));
        assert_eq!(options[1], QemuOption::with("device", "x,id=n,romfile=/r,,1"));
        for text in ["drive.e.snapshot=on", "drive", "drive.d"] {
            assert!(expand(vec![QemuOption::with("set", text)]).is_err(), "{text}");
        }
    }

    #[test]
    fn a_wrong_line_is_named() {
        let error = parse("[machine]\ntype q35\n").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(parse("type = \"q35\"").is_err());
    }
}
