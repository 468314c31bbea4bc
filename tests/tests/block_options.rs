//! Disks in every spelling that QEMU knows: each comes back as it was, on a host that has nothing
//! but the store, or is refused by its name before anything is taken.

use engine::checkpoint::outcome::Kind;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use stillpoint_tests::{
    Lab, QmpClient, Recipe, TestVm, newest_qemu, on_each_qemu, qemu_img, read_image,
};

const MIB: &str = "4M";

/// Images of the carried disks; `l0` to `l9` are a chain of nine layers.
fn images(recipe: Recipe) -> Recipe {
    let plain = |recipe: Recipe, name: &str, options: &str| {
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        recipe.image(&[&["create", "-q", "-f", "qcow2"], options.as_slice(), &[name, MIB]].concat())
    };
    let on = |recipe: Recipe, name: &str, base: &str, format: &str, size: &str| {
        recipe.image(&["create", "-q", "-f", "qcow2", "-F", format, "-b", base, name, size])
    };
    let recipe = recipe.image(&["create", "-q", "-f", "raw", "l0", "8M"]).patch(
        "l0",
        0x10_0000,
        b"bottom of all chains",
    );
    let recipe = recipe.image(&["create", "-q", "-f", "raw", "probed", MIB]);
    let recipe = ["thr", "by-ref", "by-ref2", "dotted", "json", "spare"]
        .into_iter()
        .fold(recipe, |recipe, name| plain(recipe, name, ""));
    let recipe = plain(recipe, "old", "compat=0.10,cluster_size=4096");
    let recipe = plain(recipe, "subclusters", "extended_l2=on,cluster_size=128k,lazy_refcounts=on");
    let chain = (1..10).fold(recipe, |recipe, number| {
        let size = ["8M", "4M", "6M"][number % 3];
        let format = if number == 1 { "raw" } else { "qcow2" };
        on(recipe, &format!("l{number}"), &format!("l{}", number - 1), format, size)
    });
    let recipe = on(chain, "cor", "l9", "qcow2", MIB);
    on(on(recipe, "ro-mid", "l0", "raw", MIB), "ro", "ro-mid", "qcow2", MIB)
}

/// Node of each carried disk by which the test finds it again, and the words that make it.
const CARRIED: &[(&str, &str)] = &[
    (
        "thr",
        r#"-object throttle-group,id=limit -blockdev {"driver":"throttle","node-name":"thr-top","throttle-group":"limit","file":{"driver":"qcow2","node-name":"thr","file":{"driver":"file","filename":"thr"}}} -device virtio-blk-pci,drive=thr-top,share-rw=on"#,
    ),
    (
        "cor-top",
        "-blockdev driver=copy-on-read,node-name=cor-top,file.driver=qcow2,file.file.driver=file,file.file.filename=cor -device virtio-blk-pci,drive=cor-top,share-rw=on",
    ),
    (
        "ref-tt",
        "-object throttle-group,id=by-name -blockdev driver=file,node-name=ref-file,filename=by-ref \
         -blockdev driver=qcow2,node-name=ref,file=ref-file -blockdev driver=copy-on-read,node-name=ref-cor,file=ref \
         -blockdev driver=throttle,node-name=ref-tt,file=ref-cor,throttle-group=by-name -device virtio-blk-pci,drive=ref-tt,share-rw=on",
    ),
    (
        "ref2-cor",
        "-blockdev driver=qcow2,node-name=ref2,file.driver=file,file.filename=by-ref2 \
         -blockdev driver=copy-on-read,node-name=ref2-cor,file=ref2 -device virtio-blk-pci,drive=ref2-cor,share-rw=on",
    ),
    (
        "dotted",
        "-drive driver=qcow2,file.driver=file,file.filename=dotted,if=none,id=d1,node-name=dotted -device virtio-blk-pci,drive=d1,share-rw=on",
    ),
    (
        "json",
        r#"-drive node-name=json,if=none,id=d2,file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"json"}} -device virtio-blk-pci,drive=d2,share-rw=on"#,
    ),
    (
        "probed",
        "-drive file=probed,if=none,id=d3,node-name=probed,discard=unmap,detect-zeroes=unmap -device virtio-blk-pci,drive=d3,share-rw=on",
    ),
    (
        "chain",
        "-drive file=l9,format=qcow2,if=none,id=d4,node-name=chain,readonly=on -device virtio-blk-pci,drive=d4",
    ),
    (
        "ro",
        "-blockdev raw,node-name=low,read-only=on,file.driver=file,file.filename=l0 \
         -blockdev qcow2,node-name=ro,read-only=on,file.driver=file,file.filename=ro,backing.driver=qcow2,backing.file.driver=file,backing.file.filename=ro-mid,backing.backing=low \
         -device virtio-blk-pci,drive=ro",
    ),
    (
        "old",
        "-drive file=old,format=qcow2,if=none,id=d5,node-name=old -device virtio-blk-pci,drive=d5,share-rw=on",
    ),
    ("subclusters", "-drive file=subclusters,format=qcow2,if=none,id=d6,node-name=subclusters"),
    ("spare", "-blockdev driver=qcow2,node-name=spare,file.driver=file,file.filename=spare"),
];

fn recipe(seed: u32, words: impl IntoIterator<Item = &'static str>) -> Recipe {
    let words: Vec<&str> = words.into_iter().flat_map(str::split_whitespace).collect();
    images(Recipe::scribbler(seed)).arguments(&words)
}

/// What is at a node: its own row of `query-named-block-nodes`.
fn node(monitor: &mut QmpClient, name: &str) -> Value {
    let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true }));
    let hit = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == name);
    hit.unwrap_or_else(|| panic!("no node {name} in {nodes}")).clone()
}

/// The image below a node, read from outside.
fn content(lab: &Lab, vm: &TestVm, row: &Value) -> Vec<u8> {
    let file = row["file"].as_str().expect("a name");
    let tree: Value = file
        .strip_prefix("json:")
        .map_or(Value::Null, |text| serde_json::from_str(text).expect("JSON"));
    let format = if row["drv"] == "raw" { "raw" } else { "qcow2" };
    let nodes = std::iter::successors(Some(&tree), |node| node.get("file"));
    let below = nodes.filter_map(|node| node["filename"].as_str()).next().unwrap_or(file);
    read_image(&lab.qemu, &vm.directory.join(below), format)
}

/// The host is gone: nothing of the VM's directory is where it was.
fn dead_host(lab: &Lab, vm: TestVm) {
    let directory = vm.directory.clone();
    vm.kill();
    std::fs::rename(&directory, lab.fresh_directory("gone")).expect("the test's directory");
}

#[test]
fn block_options_in_every_spelling_come_back() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &recipe(61, CARRIED.iter().map(|(_, words)| *words)));
        let mut monitor = vm.qmp();
        for (number, (name, _)) in
            CARRIED.iter().enumerate().filter(|(_, (name, _))| !["chain", "ro"].contains(name))
        {
            monitor.disk_io(name, &format!("write -P {} 64k 128k", number + 1));
        }
        vm.checkpoint();
        for (number, (name, _)) in
            CARRIED.iter().enumerate().filter(|(_, (name, _))| !["chain", "ro"].contains(name))
        {
            monitor.disk_io(name, &format!("write -P {} 128k 4k", number + 101));
        }
        assert_eq!(vm.checkpoint().outcome.kind, Kind::Incremental);
        let rows: Vec<Value> = CARRIED.iter().map(|(name, _)| node(&mut monitor, name)).collect();
        let truths: Vec<Vec<u8>> = rows.iter().map(|row| content(&lab, &vm, row)).collect();
        drop(monitor);
        dead_host(&lab, vm);
        let restored = lab.restore("m", "m", &["--paused"]);
        let mut monitor = restored.qmp();
        for ((name, _), (row, truth)) in CARRIED.iter().zip(rows.iter().zip(&truths)) {
            let now = node(&mut monitor, name);
            for key in ["drv", "ro", "detect_zeroes", "cache"] {
                assert_eq!(now[key], row[key], "{name}: {key}");
            }
            for key in ["virtual-size", "cluster-size", "format-specific"] {
                // An overlay stands for a read-only chain.
                assert!(
                    now["image"][key] == row["image"][key] || now["ro"] == true,
                    "{name}: {key} of {now}"
                );
            }
            assert!(content(&lab, &restored, &now) == *truth, "{name}: the disk is another");
        }
        monitor.disk_io("thr", "write -P 9 0 4k");
        drop(monitor);
        let outcome = restored.checkpoint().outcome;
        assert_eq!(
            (outcome.kind, outcome.layer_bytes_stored),
            (Kind::Incremental, 0),
            "links are no layers: {outcome:?}"
        );
    });
}

/// The filter is above the node that bitmaps and backup jobs go to, and passes on every write of
/// the guest.
#[test]
fn throttled_disk_is_of_one_instant_while_it_is_written() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let vm = lab.start("m", &recipe(62, CARRIED[..1].iter().map(|(_, words)| *words)));
        let mut monitor = vm.qmp();
        vm.checkpoint();
        let mut written = 0;
        let block = |number: u64| format!("write -P {} {} 4k", number % 250 + 1, number * 4096);
        let taken = std::thread::scope(|scope| {
            let taking =
                scope.spawn(|| lab.run(&["checkpoint", "m", "--json"]).expect_success().json());
            while !taking.is_finished() && written < 1000 {
                monitor.disk_io("thr-top", &block(written));
                written += 1;
            }
            taking.join().expect("it succeeded")
        });
        assert_eq!(taken["id"], 2, "{taken}");
        vm.checkpoint();
        drop(monitor);
        dead_host(&lab, vm);
        for (checkpoint, whole) in [("m@2", false), ("m@3", true)] {
            let restored = lab.restore(checkpoint, "copy", &["--paused"]);
            let row = node(&mut restored.qmp(), "thr");
            let disk = content(&lab, &restored, &row);
            let blocks: Vec<u8> =
                disk.chunks(4096).map(|block| block[0]).take_while(|first| *first != 0).collect();
            let is_prefix = blocks
                .iter()
                .enumerate()
                .all(|(number, first)| u64::from(*first) == number as u64 % 250 + 1);
            let rest_is_empty = disk[blocks.len() * 4096..].iter().all(|byte| *byte == 0);
            assert!(
                is_prefix && rest_is_empty,
                "{checkpoint}: not what the disk was at any moment"
            );
            assert!(
                !whole || blocks.len() as u64 == written,
                "{checkpoint}: {} of {written} blocks",
                blocks.len()
            );
        }
    });
}

/// A drive's state as its guest sees it, and the first bytes of its medium.
fn media(
    lab: &Lab,
    vm: &TestVm,
    monitor: &mut QmpClient,
) -> BTreeMap<String, (Value, Option<Vec<u8>>)> {
    let all = monitor.execute("query-block", json!({}));
    let removable = all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|drive| drive["removable"] == true && drive["qdev"].is_string());
    let state = |drive: &Value| {
        let name = [&drive["device"], &drive["qdev"]]
            .into_iter()
            .find_map(|name| name.as_str().filter(|name| !name.is_empty()));
        let medium = drive["inserted"]["file"].as_str().map(|file| {
            let path = vm.directory.join(file);
            if path.exists() { read_image(&lab.qemu, &path, "raw") } else { deleted(vm, &path) }
        });
        let seen = json!([
            drive["tray_open"],
            drive["locked"],
            drive["inserted"]["ro"],
            drive["inserted"]["drv"]
        ]);
        (name.expect("a name").to_owned(), (seen, medium))
    };
    removable.map(state).collect()
}

/// A file that only QEMU has any more.
fn deleted(vm: &TestVm, path: &Path) -> Vec<u8> {
    let descriptors =
        std::fs::read_dir(format!("/proc/{}/fd", vm.qemu())).expect("QEMU runs").flatten();
    let link = PathBuf::from(format!("{} (deleted)", path.display()));
    let hit = descriptors
        .map(|entry| entry.path())
        .find(|path| std::fs::read_link(path).is_ok_and(|found| found == link));
    std::fs::read(hit.expect("QEMU has it open")).expect("it can be read")
}

#[test]
fn removable_media_are_as_they_were() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let words = "-drive file=x.iso,media=cdrom,if=none,id=cd,cache=none -device ide-cd,drive=cd,id=cd0,bus=ide.1 \
                     -drive file=f.img,format=raw,if=floppy -device virtio-scsi-pci -blockdev raw,node-name=iso,read-only=on,file.driver=file,file.filename=z.iso \
                     -device scsi-cd,drive=iso -device scsi-cd,id=none -drive if=ide,index=1,media=cdrom";
        let recipe =
            ["x.iso", "y.iso", "z.iso"].into_iter().fold(Recipe::scribbler(63), |recipe, name| {
                recipe.image(&["create", "-q", "-f", "raw", name, "1M"])
            });
        let recipe = ["f.img", "g.img"].into_iter().fold(recipe, |recipe, name| {
            recipe.image(&["create", "-q", "-f", "raw", name, "1440k"])
        });
        let recipe = recipe
            .patch("x.iso", 0, b"x")
            .patch("y.iso", 0, b"y")
            .patch("z.iso", 0, b"z")
            .patch("g.img", 0, b"g");
        let words: Vec<&str> = words.split_whitespace().collect();
        let vm = lab.start("m", &recipe.arguments(&words));
        let mut monitor = vm.qmp();
        let change = |monitor: &mut QmpClient, drive: &str, file: &str| {
            let key = if drive == "none" || drive == "cd0" { "id" } else { "device" };
            monitor.execute(
                "blockdev-change-medium",
                json!({ key: drive, "filename": file, "format": "raw" }),
            );
        };
        let gone = |name: &str| {
            std::fs::remove_file(vm.directory.join(name)).expect("the test's directory")
        };
        let mut expected = Vec::new();
        let mut take = |monitor: &mut QmpClient| {
            vm.checkpoint();
            expected.push(media(&lab, &vm, monitor));
        };
        take(&mut monitor);
        monitor.execute("eject", json!({ "id": "cd0", "force": true }));
        gone("x.iso");
        change(&mut monitor, "floppy0", "g.img");
        monitor.disk_io("floppy0", "write -P 7 512 512");
        change(&mut monitor, "none", "z.iso");
        take(&mut monitor);
        change(&mut monitor, "cd0", "y.iso");
        change(&mut monitor, "ide0-cd1", "y.iso");
        monitor.execute("blockdev-open-tray", json!({ "id": "cd0", "force": true }));
        monitor.execute("eject", json!({ "device": "floppy0", "force": true }));
        gone("y.iso");
        take(&mut monitor);
        drop(monitor);
        dead_host(&lab, vm);
        for (number, expected) in expected.iter().enumerate() {
            let restored = lab.restore(&format!("m@{}", number + 1), "copy", &["--paused"]);
            let found = media(&lab, &restored, &mut restored.qmp());
            for (drive, was) in expected {
                let now = &found[drive];
                assert_eq!(now.0, was.0, "m@{}: {drive}", number + 1);
                assert!(now.1 == was.1, "m@{}: the medium of {drive} is another", number + 1);
            }
            assert_eq!(found.len(), expected.len());
        }
    });
}

/// Words of each refusal, and what makes the drive `bad-N`.
const REFUSED: &[(&str, &str)] = &[
    ("part", "driver=raw,offset=65536,file.driver=file,file.filename=l0"),
    ("part", "driver=raw,size=65536,file.driver=file,file.filename=probed,read-only=on"),
    ("part", "file=on-slice,format=qcow2"),
    ("external data file", "file=external,format=qcow2"),
    ("encrypted", "file=secret.qcow2,format=qcow2,encrypt.key-secret=key"),
    ("encrypted", "file=secret.luks,format=luks,key-secret=key"),
    ("convert", "file=other.vmdk,format=vmdk"),
    ("convert", "file=other.vdi,format=vdi"),
    (
        "several images",
        "driver=quorum,vote-threshold=1,children.0.driver=file,children.0.filename=q0,children.1.driver=file,children.1.filename=q1",
    ),
    (
        "tests of QEMU",
        "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=spare",
    ),
    ("filter", "driver=preallocate,file.driver=file,file.filename=old"),
    ("holds nothing", "driver=null-co,size=1M"),
    ("directory", "file=fat:rw:folder,format=raw"),
];

fn bad_images(lab: &Lab) -> Recipe {
    let slice = r#"json:{"driver":"raw","offset":1048576,"size":4194304,"file":{"driver":"file","filename":"l0"}}"#;
    let secret = "--object secret,id=key,data=abc";
    let create =
        |recipe: Recipe, words: &str| recipe.image(&words.split_whitespace().collect::<Vec<_>>());
    let recipe = images(Recipe::scribbler(64))
        .image(&["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", slice, "on-slice", MIB]);
    let _ = lab;
    let commands = [
        "create -q -f qcow2 -o data_file=external.data external 4M",
        "create -q -f vmdk other.vmdk 4M",
        "create -q -f vdi other.vdi 4M",
        "create -q -f raw q0 1M",
        "create -q -f raw q1 1M",
    ];
    let recipe = commands.into_iter().fold(recipe, create);
    let recipe = create(
        recipe,
        &format!(
            "create -q -f qcow2 {secret} -o encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 secret.qcow2 4M"
        ),
    );
    create(
        recipe,
        &format!("create -q -f luks {secret} -o key-secret=key,iter-time=10 secret.luks 4M"),
    )
}

#[test]
fn block_options_that_cannot_come_back_are_refused_by_name() {
    let lab = Lab::for_vms(&newest_qemu(), 2);
    let drives = REFUSED
        .iter()
        .enumerate()
        .map(|(number, (_, words))| format!("{words},if=none,id=bad-{number}"));
    let mut words: Vec<String> = vec!["-object".into(), "secret,id=key,data=abc".into()];
    words.extend(drives.flat_map(|drive| ["-drive".to_owned(), drive]));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    std::fs::create_dir_all(lab.path().join("m/folder")).expect("the test's directory");
    let vm = lab.start_plain("m", &bad_images(&lab).arguments(&words));
    let socket = vm.directory.join("qmp.sock");
    let report = lab.run(&["doctor", "--qmp", socket.to_str().expect("UTF-8"), "--json"]);
    assert_eq!(report.code, 3);
    let rows = report.json();
    for (number, (word, words)) in REFUSED.iter().enumerate() {
        let name = format!("disk bad-{number}");
        let row = rows["checks"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|row| row["check"] == name.as_str());
        let row = row.unwrap_or_else(|| panic!("no row {name} in {rows}"));
        assert!(
            row["state"] == "no" && row.to_string().contains(word),
            "{words}: no '{word}' in {row}"
        );
    }
    let message = vm.try_attach_plain(&[], &[]).expect_failure(3);
    assert!(message.contains("part of a file"), "{message}");
    drop(vm);
    // A QEMU of ours is not up yet when `run` decides; its helper says so, and no checkpoint is
    // taken.
    let slice = ["-drive", "file=on-slice,format=qcow2,if=none,id=slice"];
    let managed = lab.start("ours", &bad_images(&lab).arguments(&slice));
    let message = managed.try_checkpoint().expect_failure(3);
    assert!(message.contains("slice") && message.contains("part"), "{message}");
    assert!(lab.list_if_any("ours").is_empty());
}

/// A loop device of the test's own, as a host device that a VM may have.
struct Loop(String);

impl Loop {
    /// None where the host does not let the test make one.
    fn of(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        (made.status.success() && Path::new(&name).exists()).then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn host_device_comes_back_as_a_file_or_on_a_device() {
    let lab = Lab::new(&newest_qemu());
    let device = |name: &str, bytes: usize| {
        let path = lab.path().join(name);
        std::fs::write(&path, vec![0x5a; bytes]).expect("the test's directory");
        Loop::of(&path)
    };
    let devices = [
        device("one", 1 << 20),
        device("two", 1 << 20),
        device("three", 1 << 20),
        device("large", 2 << 20),
    ];
    let [Some(one), Some(two), Some(three), Some(large)] = devices else {
        return eprintln!("not tested: this host makes no loop devices");
    };
    let words = [
        "-blockdev".to_owned(),
        format!("host_device,filename={},node-name=s", one.0),
        "-blockdev".to_owned(),
        "driver=raw,file=s,node-name=nested".to_owned(),
        "-device".to_owned(),
        "virtio-blk-pci,drive=nested,share-rw=on".to_owned(),
        "-drive".to_owned(),
        format!("file={},format=raw,if=none,id=p,node-name=plain", two.0),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let vm = lab.start("m", &Recipe::scribbler(65).arguments(&words));
    let mut monitor = vm.qmp();
    monitor.disk_io("nested", "write -z 4k 64k");
    monitor.disk_io("plain", "write -P 3 512 512");
    vm.checkpoint();
    drop(monitor);
    let truth = [&one, &two].map(|device| std::fs::read(&device.0).expect("a device"));
    dead_host(&lab, vm);
    let refused = |new: &str| {
        let directory = lab.fresh_directory("refused");
        let directory = directory.to_str().expect("UTF-8").to_owned();
        let map = format!("{}={new}", one.0);
        lab.run(&["restore", "--eager", "m", "--as", "r", "--dir", &directory, "--map", &map])
            .expect_failure(3)
    };
    assert!(refused(&large.0).contains("bytes"), "another size is another disk");
    let map = format!("{}={}", one.0, three.0);
    let restored = lab.restore("m", "m", &["--paused", "--map", &map]);
    assert!(std::fs::read(&three.0).expect("a device") == truth[0], "on the device");
    assert!(
        std::fs::read(restored.directory.join("plain.raw")).expect("a file") == truth[1],
        "as a file"
    );
    assert_eq!(node(&mut restored.qmp(), "s")["drv"], "host_device");
    assert_eq!(restored.checkpoint().outcome.kind, Kind::Incremental);
}

/// A restored VM opens layers as the checkpoint has them, whatever files of the old names are on
/// the new host.
#[test]
fn layer_is_never_taken_from_the_host_by_its_name() {
    let lab = Lab::new(&newest_qemu());
    let words = "-drive file=ro,format=qcow2,if=none,id=r,node-name=ro,readonly=on";
    let vm = lab.start("m", &recipe(66, [words]));
    vm.checkpoint();
    let row = node(&mut vm.qmp(), "ro");
    let truth = content(&lab, &vm, &row);
    let directory = vm.directory.clone();
    vm.kill();
    // Files of the same names and lengths with other content.
    for name in ["l0", "ro-mid"] {
        std::fs::remove_file(directory.join(name)).expect("the test's directory");
    }
    qemu_img(&lab.qemu, &directory, &["create", "-q", "-f", "raw", "l0", "8M"]);
    qemu_img(
        &lab.qemu,
        &directory,
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "l0", "ro-mid", MIB],
    );
    let restored = lab.restore("m", "copy", &["--paused"]);
    let row = node(&mut restored.qmp(), "ro");
    assert!(content(&lab, &restored, &row) == truth, "a file of the host was taken for a layer");
}
