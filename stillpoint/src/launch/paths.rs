//! Files that a command line names: which of them a checkpoint must carry, and how a restored machine gets its own.

use super::arguments::{KeyList, QemuOption};
use serde_json::Value;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Options whose whole value is a file that QEMU reads at its start, and reads again when the guest reboots.
const WHOLE: &[&str] = &["kernel", "initrd", "bios", "dtb"];
/// Options with such a file under a key.
const KEYED: &[(&str, &[&str])] = &[
    ("machine", &["kernel", "initrd", "dtb", "firmware"]),
    ("option-rom", &["romfile"]),
    ("fw_cfg", &["file"]),
    ("acpitable", &["file", "data"]),
    ("smbios", &["file"]),
    ("device", &["romfile"]),
];

/// The boot files named on the command line, as they are written there, each once. Disks are not among them: QEMU itself
/// says which it has.
pub fn boot_files(options: &[QemuOption]) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for option in options {
        let whole = WHOLE.contains(&option.name.as_str()).then(|| option.value().to_owned());
        let keys = KEYED.iter().filter(|(name, _)| *name == option.name).flat_map(|(_, keys)| *keys);
        let keyed = keys.filter_map(|key| option.keys().get(key).map(str::to_owned));
        files.extend(whole.into_iter().chain(keyed).filter(|file| !file.is_empty()));
    }
    files.sort();
    files.dedup();
    files
}

/// Replaces each value that is exactly an old path (or any other whole value in `new`).
pub fn repath(options: Vec<QemuOption>, new: &HashMap<String, String>) -> Vec<QemuOption> {
    options.into_iter().map(|option| repath_one(option, new)).collect()
}

/// Whether some value is this file; relative ones belong to `directory`. A machine whose disk came by another way (a
/// snapshot or a mirror made at run time) would be restored with the disk that the command line names.
pub fn is_named(options: &[QemuOption], directory: &Path, file: &Path) -> bool {
    let real = identity(file);
    let is_it = |text: &str| {
        let path = directory.join(text);
        path == file || real.is_some() && identity(&path) == real
    };
    options.iter().any(|option| {
        let mut found = false;
        map_paths(option.value(), &mut |path| {
            found |= is_it(path);
            None
        });
        found
    })
}

/// Device and inode: a file may have many paths.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|facts| (facts.dev(), facts.ino()))
}

fn repath_one(option: QemuOption, new: &HashMap<String, String>) -> QemuOption {
    match map_paths(option.value(), &mut |path| new.get(path).cloned()) {
        Some(value) => QemuOption::with(&option.name, value),
        None => option,
    }
}

/// Shows every value that may be a path to `change`; the new text if anything changed.
fn map_paths(value: &str, change: &mut dyn FnMut(&str) -> Option<String>) -> Option<String> {
    if let Some(path) = change(value) {
        return Some(path);
    }
    if value.starts_with('{') {
        return map_json(value, change);
    }
    let mut keys = KeyList::parse(value);
    // `file:PATH` is the old form of a character device's path, `json:{…}` that of a block device.
    let changed = keys.map_values(|old| {
        if let Some(tree) = old.strip_prefix("json:") {
            return map_json(tree, change).map(|tree| format!("json:{tree}"));
        }
        let (scheme, path) = old.strip_prefix("file:").map_or(("", old), |path| ("file:", path));
        change(path).map(|path| format!("{scheme}{path}"))
    });
    changed.then(|| keys.to_string())
}

fn map_json(text: &str, change: &mut dyn FnMut(&str) -> Option<String>) -> Option<String> {
    let mut tree: Value = serde_json::from_str(text).ok()?;
    map_tree(&mut tree, change).then(|| tree.to_string())
}

fn map_tree(tree: &mut Value, change: &mut dyn FnMut(&str) -> Option<String>) -> bool {
    match tree {
        Value::String(text) => match change(text) {
            Some(path) => {
                *text = path;
                true
            }
            None => false,
        },
        Value::Array(list) => list.iter_mut().fold(false, |changed, item| map_tree(item, change) | changed),
        Value::Object(map) => map.values_mut().fold(false, |changed, item| map_tree(item, change) | changed),
        _ => false,
    }
}

#[cfg(test)]
mod test {
    use super::super::arguments::{parse, words};
    use super::*;

    fn options(line: &str) -> Vec<QemuOption> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn boot_files_are_found_once() {
        let line =
            "-kernel vmlinuz -initrd i.gz -fw_cfg name=opt/x,file=a.bin -option-rom vmlinuz -drive file=d.img -device e1000,romfile=";
        assert_eq!(boot_files(&options(line)), ["a.bin", "i.gz", "vmlinuz"]);
    }

    #[test]
    fn whole_values_are_replaced_wherever_they_stand() {
        let new = HashMap::from([("d.img".to_owned(), "/r/d,1.img".to_owned()), ("log".to_owned(), "/r/log".to_owned())]);
        let line = r#"-drive file=d.img,node-name=d.img2 -serial file:log -blockdev {"driver":"file","filename":"d.img"} -kernel d.img"#;
        let line = words(&repath(options(line), &new)).join(" ");
        assert_eq!(
            line,
            r#"-drive file=/r/d,,1.img,node-name=d.img2 -serial file:/r/log -blockdev {"driver":"file","filename":"/r/d,1.img"} -kernel /r/d,1.img"#
        );
    }

    #[test]
    fn a_disk_is_named_wherever_its_path_stands() {
        let line = r#"-drive file=sub/a.img,if=none -drive file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"/abs/b.img"}} -hda c.img"#;
        let options = options(line);
        let named = |file: &str| is_named(&options, Path::new("/vm"), Path::new(file));
        assert!(named("/vm/sub/a.img") && named("/abs/b.img") && named("/vm/c.img"));
        assert!(!named("/vm/a.img") && !named("/vm/snap.qcow2"));
    }

    #[test]
    fn a_json_drive_gets_its_new_path() {
        let new = HashMap::from([("/abs/b.img".to_owned(), "/r/b.img".to_owned())]);
        let line = r#"-drive file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"/abs/b.img"}},if=none"#;
        let line = words(&repath(options(line), &new)).join(" ");
        assert!(line.contains(r#""filename":"/r/b.img""#) && line.ends_with(",if=none"), "{line}");
    }
}
