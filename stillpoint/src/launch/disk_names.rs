//! Which drive of the command line a running disk is, and so what it is called in the store.
//!
//! A QEMU that was not started by us names its nodes itself (`#block123`), and otherwise at every start. The command line
//! that a checkpoint saves gives each drive a node name; that name is the disk's.

use super::arguments::QemuOption;
use super::paths;
use qmp_bridge::disks::Disk;
use std::path::Path;

/// Node names that QEMU made up; nobody else may begin one so.
const GENERATED: char = '#';

/// Gives every disk whose node QEMU named the name that `options`, normalized, have for it. A disk that they do not
/// name keeps its node's; [`is_unnamed`] tells.
pub fn name_disks(options: &[QemuOption], directory: &Path, disks: &mut [Disk]) {
    for disk in disks.iter_mut().filter(|disk| is_generated(&disk.node)) {
        if let Some(name) = find(options, directory, disk) {
            disk.name = name;
        }
    }
}

/// Whether the command line says nothing of this disk.
pub fn is_unnamed(disk: &Disk) -> bool {
    is_generated(&disk.name)
}

fn is_generated(name: &str) -> bool {
    name.starts_with(GENERATED)
}

/// By its id where it has one, else by its file; in both cases the drive must name the file.
fn find(options: &[QemuOption], directory: &Path, disk: &Disk) -> Option<String> {
    let drives = || options.iter().filter(|option| option.name == "drive");
    let names_file = |option: &&QemuOption| paths::is_named(std::slice::from_ref(*option), directory, &disk.file);
    let same_id = drives().find(|option| option.keys().get("id") == Some(disk.device.as_str()));
    let hit = match same_id {
        Some(option) => Some(option).filter(names_file),
        None => {
            let mut found = drives().filter(|option| option.keys().get("id").is_none()).filter(names_file);
            // Of two drives on one file nobody can say which is which.
            found.next().filter(|_| found.next().is_none())
        }
    };
    hit?.keys().get("node-name").map(str::to_owned)
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;
    use qmp_bridge::disks::ImageFormat;

    fn named(line: &str, node: &str, device: &str, file: &str) -> String {
        let options = parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap();
        let mut disks = [Disk {
            node: node.to_owned(),
            name: node.to_owned(),
            device: device.to_owned(),
            read_only: false,
            format: ImageFormat::Raw,
            file: file.into(),
            virtual_size: 4096,
            backing: Vec::new(),
            removable: false,
        }];
        name_disks(&options, Path::new("/vm"), &mut disks);
        disks[0].name.clone()
    }

    const LINE: &str = "-drive file=a.img,id=data,node-name=sp-data -drive index=0,file=b.img,node-name=sp-drive1 \
                        -drive file=c.img,node-name=sp-drive2 -drive file=c.img,node-name=sp-drive3";

    #[test]
    fn a_disk_is_found_by_its_id_or_its_file() {
        assert_eq!(named(LINE, "#block101", "data", "/vm/a.img"), "sp-data");
        assert_eq!(named(LINE, "#block101", "ide0-hd0", "/vm/b.img"), "sp-drive1");
    }

    #[test]
    fn a_name_that_somebody_gave_stays() {
        assert_eq!(named(LINE, "mine", "data", "/vm/a.img"), "mine");
    }

    #[test]
    fn what_the_command_line_does_not_say_has_no_name() {
        for (device, file) in [("data", "/vm/other.img"), ("ide1-cd0", "/vm/x.iso"), ("ide0-hd1", "/vm/c.img"), ("more", "/vm/a.img")] {
            assert_eq!(named(LINE, "#block7", device, file), "#block7", "{device} {file}");
        }
    }
}
