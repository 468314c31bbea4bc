//! Files that a command line names: which of them a checkpoint must carry, and how a restored VM
//! gets its own.
//!
//! Which values are files says the table of `qemu-cmdline`, never how a value is spelled.

use qemu_cmdline::arguments::ArgumentError;
use qemu_cmdline::{QemuOption, Site, Use, visit};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The boot files named on the command line, as they are written there, each once. Disks are not
/// among them: QEMU itself says which it has.
pub fn boot_files(options: &[QemuOption]) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    visit(options, |site| {
        if matches!(site.means, Use::Boot | Use::Firmware) {
            files.push(site.value.to_owned());
        }
    });
    files.sort();
    files.dedup();
    files
}

/// Kernel, initrd and the like: as the command line names them, and where QEMU finds them: in its
/// working directory, then in those of `-L`. A name without a file is one of QEMU's own
/// (`-bios bios-256k.bin`); every host has those.
///
/// # Errors
/// If the arguments are no QEMU command line.
pub fn boot_files_of(
    words: &[String],
    directory: &Path,
) -> Result<Vec<(String, PathBuf)>, ArgumentError> {
    let options = qemu_cmdline::arguments::parse(words)?;
    let theirs = options
        .iter()
        .filter(|option| option.name == "L")
        .map(|option| directory.join(option.value()));
    let places: Vec<PathBuf> = std::iter::once(directory.to_owned()).chain(theirs).collect();
    let find = |name: String| {
        let path = places.iter().map(|place| place.join(&name)).find(|path| path.is_file())?;
        Some((name, path))
    };
    Ok(boot_files(&options).into_iter().filter_map(find).collect())
}

/// A bare name on the command line that is none of these files: one of QEMU's own, or it is gone.
pub fn missing_boot_file(options: &[QemuOption], found: &[(String, PathBuf)]) -> Option<String> {
    let is_missing =
        |name: &String| !name.contains('/') && !found.iter().any(|(named, _)| named == name);
    boot_files(options).into_iter().find(is_missing)
}

/// Where the files of a checkpoint are on the restoring host.
#[derive(Debug, Default)]
pub struct NewPaths {
    /// The old VM's working directory, to which relative paths of its command line belong.
    directory: PathBuf,
    disks: HashMap<PathBuf, String>,
    /// New paths that others may share: nothing may write there.
    layers: HashSet<String>,
    boot_files: HashMap<PathBuf, String>,
}

impl NewPaths {
    /// No file yet; `directory` is the working directory of the old command line.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), ..Self::default() }
    }

    /// The file of a disk.
    pub fn add_disk(&mut self, old: &str, new: &Path) {
        self.disks.insert(self.directory.join(old), new.to_string_lossy().into_owned());
    }

    /// A file that is only read.
    pub fn add_layer(&mut self, old: &str, new: &Path) {
        self.add_disk(old, new);
        self.layers.insert(new.to_string_lossy().into_owned());
    }

    /// A boot file is at `new`.
    pub fn add_boot_file(&mut self, old: &str, new: &Path) {
        self.boot_files.insert(self.directory.join(old), new.to_string_lossy().into_owned());
    }

    /// Whether a disk of the restored VM has this file.
    pub fn is_new_disk(&self, path: &str) -> bool {
        self.disks.values().any(|new| new == path)
    }

    pub(crate) fn is_layer(&self, path: &str) -> bool {
        self.layers.contains(path)
    }

    pub(crate) fn is_new_boot_file(&self, path: &str) -> bool {
        self.boot_files.values().any(|new| new == path)
    }
}

/// The new path of a disk or boot file.
pub fn new_path(site: &Site<'_>, new: &NewPaths) -> Option<String> {
    let paths = match site.means {
        Use::Disk => &new.disks,
        Use::Boot | Use::Firmware => &new.boot_files,
        _ => return None,
    };
    paths.get(&new.directory.join(site.value)).cloned()
}

/// Whether some disk of the command line is this file; relative ones belong to `directory`. A VM
/// whose disk came by another way (a snapshot or a mirror made at run time) would be restored with
/// the disk that the command line names.
pub fn is_named(options: &[QemuOption], directory: &Path, file: &Path) -> bool {
    let mut found = false;
    visit(options, |site| found |= site.means == Use::Disk && directory.join(site.value) == file);
    found
}

#[cfg(test)]
mod test {
    use super::*;
    use qemu_cmdline::{parse, rewrite, words};

    fn options(line: &str) -> Vec<QemuOption> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn boot_files_are_found_once() {
        let line = "-kernel vmlinuz -initrd i.gz -fw_cfg name=opt/x,file=a.bin -option-rom vmlinuz -drive file=d.img -device e1000,romfile=";
        assert_eq!(boot_files(&options(line)), ["a.bin", "i.gz", "vmlinuz"]);
    }

    #[test]
    fn paths_are_replaced_where_they_are_paths() {
        let mut new = NewPaths::new(Path::new("/vm"));
        for (old, path) in [("/vm/disk", "/r/d,1.img"), ("/vm/on", "/r/on"), ("/vm/16", "/r/16")] {
            new.add_disk(old, Path::new(path));
        }
        new.add_boot_file("disk", Path::new("/r/kernel"));
        let line = "-drive index=1,media=disk,file=disk,id=disk,readonly=on -drive file=./on,snapshot=on,cache.direct=on -hda 16 -m 16 -kernel disk \
                    -serial file:disk -device ide-hd,drive=disk -fw_cfg name=opt/x,file=/vm/disk";
        let line = words(&rewrite(options(line), |site| new_path(site, &new))).join(" ");
        assert_eq!(
            line,
            "-drive index=1,media=disk,file=/r/d,,1.img,id=disk,readonly=on -drive file=/r/on,snapshot=on,cache.direct=on -hda /r/16 -m 16 \
             -kernel /r/kernel -serial file:disk -device ide-hd,drive=disk -fw_cfg name=opt/x,file=/r/kernel"
        );
    }

    #[test]
    fn a_disk_is_named_wherever_its_path_stands() {
        let line = r#"-drive file=sub/a.img,if=none -drive file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"/abs/b.img"}} -hda c.img -serial file:e"#;
        let options = options(line);
        let named = |file: &str| is_named(&options, Path::new("/vm"), Path::new(file));
        assert!(named("/vm/sub/a.img") && named("/abs/b.img") && named("/vm/c.img"));
        assert!(!named("/vm/a.img") && !named("/vm/snap.qcow2") && !named("/vm/e"));
    }

    #[test]
    fn boot_file_is_found_where_qemu_finds_it() {
        let place = tempfile::tempdir().unwrap();
        let own = place.path().join("own");
        std::fs::create_dir(&own).unwrap();
        std::fs::write(own.join("my.bin"), "").unwrap();
        let found = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            boot_files_of(&words, place.path()).unwrap()
        };
        assert_eq!(found("-L own -bios my.bin"), [("my.bin".to_owned(), own.join("my.bin"))]);
        assert_eq!(found("-L own -bios bios-256k.bin"), []);
        std::fs::write(place.path().join("my.bin"), "").unwrap();
        assert_eq!(
            found("-L own -bios my.bin"),
            [("my.bin".to_owned(), place.path().join("my.bin"))]
        );
    }
}
