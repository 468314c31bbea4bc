//! What the tables list, and how each is tried.

use super::special;
use stillpoint_tests::{Lab, Ran};

type Acts = &'static [(&'static str, &'static str)];

#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// `run` with these arguments of QEMU, refused before QEMU starts.
    Run(&'static str),
    /// `attach` to a QEMU with these arguments, after these QMP commands.
    Attach {
        words: &'static str,
        early: Acts,
    },
    /// A checkpoint of such a VM, after these QMP commands.
    Checkpoint {
        words: &'static str,
        acts: Acts,
    },
    Special(fn(&Lab, &str) -> Option<Ran>),
    /// By that row of docs/compatibility.md.
    Row(&'static str),
    /// By a test of that name, which looks at the exit code or class and the message.
    Test(&'static str),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// As the table has it.
    pub item: &'static str,
    pub way: Way,
    /// What the message must have; the words of the item where there are none.
    pub says: &'static [&'static str],
    /// Only with a QEMU before this version.
    pub before: u32,
}

impl Case {
    pub(super) fn fits(&self, major: u32) -> bool {
        major < self.before
    }

    /// The table's own words are literal but for `…`, which stands for anything.
    pub(super) fn words(&self) -> Vec<String> {
        if self.says.is_empty() {
            return self
                .item
                .split('…')
                .map(|part| part.trim().to_owned())
                .filter(|part| !part.is_empty())
                .collect();
        }
        self.says.iter().map(|word| (*word).to_owned()).collect()
    }

    const fn says(self, says: &'static [&'static str]) -> Self {
        Self { says, ..self }
    }

    const fn before(self, before: u32) -> Self {
        Self { before, ..self }
    }
}

const fn case(item: &'static str, way: Way) -> Case {
    Case { item, way, says: &[], before: u32::MAX }
}

const fn run(item: &'static str, words: &'static str) -> Case {
    case(item, Way::Run(words))
}

const fn attach(item: &'static str, words: &'static str) -> Case {
    case(item, Way::Attach { words, early: &[] })
}

const fn special(item: &'static str, run: fn(&Lab, &str) -> Option<Ran>) -> Case {
    case(item, Way::Special(run))
}

const fn row(item: &'static str, row: &'static str) -> Case {
    case(item, Way::Row(row))
}

const fn test(item: &'static str, name: &'static str) -> Case {
    case(item, Way::Test(name))
}

pub(super) struct Page {
    pub file: &'static str,
    pub heading: &'static str,
    pub cases: &'static [Case],
}

pub(super) const PAGES: &[Page] = &[
    Page { file: "attach.md", heading: "What is refused, and what to do", cases: ATTACH },
    Page { file: "limits.md", heading: "What is not supported, and is refused", cases: LIMITS },
    Page { file: "disks.md", heading: "Refused", cases: DISKS },
];

/// Tests of the command line as `attach` reads it, for what no test host can start: hardware, other
/// processes, encrypted memory.
const NO_ENGINE: &str = "what_no_engine_can_save_is_refused_in_every_form";
const NO_MONITOR: &str = "what_is_no_monitor_of_a_qemu_is_refused_and_says_what_would_be";
const NO_GUEST: &str = "run_state_without_a_whole_guest_is_refused_by_name";
const MODULE: &str = "-m 16,slots=1,maxmem=64M -object memory-backend-ram,id=m,size=16M";

const ATTACH: &[Case] = &[
    test("the monitor … does not answer", "a_busy_monitor_is_refused"),
    test("is the path right?", NO_MONITOR),
    test("that QEMU has ended", NO_MONITOR),
    test("which is no QEMU", NO_MONITOR),
    special("another process namespace", special::other_namespace),
    special("has another root directory", special::other_root),
    special("run Stillpoint as root or as the user of that QEMU", special::other_user),
    special("no VM yet", special::preconfig),
    test("its QEMU … has ended", "attach_to_the_same_process_continues_and_to_another_begins_again"),
    test("was started by Stillpoint", "one_vm_has_one_name_and_one_helper"),
    test("is attached as … already", "one_vm_has_one_name_and_one_helper"),
    test("is the name of another QEMU that runs", "attach_to_the_same_process_continues_and_to_another_begins_again"),
    row("RAM is made of … objects", "RAM of several memory objects (NUMA nodes)"),
    case(
        "memory are plugged in beside the VM's own",
        Way::Attach { words: MODULE, early: &[("device_add", r#"{"driver":"pc-dimm","id":"late","memdev":"m"}"#)] },
    ),
    row("`pc-dimm`", "memory module (`pc-dimm`)"),
    attach("`virtio-mem`", "-m 16,maxmem=64M -object memory-backend-ram,id=v,size=16M -device virtio-mem-pci,memdev=v")
        .says(&["virtio-mem", "one memory"]),
    attach("`nvdimm`", "-machine pc,nvdimm=on -m 16,slots=1,maxmem=64M -object memory-backend-ram,id=n,size=16M -device nvdimm,memdev=n")
        .says(&["nvdimm", "no part of the checkpoint"]),
    attach("`virtio-pmem`", "-m 16,maxmem=64M -object memory-backend-ram,id=p,size=16M -device virtio-pmem-pci,memdev=p")
        .says(&["virtio-pmem", "no part of the checkpoint"]),
    test("vfio", NO_ENGINE),
    test("vhost-user", NO_ENGINE),
    test("vhost-vdpa", NO_ENGINE),
    row("ivshmem", "`ivshmem-plain`"),
    test("SEV", NO_ENGINE),
    test("TDX", NO_ENGINE),
    test("`vmbus-bridge`", "unsupported_models_are_found_by_name_or_family"),
    attach("`pci-serial-2x`", "-chardev null,id=a -chardev null,id=b -device pci-serial-2x,chardev1=a,chardev2=b")
        .says(&["pci-serial-2x", "QEMU aborts"]),
    test("`scsi-block`", NO_ENGINE),
    test("`scsi-generic`", NO_ENGINE),
    attach("balloon with `free-page-hint=on`", "-object iothread,id=t -device virtio-balloon-pci,free-page-hint=on,iothread=t")
        .says(&["free-page-hint", "leave free-page-hint out"]),
    attach(
        "balloon with `free-page-hint=on`",
        "-object iothread,id=t -device virtio-balloon-pci,iothread=t -global virtio-balloon-device.free-page-hint=on",
    )
    .says(&["free-page-hint", "leave free-page-hint out"]),
    special("network backend … is a descriptor … cannot be identified", special::network_descriptor),
    row("a device was plugged in or out", "device plugged in since the start (`device_add`)"),
    row("a disk is on another file now", "disk moved to another file since the start (`blockdev-snapshot-sync`)"),
    special("a file that no checkpoint holds (a kernel that was removed)", special::kernel_removed).says(&["blob.bin"]),
    special("a file that no checkpoint holds (a kernel that was removed)", special::option_rom_removed).says(&["-option-rom", "blob.bin"]),
    row("is not in Stillpoint's table of options", "option that no QEMU from 7.2 to 11.1 has"),
    row("could be a file", "unknown key whose value could be a file"),
    row("cannot be checkpointed: QEMU itself cannot save its state", "`nvme`"),
    case(
        "this QEMU's memory cannot be read by … does not support live migration",
        Way::Attach { words: "", early: &[("blockdev-add", r#"{"driver":"vvfat","node-name":"v","dir":"sub","rw":true}"#)] },
    ),
    attach("machine type … in a form of QEMU 2.3 and before", "-machine pc-i440fx-2.3").before(9),
    attach("-global migration.… changes the form of the saved state", "-global migration.send-configuration=off"),
    special("the VM's configuration must still be where it was", special::configuration_removed),
    attach("its NBD server can abort QEMU", "-object iothread,id=t").before(9),
    case(
        "another tool's export is served by QEMU's NBD server",
        Way::Checkpoint {
            words: "-blockdev driver=raw,node-name=shown,file.driver=file,file.filename=data.raw",
            acts: &[
                ("nbd-server-start", r#"{"addr":{"type":"unix","data":{"path":"theirs.sock"}}}"#),
                ("block-export-add", r#"{"type":"nbd","id":"theirs","node-name":"shown"}"#),
            ],
        },
    )
    .says(&["theirs"]),
    case(
        "a migration is under way",
        Way::Checkpoint {
            words: "",
            acts: &[("migrate-set-parameters", r#"{"max-bandwidth":10000}"#), ("migrate", r#"{"uri":"exec:cat >/dev/null"}"#)],
        },
    )
    .says(&["migration"]),
    test("the VM's run state is `inmigrate`", NO_GUEST),
    test("`postmigrate`", NO_GUEST),
    test("`finish-migrate`", NO_GUEST),
    test("`restore-vm`", NO_GUEST),
    test("`save-vm`", NO_GUEST),
    test("`colo`", NO_GUEST),
    test("`debug`", NO_GUEST),
    test("`suspended` before QEMU 9.0", NO_GUEST),
    test("`suspended` by stream", "run_state_suspended_is_kept_by_the_tracker_and_refused_by_stream"),
];

const LIMITS: &[Case] = &[
    row("vhost-user", "`vhost-user-fs-pci`"),
    row("vhost-user", "`vhost-user-blk-pci`"),
    row("vhost-user", "`-netdev vhost-user`"),
    row("VFIO", "`vfio-pci`"),
    row("vhost-vdpa", "`-netdev vhost-vdpa`"),
    run("vhost-vdpa", "-device vhost-vdpa-device-pci,vhostdev=/dev/x").says(&["vhost-vdpa-device-pci", "DMA"]),
    run("vhost-vsock", "-device vhost-vsock-pci,guest-cid=3").says(&["kernel of this host"]),
    run("vhost-scsi", "-device vhost-scsi-pci,wwpn=naa.5001405").says(&["kernel of this host"]),
    row("ivshmem", "`ivshmem-plain`"),
    run("ivshmem", "-device ivshmem-doorbell,chardev=c").says(&["ivshmem-doorbell"]),
    row("encrypted guest memory (SEV, TDX)", "`-object sev-guest`"),
    row("encrypted guest memory (SEV, TDX)", "`-object tdx-guest`"),
    run("encrypted guest memory (SEV, TDX)", "-object sev-snp-guest,id=s").says(&["encrypted guest memory"]),
    run("encrypted guest memory (SEV, TDX)", "-machine pc,memory-encryption=s").says(&["encrypted guest memory"]),
    row("`free-page-hint=on` of a balloon", "`virtio-balloon-pci,free-page-hint=on`"),
    run("`free-page-hint=on` of a balloon", "-device virtio-balloon-pci,id=b -set device.b.free-page-hint=on").says(&["free-page-hint"]),
    run("`free-page-hint=on` of a balloon", "-device virtio-balloon-pci -global virtio-balloon-device.free-page-hint=on")
        .says(&["free-page-hint"]),
    run(
        "`free-page-hint=on` of a balloon",
        "-device virtio-balloon-pci -global driver=virtio-balloon-pci,property=free-page-hint,value=on",
    )
    .says(&["free-page-hint"]),
    run("`free-page-hint=on` of a balloon", r#"-device {"driver":"virtio-balloon-pci","free-page-hint":true}"#).says(&["free-page-hint"]),
    row("virtio-mem", "`virtio-mem-pci`"),
    row("virtio-pmem", "`virtio-pmem-pci`"),
    row("NVDIMM", "`nvdimm`"),
    row("`-mem-path`", "`-mem-path`"),
    run("own `memory-backend-*`", "-object memory-backend-file,id=m,size=16M,mem-path=x").says(&["memory-backend-file"]),
    run("own `memory-backend-*`", r#"-object {"qom-type":"memory-backend-memfd","id":"m","size":16777216}"#)
        .says(&["memory-backend-memfd"]),
    run("own `memory-backend-*`", "-machine pc,memory-backend=m").says(&["memory-backend=m"]),
    run("`-numa memdev=` (in `run`)", "-numa node,memdev=m").says(&["memdev"]),
    row("`amd-iommu`", "`amd-iommu`"),
    row("`virtio-crypto`", "`virtio-crypto-pci`"),
    row("`isa-vga`", "`isa-vga`"),
    row("`isa-cirrus-vga` (also as the card of `-machine isapc`)", "`isa-cirrus-vga`"),
    test("`isa-cirrus-vga` (also as the card of `-machine isapc`)", "torture_card_of_the_board_without_its_state_is_refused"),
    test(
        "two or more of `isa-ide` (`-machine isapc`) or `isa-ipmi-bt` or `isa-ipmi-kcs` or user networks (with QEMU before 8.2)",
        "torture_devices_saved_under_one_name_are_refused",
    ),
    test(
        "a VM that a stream would migrate (no plugin) and whose QEMU may not open its disks again (`-runas`)",
        "torture_disks_closed_to_qemu_are_no_reason_to_stop_the_guest",
    ),
    test(
        "a disk whose file is not where QEMU opened it any more (in a VM that a stream would migrate, or `adopt` would move)",
        "file_that_was_replaced_below_qemu_is_never_opened",
    ),
    row("`adlib`", "`adlib`"),
    row("`ati-vga`", "`ati-vga`"),
    run("`ccid-card-emulated`", "-device usb-ccid -device ccid-card-emulated").says(&["ccid-card-emulated", "saves nothing"]),
    row("CXL (`cxl-…`, `pxb-cxl`)", "`cxl-rp`"),
    run("CXL (`cxl-…`, `pxb-cxl`)", "-device pxb-cxl,bus_nr=12").says(&["pxb-cxl", "saves nothing"]),
    run("`isa-applesmc`", "-device isa-applesmc").says(&["isa-applesmc", "saves nothing"]),
    run("`pxb`", "-device pxb,bus_nr=8").says(&["-device pxb ", "saves nothing"]),
    run("`pxb-pcie`", "-machine q35 -device pxb-pcie,bus_nr=9,bus=pcie.0").says(&["pxb-pcie", "saves nothing"]),
    run("`-runas`", "-runas nobody").says(&["-runas", "as that user"]),
    run("`-run-with user=` (in `run`)", "-run-with user=nobody").says(&["-run-with user=", "as that user"]),
    run("`edu`", "-device edu").says(&["-device edu", "saves nothing"]),
    run("test devices", "-device pci-testdev").says(&["pci-testdev", "saves nothing"]),
    run("`uefi-vars-x64`", "-device uefi-vars-x64").says(&["uefi-vars-x64", "used storage"]),
    attach("`ramfb` of QEMU before 8.2", "-device ramfb").says(&["ramfb"]).before(8),
    row("`nvme`", "`nvme`"),
    run("`nvme`", r#"-device {"driver":"nvme","serial":"1"}"#).says(&["nvme", "cannot save its state"]),
    row("`rocker`", "`rocker`"),
    run("`ufs`", "-device ufs").says(&["ufs", "cannot save its state"]),
    row("`hv-syndbg`", "`hv-syndbg`"),
    row("`usb-audio`", "`usb-audio`"),
    row("`usb-braille`", "`usb-braille`"),
    row("`usb-mtp`", "`usb-mtp`"),
    row("`usb-net`", "`usb-net`"),
    row("`usb-serial`", "`usb-serial`"),
    row("`usb-uas`", "`usb-uas`"),
    row("`usb-wacom-tablet`", "`usb-wacom-tablet`"),
    run("`virtio-input-host`", "-device virtio-input-host,evdev=/dev/x").says(&["virtio-input-host", "cannot save its state"]),
    row("`virtio-input-host`", "`virtio-input-host-pci`"),
    run("`virtio-sound`", "-device virtio-sound").says(&["virtio-sound", "cannot save its state"]),
    row("`virtio-sound`", "`virtio-sound-pci`"),
    row("9p shares (in `run`; an attached VM's while the guest has one mounted)", "9p share (`-virtfs`), not mounted"),
    run(
        "9p shares (in `run`; an attached VM's while the guest has one mounted)",
        "-fsdev local,id=f,path=sub,security_model=none -device virtio-9p-pci,fsdev=f,mount_tag=t",
    )
    .says(&["9p"]),
    row("Xen", "`-xen-attach`"),
    row("`-snapshot`", "`-snapshot`"),
    row("`snapshot=on`", "`snapshot=on`"),
    run("`snapshot=on`", "-drive file=data.raw,format=raw,if=none,id=d -set drive.d.snapshot=on").says(&["snapshot=on"]),
    row("images that are neither qcow2 nor raw", "`format=vmdk`"),
    row("network disks", "network disk `nbd:`"),
    row("network disks", "network disk `rbd:`"),
    row("`data-file`", "qcow2 with an external data file"),
    row("quorum", "quorum"),
    run("blkdebug", "-blockdev driver=blkdebug,node-name=b,image=x").says(&["blkdebug"]),
    run("blkdebug", "-drive file=blkdebug::data.raw,format=raw,if=none").says(&["blkdebug"]),
    row("null and other test drivers", "null driver"),
    row("`offset=` and `size=` of a raw node", "part of a raw image (`offset=`, `size=`)"),
    run("`offset=` and `size=` of a raw node", "-drive file=data.raw,format=raw,if=none,size=65536").says(&["size=65536"]),
    run(
        "`offset=` and `size=` of a raw node",
        r#"-drive if=none,file=json:{"driver":"raw",,"offset":512,,"file":{"driver":"file",,"filename":"data.raw"}}"#,
    )
    .says(&["offset=512"]),
    row("`-global migration.*`", "`-global migration.…`"),
    run("machine types up to 2.3", "-machine pc-i440fx-2.3").says(&["pc-i440fx-2.3", "QEMU 2.3"]).before(9),
    row("`-icount rr=`", "`-icount rr=`"),
    row("`-add-fd` and descriptors (in `run`)", "`-add-fd`"),
    row("`-add-fd` and descriptors (in `run`)", "`-netdev tap,fd=`"),
    run("`-add-fd` and descriptors (in `run`)", "-chardev fd,id=c,fd=3").says(&["fd=3", "descriptor"]),
    row("options that the table of `qemu-cmdline` lacks", "option that no QEMU from 7.2 to 11.1 has"),
    row("unknown keys whose value could be a file", "unknown key whose value could be a file"),
];

const DISKS: &[Case] = &[
    attach(
        "one file behind two disks (one of them writes)",
        "-drive file=data.raw,format=raw,if=none,id=one -device virtio-blk-pci,drive=one -blockdev \
         driver=raw,node-name=two,read-only=on,file.driver=file,file.filename=data.raw,file.locking=off -device \
         virtio-blk-pci,drive=two",
    )
    .says(&["data.raw", "an image of its own"]),
    test("one image as two disks (one of them writes)", "image_that_two_disks_have_is_one_disk_or_refused"),
    row("raw image with `offset` or `size` (a part of a file)", "part of a raw image (`offset=`, `size=`)"),
    test("a backing file with `offset` or `size`", "block_options_that_cannot_come_back_are_refused_by_name"),
    row("qcow2 with an external data file", "qcow2 with an external data file"),
    test("qcow2 with an external data file", "block_options_that_cannot_come_back_are_refused_by_name"),
    row("`luks` and encrypted qcow2", "`format=luks`"),
    test("`luks` and encrypted qcow2", "block_options_that_cannot_come_back_are_refused_by_name"),
    row("vmdk", "`format=vmdk`"),
    row("vdi", "`format=vdi`"),
    row("vhdx", "`format=vhdx`"),
    run("vpc", "-drive file=x,if=none,format=vpc").says(&["vpc", "convert"]),
    run("qed", "-drive file=x,if=none,format=qed").says(&["qed", "convert"]),
    run("qcow", "-drive file=x,if=none,format=qcow").says(&["format=qcow ", "convert"]),
    run("parallels", "-drive file=x,if=none,format=parallels").says(&["parallels", "convert"]),
    run("dmg", "-drive file=x,if=none,format=dmg").says(&["dmg", "convert"]),
    run("bochs", "-drive file=x,if=none,format=bochs").says(&["bochs", "convert"]),
    run("cloop", "-drive file=x,if=none,format=cloop").says(&["cloop", "convert"]),
    row("quorum", "quorum"),
    run("replication", "-drive driver=replication,mode=primary,file.filename=x,if=none").says(&["replication"]),
    run("blkdebug", "-blockdev driver=blkdebug,node-name=b,image=x").says(&["blkdebug"]),
    run("blkverify", "-blockdev driver=blkverify,node-name=b,test=x,raw=y").says(&["blkverify"]),
    run("blklogwrites", "-blockdev driver=blklogwrites,node-name=b,file=x,log=y").says(&["blklogwrites"]),
    run("blkreplay", "-blockdev driver=blkreplay,node-name=b,image=x").says(&["blkreplay"]),
    row("null", "null driver"),
    test("null", "block_options_that_cannot_come_back_are_refused_by_name"),
    run("`preallocate`", "-blockdev driver=preallocate,node-name=p,file=x").says(&["preallocate"]),
    attach("`preallocate`", "-blockdev driver=preallocate,node-name=p,file.driver=file,file.filename=data.raw").says(&["preallocate"]),
    run("`compress`", "-blockdev driver=compress,node-name=c,file=x").says(&["compress"]),
    attach(
        "a filter inside a backing chain",
        "-object throttle-group,id=g -blockdev driver=throttle,node-name=t,throttle-group=g,read-only=on,file.driver=raw,\
         file.read-only=on,file.file.driver=file,file.file.filename=base.raw -blockdev \
         driver=qcow2,node-name=top,file.driver=file,file.filename=cow.qcow2,backing=t -device virtio-blk-pci,drive=top",
    )
    .says(&["throttle", "above the disk"]),
    row("nbd", "network disk `nbd:`"),
    run("iscsi", "-drive file=iscsi://h/x/0,format=raw,if=none").says(&["iscsi"]),
    row("rbd", "network disk `rbd:`"),
    run("ssh", "-drive file=ssh://h/x,format=raw,if=none").says(&["ssh"]),
    run("nfs", "-drive file=nfs://h/x,format=raw,if=none").says(&["nfs"]),
    run("http", "-drive file=http://h/x,format=raw,if=none").says(&["http"]),
    run("gluster", "-drive file=gluster://h/v/x,format=raw,if=none").says(&["gluster"]),
    row("vvfat", "directory as a disk (`fat:`)"),
    run("`host_cdrom`", "-drive file=/dev/cdrom,driver=host_cdrom,if=none").says(&["host_cdrom"]),
    run("nvme and vhost drivers", "-drive file=nvme://0000:01:00.0/1,format=raw,if=none").says(&["nvme"]),
    run("nvme and vhost drivers", "-blockdev driver=virtio-blk-vhost-vdpa,node-name=n,path=/dev/x").says(&["vhost-vdpa"]),
    row("`snapshot=on`", "`snapshot=on`"),
    row("`-snapshot`", "`-snapshot`"),
    case("a block job (stream, commit, mirror, backup)", MIRROR_AND_ATTACH).says(&["mirror", "block-job-cancel"]),
    case("a block job (stream, commit, mirror, backup)", STREAM_AND_CHECKPOINT).says(&["stream", "block-job-cancel"]),
    row(
        "a disk that was moved to another file at run time (snapshot, mirror)",
        "disk moved to another file since the start (`blockdev-snapshot-sync`)",
    ),
    test("a read-only disk or backing file on a block device (no change of it can be seen)", "block_device_is_a_disk_and_no_layer"),
    special("a layer or medium whose file was renamed (though another one took its name)", special::layer_replaced).says(&["was replaced"]),
    special("a layer or medium whose file was renamed (though another one took its name)", special::layer_renamed)
        .says(&["base.raw", "put the file back where it was"]),
];

const MIRROR_AND_ATTACH: Way = Way::Attach {
    words: "-drive file=data.raw,format=raw,if=none,id=d -device virtio-blk-pci,drive=d",
    early: &[(
        "drive-mirror",
        r#"{"device":"d","target":"target.raw","format":"raw","sync":"full","speed":1}"#,
    )],
};
const STREAM_AND_CHECKPOINT: Way = Way::Checkpoint {
    words: "-drive file=cow.qcow2,format=qcow2,if=none,id=d -device virtio-blk-pci,drive=d",
    acts: &[("block-stream", r#"{"device":"d","speed":1}"#)],
};
