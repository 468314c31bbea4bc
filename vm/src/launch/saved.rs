//! From the command line that a checkpoint saves to the one that a restored VM is started with.
//!
//! One function makes it, for the restore, and beforehand for every checkpoint: what no restore
//! could start is found while the VM still runs. A user who can write the store can change what is
//! saved, so nothing of this host is used that its user has not named (docs/security.md).

use super::arguments::{self, QemuOption};
use super::form::Form;
use super::paths::{NewPaths, new_path};
use crate::error::{VmError, refused};
use anyhow::Result;
use checkpoint_format::VmRecord;
use qemu_cmdline::restorable::{self, Carried, Finding, Wishes};
use qemu_cmdline::{Use, visit};
use qmp_bridge::disks::Disk;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a message names before it stops.
const NAMED: usize = 8;

/// The command line of the restored VM.
pub struct Restored {
    /// As a restore starts it.
    pub options: Vec<QemuOption>,
    /// What its user should know.
    pub notes: Vec<String>,
    /// What its user has not named.
    findings: Vec<Finding>,
}

/// Refused: what the user has not named by `--allow` or `--map`, and what they named for nothing.
///
/// # Errors
/// Refused as said, with what to write; of class usage for a line that is no command line.
pub fn restored(words: &[String], paths: &NewPaths, wishes: &Wishes) -> Result<Restored, VmError> {
    // What this host's QEMU lacks of its own files it says itself.
    let made = make(words, paths, wishes, &|_| true)?;
    if made.findings.is_empty() {
        return Ok(made);
    }
    Err(refused(format!(
        "the saved command line asks for more than a restored VM may have unasked: {}",
        list(&made.findings)
    ))
    .into())
}

fn make(
    words: &[String],
    paths: &NewPaths,
    wishes: &Wishes,
    is_qemus_own: &dyn Fn(&str) -> bool,
) -> Result<Restored> {
    let options = arguments::parse(words)
        .map_err(|error| refused(format!("the saved command line: {error}")))?;
    let mut mapped = restorable::map(options, wishes);
    if let Some(old) = mapped.unused.first() {
        return Err(refused(format!(
            "--map {old}=…: no value of the saved command line is '{old}'; 'stillpoint show --json' prints it"
        )));
    }
    let mut notes = mapped.drop_data_directories(&wishes.allow);
    notes.iter_mut().for_each(|what| {
        *what = format!("{what} is left out: this host's QEMU knows where its own files are")
    });
    mapped.rewrite(|site| new_path(site, paths));
    mapped.options = std::mem::take(&mut mapped.options)
        .into_iter()
        .map(|option| only_read(option, paths))
        .collect();
    let moved = mapped.relocate(&wishes.allow);
    notes.extend(moved.iter().map(|(old, new)| {
        format!("{old} is {new} in the VM's directory (--map {old}={old} keeps it)")
    }));
    let is_boot_file = &|path: &str| paths.is_new_boot_file(path);
    let carried = Carried { is_disk: &|path| paths.is_new_disk(path), is_boot_file, is_qemus_own };
    let (findings, unused) = mapped.check(&carried, &wishes.allow);
    if let Some(what) = unused.first() {
        return Err(refused(format!(
            "--allow {what}: the saved command line asks for no such thing"
        )));
    }
    Ok(Restored { options: mapped.options, notes, findings })
}

/// Layers are shared by many VMs, and may be images of this host: nodes on them cannot write,
/// whatever the line says.
fn only_read(option: QemuOption, paths: &NewPaths) -> QemuOption {
    let mut reads_layer = false;
    visit(std::slice::from_ref(&option), |site| {
        let is_below = site.key.split('.').any(|part| part == "backing");
        reads_layer |= site.means == Use::Disk && paths.is_layer(site.value) && !is_below;
    });
    if !reads_layer || !["drive", "blockdev"].contains(&option.name.as_str()) {
        return option;
    }
    let mut form = Form::of(&option);
    let is_cdrom = form.get("media").as_deref() == Some("cdrom");
    if is_cdrom || form.is_on("read-only") || form.is_on("readonly") {
        return option;
    }
    ["read-only", "readonly"].into_iter().for_each(|key| form.remove(key));
    form.set_on("read-only");
    form.into_option(&option.name)
}

fn list(findings: &[Finding]) -> String {
    let all = findings.iter().take(NAMED).map(|finding| match finding.is_fatal() {
        true => format!("{finding}"),
        false => format!(
            "{finding} (--allow '{}', or --map '{}=NEW')",
            finding.allowance(),
            finding.value
        ),
    });
    let more = findings.len().saturating_sub(NAMED);
    let more = (more > 0).then(|| format!("and {more} more"));
    all.chain(more).collect::<Vec<_>>().join("; ")
}

/// Before a checkpoint: that every file which the command line names is a disk, a layer or a boot
/// file of it, or in one of QEMU's own `data` directories.
pub(crate) fn check_carried(
    words: &[String],
    directory: &Path,
    disks: &[Disk],
    boot_files: &[(String, PathBuf)],
    data: &[PathBuf],
) -> Result<()> {
    let mut paths = NewPaths::new(directory);
    refuse_shared_files(disks)?;
    for disk in disks {
        paths.add_disk(&disk.file.to_string_lossy(), &disk.file);
        disk.backing
            .iter()
            .for_each(|layer| paths.add_disk(&layer.file.to_string_lossy(), &layer.file));
    }
    boot_files.iter().for_each(|(named, path)| paths.add_boot_file(named, path));
    let is_qemus_own = |name: &str| data.iter().any(|folder| folder.join(name).is_file());
    let made = make(words, &paths, &Wishes::default(), &is_qemus_own)?;
    let fatal: Vec<Finding> = made.findings.into_iter().filter(Finding::is_fatal).collect();
    if fatal.is_empty() {
        return Ok(());
    }
    Err(refused(format!(
        "the VM could not be restored from its command line: {}; start it without, or with an image that a device uses",
        list(&fatal)
    )))
}

/// What one disk writes, another one shows, as its image or as a layer below it: restored, each
/// would have a file of its own.
fn refuse_shared_files(disks: &[Disk]) -> Result<()> {
    for written in disks.iter().filter(|disk| !disk.read_only) {
        let file = FileId::of(&written.file);
        let shows = |disk: &&Disk| {
            let is_other = disk.name != written.name && FileId::of(&disk.file) == file;
            is_other || disk.backing.iter().any(|layer| FileId::of(&layer.file) == file)
        };
        if let Some(other) = disks.iter().find(shows) {
            return Err(refused(format!(
                "disks {} and {} are on one file, {}, and one writes to it; give each an image of its own",
                written.name,
                other.name,
                written.file.display()
            )));
        }
    }
    Ok(())
}

/// A file, whatever path leads to it.
#[derive(PartialEq, Eq)]
enum FileId {
    /// Device and inode.
    File(u64, u64),
    BlockDevice(u64),
    /// It is gone from there, and only its path is known.
    Gone(PathBuf),
}

impl FileId {
    fn of(path: &Path) -> Self {
        match std::fs::metadata(path) {
            Ok(facts) if facts.file_type().is_block_device() => Self::BlockDevice(facts.rdev()),
            Ok(facts) => Self::File(facts.dev(), facts.ino()),
            Err(_) => Self::Gone(path.to_owned()),
        }
    }
}

/// What else of a record becomes part of QEMU's command line.
///
/// # Errors
/// Refused if it holds what could be read as another option.
pub fn check_record(record: &VmRecord) -> Result<(), VmError> {
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "-._".contains(letter);
    let is_id = |text: &str| {
        text.starts_with(|letter: char| letter.is_ascii_alphabetic()) && text.chars().all(is_letter)
    };
    if !is_id(&record.ram_block) {
        return Err(refused(format!(
            "the checkpoint calls the VM's memory '{}', which is no name of a memory object",
            record.ram_block
        ))
        .into());
    }
    let accelerator = arguments::KeyList::parse(&record.accelerator);
    let is_known = matches!(accelerator.iter().next(), Some((None, "kvm" | "tcg")));
    let names_file = accelerator.iter().any(|(_, value)| value.contains('/'));
    if is_known && !names_file {
        return Ok(());
    }
    Err(refused(format!(
        "the checkpoint asks for accelerator '{}'; Stillpoint starts kvm and tcg",
        record.accelerator
    ))
    .into())
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::error::{Class, class_of};
    use checkpoint_format::ByteLen;
    use qemu_cmdline::words;

    fn record(ram_block: &str, accelerator: &str) -> VmRecord {
        VmRecord {
            qemu_version: "10.0.2".to_owned(),
            program: "/tmp/evil".to_owned(),
            machine_type: "pc-q35-10.0".to_owned(),
            accelerator: accelerator.to_owned(),
            arguments: Vec::new(),
            vcpus: 1,
            ram_bytes: ByteLen(1 << 20),
            ram_block: ram_block.to_owned(),
            directory: "/vm".to_owned(),
            files: Vec::new(),
        }
    }

    fn line(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_hostile_record_adds_nothing_to_the_command_line() {
        for (block, accelerator) in
            [("pc.ram", "kvm"), ("ram-node0", "tcg,thread=multi"), ("pc.ram", "tcg,tb-size=64")]
        {
            check_record(&record(block, accelerator)).unwrap();
        }
        for (block, accelerator) in [
            ("x,mem-path=/etc/shadow", "tcg"),
            ("", "tcg"),
            ("1", "tcg"),
            ("pc.ram", "xen"),
            ("pc.ram", "kvm,device=/dev/sda"),
            ("pc.ram", "accel=kvm"),
            ("pc.ram", ""),
        ] {
            assert_eq!(
                check_record(&record(block, accelerator)).unwrap_err().class(),
                Class::Refused,
                "{block} {accelerator}"
            );
        }
    }

    #[test]
    fn a_restored_line_has_the_new_files_and_what_its_user_names() {
        let mut paths = NewPaths::new(Path::new("/vm"));
        paths.add_disk("/vm/disk", Path::new("/new/disk.raw"));
        paths.add_boot_file("kernel", Path::new("/cache/k"));
        let text = "-hda disk -kernel kernel -serial file:/var/log/s -L /opt/qemu -netdev tap,id=n,script=/up,downscript=no";
        let wishes = Wishes { map: vec![("/up".to_owned(), "no".to_owned())], allow: Vec::new() };
        let made = restored(&line(text), &paths, &wishes).unwrap();
        let new = "-hda /new/disk.raw -kernel /cache/k -serial file:s -netdev tap,id=n,script=no,downscript=no";
        assert_eq!(words(&made.options).join(" "), new);
        assert_eq!(made.notes.len(), 2, "{:?}", made.notes);
        for wishes in [
            Wishes::default(),
            Wishes {
                allow: vec!["plugin".to_owned(), "netdev.script".to_owned()],
                ..Wishes::default()
            },
            Wishes {
                map: vec![("nothing".to_owned(), "x".to_owned())],
                allow: vec!["netdev.script".to_owned()],
            },
        ] {
            assert_eq!(
                restored(&line(text), &paths, &wishes).err().unwrap().class(),
                Class::Refused,
                "{wishes:?}"
            );
        }
    }

    #[test]
    fn nothing_writes_into_a_layer() {
        let mut paths = NewPaths::new(Path::new("/vm"));
        paths.add_layer("base", Path::new("/srv/base"));
        paths.add_disk("d", Path::new("/new/d"));
        for (text, new) in [
            (
                "-blockdev driver=file,filename=base,node-name=b",
                "-blockdev driver=file,filename=/srv/base,node-name=b,read-only=on",
            ),
            ("-drive file=base,readonly=off,id=b", "-drive file=/srv/base,id=b,read-only=on"),
            ("-drive file=base,readonly=on,id=b", "-drive file=/srv/base,readonly=on,id=b"),
            ("-drive file=base,media=cdrom", "-drive file=/srv/base,media=cdrom"),
            (
                "-drive file=d,backing.file.filename=base",
                "-drive file=/new/d,backing.file.filename=/srv/base",
            ),
        ] {
            let made = restored(&line(text), &paths, &Wishes::default()).unwrap();
            assert_eq!(words(&made.options).join(" "), new);
        }
    }

    fn disk(name: &str, read_only: bool) -> Disk {
        Disk {
            node: name.to_owned(),
            root: name.to_owned(),
            name: name.to_owned(),
            device: name.to_owned(),
            qdev: None,
            is_named: true,
            read_only,
            format: qmp_bridge::disks::ImageFormat::Raw,
            file: "/vm/one".into(),
            virtual_size: 4096,
            is_device: false,
            backing: Vec::new(),
            removable: false,
            layout: None,
            arriving: false,
        }
    }

    #[test]
    fn two_disks_on_one_file_are_refused_if_one_writes() {
        let check = |disks: &[Disk]| {
            check_carried(&line("-drive file=one"), Path::new("/vm"), disks, &[], &[])
        };
        check(&[disk("a", true), disk("b", true)]).unwrap();
        check(&[disk("a", false)]).unwrap();
        let error = check(&[disk("a", false), disk("b", true)]).unwrap_err();
        assert!(
            class_of(&error) == Class::Refused && error.to_string().contains("/vm/one"),
            "{error}"
        );
    }

    #[test]
    fn two_disks_on_one_file_are_refused_whatever_path_leads_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("one"), "1").unwrap();
        std::fs::write(path("other"), "2").unwrap();
        std::fs::hard_link(path("one"), path("hard")).unwrap();
        std::os::unix::fs::symlink("one", path("soft")).unwrap();
        let on = |name: &str, file: &str| Disk { file: path(file), ..disk(name, false) };
        let layer = |file: &str| qmp_bridge::disks::BackingImage {
            file: path(file),
            format: qmp_bridge::disks::ImageFormat::Raw,
            node: "layer".to_owned(),
            virtual_size: 4096,
            is_device: false,
        };
        let above = |file: &str| Disk { backing: vec![layer(file)], ..on("b", "other") };
        refuse_shared_files(&[on("a", "one"), on("b", "other")]).unwrap();
        for second in [on("b", "hard"), on("b", "soft"), above("one"), above("hard")] {
            let error = refuse_shared_files(&[on("a", "one"), second]).unwrap_err();
            assert_eq!(class_of(&error), Class::Refused, "{error}");
        }
    }

    #[test]
    fn a_file_in_no_checkpoint_is_found_before_it() {
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join("bios-256k.bin"), "").unwrap();
        let data = [PathBuf::from("/nowhere"), data.path().to_owned()];
        let check = |text: &str| {
            check_carried(
                &line(text),
                Path::new("/vm"),
                &[],
                &[("k".to_owned(), "/vm/k".into())],
                &data,
            )
        };
        check(
            "-kernel k -bios bios-256k.bin -netdev tap,id=n,script=/x -fsdev local,id=f,path=/srv",
        )
        .unwrap();
        check("-option-rom k -device e1000,romfile=k -device e1000,romfile=").unwrap();
        for text in [
            "-blockdev driver=file,filename=spare,node-name=s",
            "-kernel gone",
            "-bios gone.bin",
            "-option-rom gone.bin",
            "-device e1000,romfile=gone.bin",
            "-device x,new=/file",
        ] {
            assert_eq!(class_of(&check(text).unwrap_err()), Class::Refused, "{text}");
        }
    }
}
