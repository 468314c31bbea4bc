//! `-readconfig FILE` turned into the options that it stands for, so that a VM's whole command line
//! can be saved with its checkpoints and used on a host that lacks the file.

use super::arguments::QemuOption;
use crate::error::VmError;
use crate::files;
use anyhow::{Context, Result, bail};
use qemu_cmdline::config;
use std::path::Path;

/// More than any real configuration; a larger file is something else.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Replaces each `-readconfig` by its options, in its place.
///
/// # Errors
/// Refused if a file cannot be read or says what no option can.
pub fn expand(options: Vec<QemuOption>) -> Result<Vec<QemuOption>, VmError> {
    Ok(expand_in(options, Path::new(""))?)
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
    config::parse(&text).with_context(about)
}

#[cfg(test)]
mod test {
    use super::*;

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
}
