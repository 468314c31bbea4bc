//! Files that a command line names: which of them a checkpoint must carry, and how a restored machine gets its own.

use super::arguments::QemuOption;
use serde_json::Value;
use std::collections::HashMap;

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

fn repath_one(option: QemuOption, new: &HashMap<String, String>) -> QemuOption {
    let Some(value) = &option.value else { return option };
    if let Some(path) = new.get(value) {
        return QemuOption::with(&option.name, path);
    }
    if value.starts_with('{') {
        let Ok(mut tree) = serde_json::from_str::<Value>(value) else { return option };
        repath_json(&mut tree, new);
        return QemuOption::with(&option.name, tree.to_string());
    }
    let mut keys = option.keys();
    // `file:PATH` is the old form of a character device's path.
    let changed = keys.map_values(|old| {
        let (scheme, path) = old.strip_prefix("file:").map_or(("", old), |path| ("file:", path));
        new.get(path).map(|path| format!("{scheme}{path}"))
    });
    if changed { QemuOption::with(&option.name, keys.to_string()) } else { option }
}

fn repath_json(tree: &mut Value, new: &HashMap<String, String>) {
    match tree {
        Value::String(text) => {
            if let Some(path) = new.get(text) {
                *text = path.clone();
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|item| repath_json(item, new)),
        Value::Object(map) => map.values_mut().for_each(|item| repath_json(item, new)),
        _ => {}
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
}
