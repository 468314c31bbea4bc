//! Disks as QEMU tells of them, and the command lines that make them.

use super::*;
use crate::error::{Class, VmError};
use crate::launch::arguments::{parse, words};
use qmp_bridge::disks::{Disks, EmptyDrive, ImageFormat};

pub(super) fn options(line: &str) -> Vec<QemuOption> {
    parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).unwrap()
}

fn disk(node: &str, device: &str, file: &str) -> Disk {
    Disk {
        node: node.to_owned(),
        root: node.to_owned(),
        name: node.to_owned(),
        device: device.to_owned(),
        qdev: None,
        is_named: true,
        read_only: false,
        format: ImageFormat::Raw,
        file: file.into(),
        virtual_size: 4096,
        is_device: false,
        backing: Vec::new(),
        removable: false,
        layout: None,
        arriving: false,
    }
}

fn medium(node: &str, device: &str, file: &str) -> Disk {
    Disk {
        removable: true,
        read_only: true,
        qdev: Some("/machine/unattached/device[9]".into()),
        ..disk(node, device, file)
    }
}

/// A device that has its drive alone.
fn alone(node: &str, qdev: &str, file: &str) -> Disk {
    Disk {
        is_named: false,
        qdev: Some(qdev.to_owned()),
        device: qdev.to_owned(),
        ..medium(node, qdev, file)
    }
}

fn no_medium(device: &str, qdev: &str) -> EmptyDrive {
    EmptyDrive { device: device.to_owned(), qdev: Some(qdev.to_owned()), is_named: device != qdev }
}

fn found(
    line: &str,
    disks: Vec<Disk>,
    empty: Vec<EmptyDrive>,
    unused: Vec<Disk>,
) -> Result<Drives, VmError> {
    let unused = unused.into_iter().map(|disk| (disk.node.clone(), Ok(disk))).collect();
    let started = Started {
        options: &options(line),
        machine_type: "pc-i440fx-10.0",
        directory: Path::new("/vm"),
        pid: std::process::id(),
    };
    examine(Disks { disks, empty, unused }, &started)
}

fn saved(line: &str, disks: Vec<Disk>, empty: Vec<EmptyDrive>) -> String {
    words(&found(line, disks, empty, Vec::new()).unwrap().options).join(" ")
}

fn assert_refused(line: &str, disks: Vec<Disk>, word: &str) {
    let error = found(line, disks, Vec::new(), Vec::new()).unwrap_err();
    assert_eq!(error.class(), Class::Refused);
    assert!(error.to_string().contains(word), "{error}");
}

const DRIVES: &str =
    "-drive file=a.img,id=data,node-name=sp-data -drive index=0,file=b.img,node-name=sp-drive1";

/// `qom-set /machine/peripheral/v drive b` gives a running device another node.
#[test]
fn device_with_another_node_than_at_its_start_is_refused() {
    let line = "-blockdev driver=raw,node-name=a,file.driver=file,file.filename=a.img \
                -blockdev driver=raw,node-name=b,file.driver=file,file.filename=b.img -device virtio-blk-pci,drive=a,id=v";
    let has = |node: &str| Disk {
        removable: false,
        ..alone(node, "/machine/peripheral/v/virtio-backend", &format!("/vm/{node}.img"))
    };
    let spare = |node: &str| disk(node, node, &format!("/vm/{node}.img"));
    found(line, vec![has("a")], Vec::new(), vec![spare("b")]).unwrap();
    let error = found(line, vec![has("b")], Vec::new(), vec![spare("a")]).unwrap_err();
    assert_eq!(error.class(), Class::Refused, "{error}");
    let line = "-drive file=a.img,id=a,if=none,node-name=a -drive file=b.img,id=b,if=none,node-name=b -device ide-hd,drive=a";
    let named = |node: &str| Disk {
        qdev: Some("/machine/peripheral-anon/device[0]".to_owned()),
        ..disk(node, "a", &format!("/vm/{node}.img"))
    };
    found(line, vec![named("a"), spare("b")], Vec::new(), Vec::new()).unwrap();
    assert_refused(line, vec![named("b"), spare("a")], "b.img");
}

#[test]
fn name_is_found_by_id_or_by_the_id_that_qemu_made() {
    let disks =
        vec![disk("#block101", "data", "/vm/a.img"), disk("#block102", "ide0-hd0", "/vm/b.img")];
    let drives = found(DRIVES, disks, Vec::new(), Vec::new()).unwrap();
    assert_eq!(
        drives.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(),
        ["sp-data", "sp-drive1"]
    );
    assert_eq!(words(&drives.options).join(" "), DRIVES, "nothing has changed");
}

#[test]
fn name_that_the_user_gave_stays_also_above_a_filter() {
    let line = "-blockdev driver=throttle,node-name=top,throttle-group=g,file.driver=raw,file.file.driver=file,file.file.filename=a.img";
    let disks = vec![Disk { root: "top".into(), ..disk("#block1", "/machine/x", "/vm/a.img") }];
    let drives = found(line, disks, Vec::new(), Vec::new()).unwrap();
    assert_eq!(
        (drives.disks[0].name.as_str(), words(&drives.options).join(" ").as_str()),
        ("top", line)
    );
}

#[test]
fn filters_by_reference_stay_above_their_nodes() {
    let file = "-blockdev driver=file,node-name=f,filename=a.img";
    let format = "-blockdev driver=raw,node-name=e,file=f";
    let throttle =
        |file: &str| format!("-blockdev driver=throttle,node-name=tt,file={file},throttle-group=g");
    let copy = |file: &str| format!("-blockdev driver=copy-on-read,node-name=cc,file={file}");
    let chains = [
        ("tt", vec![throttle("e")]),
        ("cc", vec![copy("e")]),
        ("tt", vec![copy("e"), throttle("cc")]),
        ("cc", vec![throttle("e"), copy("tt")]),
    ];
    for (root, filters) in chains {
        let line = format!("{file} {format} {} -device scsi-hd,drive={root}", filters.join(" "));
        let top = Disk {
            root: root.into(),
            is_named: false,
            qdev: Some("/machine/peripheral-anon/device[0]".into()),
            ..disk("e", "x", "/vm/a.img")
        };
        assert_eq!(saved(&line, vec![top.clone()], Vec::new()), line);
        // The chain of an image is named by the image itself, below any filter.
        let chain = line.replace("driver=raw,node-name=e", "driver=qcow2,node-name=e,backing=f2");
        let chain =
            format!("-blockdev driver=raw,node-name=f2,file.driver=file,file.filename=b {chain}");
        assert_eq!(
            saved(&chain, vec![on(&["b"], top)], Vec::new()),
            line.replace("driver=raw", "driver=qcow2")
        );
    }
}

#[test]
fn disk_that_the_line_does_not_name_is_refused() {
    for (device, file) in [("data", "/vm/other.img"), ("ide0-hd1", "/vm/c.img")] {
        assert_refused(
            DRIVES,
            vec![disk("#block7", device, file), disk("sp-drive1", "ide0-hd0", "/vm/b.img")],
            file,
        );
    }
    // A drive whose medium is nowhere in the VM would come back.
    assert_refused(DRIVES, vec![disk("sp-data", "data", "/vm/a.img")], "b.img");
}

const CD: &str = "-drive file=x.iso,media=cdrom,if=none,id=cd,cache=none,node-name=sp-cd -device ide-cd,drive=cd,id=cd0";

#[test]
fn ejected_medium_is_not_on_the_line() {
    assert_eq!(
        saved(CD, Vec::new(), vec![no_medium("cd", "cd0")]),
        "-drive media=cdrom,if=none,id=cd -device ide-cd,drive=cd,id=cd0"
    );
    let line = "-blockdev driver=raw,node-name=iso,file.driver=file,file.filename=x.iso -device scsi-cd,drive=iso -device scsi-cd,id=b";
    let empty = vec![
        no_medium("/machine/peripheral-anon/device[0]", "/machine/peripheral-anon/device[0]"),
        no_medium("b", "b"),
    ];
    assert_eq!(saved(line, Vec::new(), empty), "-device scsi-cd -device scsi-cd,id=b");
    // An id that is both a drive's and a device's.
    let same = "-drive file=x.iso,if=none,id=cd -device ide-cd,drive=cd,id=cd";
    let drive = EmptyDrive { is_named: true, ..no_medium("cd", "cd") };
    assert_eq!(
        saved(same, Vec::new(), vec![drive]),
        "-drive if=none,id=cd -device ide-cd,drive=cd,id=cd"
    );
}

#[test]
fn changed_medium_is_on_the_line() {
    let other = medium("#block9", "cd", "/isos/a,b.iso");
    assert_eq!(
        saved(CD, vec![other], Vec::new()),
        "-drive media=cdrom,if=none,id=cd,cache=none,file=/isos/a,,b.iso,format=raw,node-name=sp-cd -device ide-cd,drive=cd,id=cd0"
    );
    // In a drive that QEMU made by itself, and in one that a device has alone.
    let disks = vec![
        medium("#block1", "ide1-cd0", "/x.iso"),
        alone("#block2", "e", "/y.iso"),
        Disk { read_only: false, ..medium("#block3", "floppy0", "/f.img") },
    ];
    let found = found("-device scsi-cd,id=e", disks, Vec::new(), Vec::new()).unwrap();
    let line = words(&found.options).join(" ");
    for part in [
        "-device scsi-cd,id=e,drive=sp-e",
        "-drive if=ide,index=2,media=cdrom,file=/x.iso,format=raw,node-name=sp-ide1-cd0",
        r#""node-name":"sp-e","read-only":true"#,
        "-drive if=floppy,index=0,file=/f.img,format=raw,node-name=sp-floppy0",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    let names: Vec<&str> = found.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["sp-ide1-cd0", "sp-e", "sp-floppy0"]);
}

#[test]
fn medium_of_another_format_is_another_medium() {
    let line = "-drive file=x,format=qcow2,if=none,id=cd,node-name=sp-cd -device scsi-cd,drive=cd";
    let text = saved(line, vec![medium("#block3", "cd", "/vm/x")], Vec::new());
    assert!(
        text.contains("file=/vm/x,format=raw,node-name=sp-cd,read-only=on")
            && !text.contains("qcow2"),
        "{text}"
    );
}

#[test]
fn disk_that_is_only_read_says_so() {
    let ro = |node: &str, file: &str| Disk { read_only: true, ..disk(node, "x", file) };
    let cases = [
        ("-drive file=a,node-name=n", "-drive file=a,node-name=n,read-only=on"),
        ("-drive file=a,node-name=n,readonly=on", "-drive file=a,node-name=n,readonly=on"),
        ("-drive file=a,node-name=n,media=cdrom", "-drive file=a,node-name=n,media=cdrom"),
        (
            r#"-blockdev {"auto-read-only":true,"driver":"file","filename":"a","node-name":"n"}"#,
            r#"-blockdev {"auto-read-only":true,"driver":"file","filename":"a","node-name":"n","read-only":true}"#,
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(saved(line, vec![ro("n", "/vm/a")], Vec::new()), expected);
    }
    // A floppy that was put in again to be written.
    let line = "-drive file=a,if=floppy,readonly=on,node-name=n";
    let text = saved(
        line,
        vec![Disk { read_only: false, ..medium("#block1", "floppy0", "/vm/a") }],
        Vec::new(),
    );
    assert_eq!(text, "-drive if=floppy,file=/vm/a,format=raw,node-name=n");
}

#[test]
fn medium_that_was_exchanged_for_another_node_of_the_line() {
    let line = r#"-blockdev driver=raw,node-name=one,file.driver=file,file.filename=1 -blockdev driver=raw,node-name=two,file.driver=file,file.filename=2
                  -device {"driver":"scsi-cd","id":"c","drive":"one"}"#;
    let unused = vec![Disk { read_only: true, ..disk("one", "one", "/vm/1") }];
    let found = found(line, vec![alone("two", "c", "/vm/2")], Vec::new(), unused).unwrap();
    let text = words(&found.options).join(" ");
    assert!(
        text.contains(r#""drive":"two""#)
            && text.contains("filename=1")
            && text.contains("filename=2"),
        "{text}"
    );
    assert_eq!(found.disks.len(), 2, "the one that nothing uses is carried, too");
}

#[test]
fn unused_node_is_carried_if_the_line_makes_it() {
    let line = "-blockdev driver=raw,node-name=spare,file.driver=file,file.filename=s.img -blockdev driver=raw,node-name=gone,file=f2 \
                -blockdev driver=file,node-name=f2,filename=g.img";
    let later = disk("added-later", "added-later", "/backup/target.img");
    let found =
        found(line, Vec::new(), Vec::new(), vec![disk("spare", "spare", "/vm/s.img"), later])
            .unwrap();
    assert_eq!(found.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["spare"]);
    assert_eq!(
        words(&found.options).join(" "),
        "-blockdev driver=raw,node-name=spare,file.driver=file,file.filename=s.img"
    );
}

fn on(layers: &[&str], disk: Disk) -> Disk {
    let layer = |file: &&str| BackingImage {
        file: Path::new("/vm").join(file),
        format: ImageFormat::Qcow2,
        node: format!("n-{file}"),
        virtual_size: 4096,
        is_device: false,
    };
    Disk { format: ImageFormat::Qcow2, backing: layers.iter().map(layer).collect(), ..disk }
}

#[test]
fn chain_on_the_line_gives_way_to_the_one_that_runs() {
    let line = r#"-blockdev {"driver":"file","filename":"/vm/b","node-name":"bf"} -blockdev {"driver":"qcow2","file":"bf","node-name":"b","backing":null}
        -blockdev {"driver":"file","filename":"/vm/t","node-name":"tf"} -blockdev {"driver":"qcow2","file":"tf","node-name":"t","backing":"b"}
        -drive file=u,node-name=u,format=qcow2,backing.driver=qcow2,backing.file.filename=c"#;
    let text = saved(
        line,
        vec![on(&["b"], disk("t", "x", "/vm/t")), on(&["c"], disk("u", "y", "/vm/u"))],
        Vec::new(),
    );
    let file = r#"-blockdev {"driver":"file","filename":"/vm/t","node-name":"tf"}"#;
    assert_eq!(
        text,
        format!(
            r#"{file} -blockdev {{"driver":"qcow2","file":"tf","node-name":"t"}} -drive file=u,node-name=u,format=qcow2"#
        )
    );
    // Without a chain, what says so stays.
    let alone = r#"-blockdev {"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"/vm/t"},"node-name":"t"}"#;
    assert_eq!(saved(alone, vec![on(&[], disk("t", "x", "/vm/t"))], Vec::new()), alone);
    // A layer that is also a disk of its own stays on the line.
    let both = "-blockdev driver=raw,node-name=b,file.driver=file,file.filename=b,read-only=on \
                -blockdev driver=qcow2,node-name=t,file.driver=file,file.filename=t,backing=b";
    let text = saved(
        both,
        vec![
            on(&["b"], disk("t", "x", "/vm/t")),
            Disk { read_only: true, ..disk("b", "y", "/vm/b") },
        ],
        Vec::new(),
    );
    assert!(text.contains("node-name=b,") && !text.contains("backing"), "{text}");
}

#[test]
fn host_device_becomes_a_file_and_back() {
    let cases = [
        (
            "-blockdev driver=host_device,filename=/dev/loop0,node-name=s -blockdev driver=raw,file=s,node-name=d",
            "driver=file",
        ),
        ("-blockdev host_device,filename=/dev/loop0,node-name=d", "-blockdev file,"),
        (
            r#"-blockdev {"driver":"raw","node-name":"d","file":{"driver":"host_device","filename":"/dev/loop0"}}"#,
            r#""driver":"file""#,
        ),
        ("-drive file=host_device:/dev/loop0,format=raw,node-name=d", "file=/dev/loop0,"),
        (
            "-drive file.driver=host_device,file.filename=/dev/loop0,format=raw,node-name=d",
            "file.driver=file",
        ),
        (
            r#"-drive node-name=d,file=json:{"driver":"raw",,"file":{"driver":"host_device",,"filename":"/dev/loop0"}}"#,
            r#""driver":"file""#,
        ),
    ];
    for (line, expected) in cases {
        let text = saved(line, vec![disk("d", "x", "/dev/loop0")], Vec::new());
        assert!(text.contains(expected) && !text.contains("host_device"), "{line}: {text}");
        let back = words(&as_device(options(&text), Path::new("/dev/loop0"))).join(" ");
        assert_eq!(back.contains("host_device"), !line.contains("host_device:"), "{back}");
        assert_eq!(words(&as_device(options(&text), Path::new("/dev/loop1"))).join(" "), text);
    }
}

#[test]
fn restored_image_names_what_is_below_it() {
    for (text, new) in [
        (
            r#"-blockdev {"driver":"qcow2","backing":null,"file":"f"}"#,
            r#"-blockdev {"driver":"qcow2","file":"f"}"#,
        ),
        ("-drive file=d,backing=,id=a", "-drive file=d,id=a"),
        ("-drive file=d,backing.node-name=b", "-drive file=d,backing.node-name=b"),
        ("-device x,backing=", "-device x,backing="),
    ] {
        assert_eq!(words(&on_what_images_name(options(text))).join(" "), new);
    }
}
