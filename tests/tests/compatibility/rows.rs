//! The rows of docs/compatibility.md.

use stillpoint_tests::torture::Mode;

/// One option or state.
pub(crate) struct Row {
    pub item: &'static str,
    pub kind: Kind,
    /// Arguments of QEMU.
    pub words: &'static str,
    /// QMP commands and their arguments after the start.
    pub acts: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Proven by this VM, together with all other rows of it.
    Carried(Vm),
    /// By `run`; as an external VM it is not tried.
    Refused,
    RefusedToBoth,
}

impl Kind {
    /// At least by `run`.
    pub(crate) fn is_refused(self) -> bool {
        match self {
            Self::Carried(vm) => !vm.modes().contains(&Mode::Managed),
            Self::Refused | Self::RefusedToBoth => true,
        }
    }
}

/// The VMs that prove what is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vm {
    Pc,
    Q35,
    Paused,
    Prelaunch,
    OwnMemory,
    Nodes,
}

impl Vm {
    pub(crate) const ALL: &[Self] =
        &[Self::Pc, Self::Q35, Self::Paused, Self::Prelaunch, Self::OwnMemory, Self::Nodes];

    pub(crate) fn board(self) -> &'static str {
        match self {
            Self::Q35 | Self::Prelaunch => "-machine q35",
            _ => "-machine pc",
        }
    }

    /// Memory of its own is for external VMs.
    pub(crate) fn modes(self) -> &'static [Mode] {
        match self {
            Self::OwnMemory | Self::Nodes => &[Mode::External],
            _ => &[Mode::Managed, Mode::External],
        }
    }
}

const fn carried(vm: Vm, item: &'static str, words: &'static str) -> Row {
    Row { item, kind: Kind::Carried(vm), words, acts: &[] }
}

const fn refused(item: &'static str, words: &'static str) -> Row {
    Row { item, kind: Kind::Refused, words, acts: &[] }
}

const fn refused_to_both(item: &'static str, words: &'static str) -> Row {
    Row { item, kind: Kind::RefusedToBoth, words, acts: &[] }
}

impl Row {
    const fn after(self, acts: &'static [(&'static str, &'static str)]) -> Self {
        Self { acts, ..self }
    }
}

pub(crate) const ROWS: &[(&str, &[Row])] = &[
    ("States", STATES),
    ("Board, processor and memory", BOARD),
    ("Disks", DISKS),
    ("Removable media", MEDIA),
    ("Network", NETWORK),
    ("Other devices", DEVICES),
    ("Character devices", CHARACTER),
    ("Firmware and boot", FIRMWARE),
    ("QEMU's process", PROCESS),
];

const STATES: &[Row] = &[
    carried(Vm::Pc, "running", ""),
    carried(Vm::Paused, "paused by its owner (QMP `stop`)", "").after(&[("stop", "{}")]),
    carried(Vm::Prelaunch, "never started (`-S`)", "-S"),
    refused_to_both("device plugged in since the start (`device_add`)", "")
        .after(&[("device_add", r#"{"driver":"virtio-rng-pci","id":"late"}"#)]),
    refused_to_both(
        "disk moved to another file since the start (`blockdev-snapshot-sync`)",
        "-drive file=new.qcow2,format=qcow2,if=none,id=d -device virtio-blk-pci,drive=d",
    )
    .after(&[(
        "blockdev-snapshot-sync",
        r#"{"device":"d","snapshot-file":"over.qcow2","format":"qcow2"}"#,
    )]),
];

const BOARD: &[Row] = &[
    carried(Vm::Pc, "`-machine pc`", ""),
    carried(Vm::Q35, "`-machine q35`", ""),
    refused("`-machine none`", "-machine none"),
    carried(Vm::Pc, "`-machine vmport=off,hpet=off`", "-machine vmport=off,hpet=off"),
    refused("`-machine confidential-guest-support=`", "-machine confidential-guest-support=sev"),
    refused("`-object sev-guest`", "-object sev-guest,id=sev"),
    refused("`-object tdx-guest`", "-object tdx-guest,id=tdx"),
    carried(Vm::Pc, "`-smp 2`", "-smp 2"),
    carried(Vm::Q35, "`-smp sockets=,cores=,threads=`", "-smp 4,sockets=1,cores=2,threads=2"),
    carried(Vm::Pc, "`-cpu MODEL,+FLAG`", "-cpu qemu64,+x2apic"),
    carried(Vm::Q35, "`-cpu max`", "-cpu max"),
    carried(Vm::Pc, "`-accel tcg,thread=single`", "-accel tcg,thread=single"),
    carried(Vm::Pc, "`-m 16M`", "-m 16M"),
    carried(Vm::Q35, "`-m SIZE,slots=,maxmem=`, no module plugged in", "-m 16,slots=2,maxmem=64M"),
    carried(
        Vm::OwnMemory,
        "`-machine memory-backend=`",
        "-object memory-backend-ram,id=mem,size=16M -machine memory-backend=mem",
    ),
    carried(
        Vm::Nodes,
        "one `-numa node,memdev=`",
        "-numa node,memdev=all -object memory-backend-ram,id=all,size=16M",
    ),
    refused_to_both(
        "RAM of several memory objects (NUMA nodes)",
        "-object memory-backend-ram,id=a,size=8M -object memory-backend-ram,id=b,size=8M \
         -numa node,memdev=a -numa node,memdev=b",
    ),
    refused("`-mem-path`", "-mem-path ."),
    refused_to_both(
        "memory module (`pc-dimm`)",
        "-m 16,slots=1,maxmem=64M -object memory-backend-ram,id=dimm,size=16M -device \
         pc-dimm,memdev=dimm",
    ),
    refused("`nvdimm`", "-device nvdimm,memdev=n"),
    refused("`virtio-mem-pci`", "-device virtio-mem-pci,memdev=m"),
    refused("`virtio-pmem-pci`", "-device virtio-pmem-pci,memdev=m"),
    carried(Vm::Pc, "`-rtc base=utc,clock=vm`", "-rtc base=utc,clock=vm"),
    carried(Vm::Q35, "`-rtc base=localtime`", "-rtc base=localtime"),
    refused("`-icount rr=`", "-icount shift=auto,rr=record,rrfile=rr.bin"),
    carried(Vm::Pc, "`-global DRIVER.PROPERTY=`", "-global PIIX4_PM.disable_s3=1"),
    refused("`-global migration.…`", "-global migration.send-configuration=off"),
];

const DISKS: &[Row] = &[
    carried(
        Vm::Pc,
        "`-drive` with `format=qcow2,if=virtio`",
        "-drive file=new.qcow2,format=qcow2,if=virtio",
    ),
    carried(
        Vm::Pc,
        "`-drive` with `format=raw`, also of a size that is no multiple of 4 KiB",
        "-drive file=odd.raw,format=raw,if=none,id=odd -device virtio-blk-pci,drive=odd",
    ),
    carried(Vm::Pc, "`-hdc FILE`, format probed", "-hdc disk"),
    carried(
        Vm::Pc,
        "qcow2 on qcow2 on raw (a backing chain)",
        "-drive file=deep.qcow2,format=qcow2,if=virtio",
    ),
    carried(Vm::Pc, "comma in the image's path", "-drive file=c,,omma.raw,format=raw,if=virtio"),
    carried(
        Vm::Pc,
        "`cache=`, `discard=`, `detect-zeroes=`, `werror=`, `rerror=`",
        "-drive file=qcow2,format=qcow2,if=virtio,cache=writeback,discard=unmap,detect-zeroes=unmap,\
         werror=stop,rerror=report",
    ),
    carried(
        Vm::Pc,
        "`throttling.*` of `-drive`",
        "-drive file=data.raw,format=raw,if=virtio,throttling.iops-total=5000",
    ),
    carried(
        Vm::Q35,
        "`-blockdev` as JSON",
        r#"-blockdev {"driver":"qcow2","node-name":"j","file":{"driver":"file","filename":"new.qcow2"}} -device virtio-blk-pci,drive=j"#,
    ),
    carried(
        Vm::Q35,
        "`-blockdev` in dotted keys, a node that no device uses",
        "-blockdev driver=qcow2,node-name=spare,file.driver=file,file.filename=qcow2",
    ),
    carried(
        Vm::Q35,
        "`readonly=on`",
        "-drive file=other.raw,format=raw,readonly=on,if=none,id=ro -device \
         virtio-blk-pci,drive=ro",
    ),
    carried(
        Vm::Q35,
        "throttle filter",
        "-object throttle-group,id=tg,x-iops-total=1000 -blockdev driver=throttle,node-name=t,\
         throttle-group=tg,file.driver=raw,file.file.driver=file,file.file.filename=data.raw \
         -device virtio-blk-pci,drive=t",
    ),
    carried(
        Vm::Q35,
        "copy-on-read filter",
        "-blockdev driver=copy-on-read,node-name=cor,file.driver=qcow2,file.file.driver=file,\
         file.file.filename=cow.qcow2 -device virtio-blk-pci,drive=cor",
    ),
    carried(
        Vm::Q35,
        "`ide-hd` on AHCI",
        "-device ich9-ahci,id=ahci -drive file=disk,format=raw,if=none,id=sata -device \
         ide-hd,drive=sata,bus=ahci.0",
    ),
    carried(
        Vm::Q35,
        "`scsi-hd` on `virtio-scsi-pci`",
        "-device virtio-scsi-pci,id=vs -drive file=odd.raw,format=raw,if=none,id=s0 -device \
         scsi-hd,drive=s0,bus=vs.0",
    ),
    carried(
        Vm::Paused,
        "`scsi-hd` on `lsi53c895a`",
        "-device lsi53c895a,id=lsi -drive file=odd.raw,format=raw,if=none,id=s0 -device \
         scsi-hd,drive=s0,bus=lsi.0",
    ),
    carried(
        Vm::Paused,
        "`usb-storage`",
        "-device qemu-xhci,id=xhci -drive file=new.qcow2,format=qcow2,if=none,id=stick \
         -device usb-storage,drive=stick,bus=xhci.0",
    ),
    refused_to_both("`snapshot=on`", "-drive file=data.raw,format=raw,if=virtio,snapshot=on"),
    refused_to_both("`-snapshot`", "-snapshot"),
    refused_to_both(
        "part of a raw image (`offset=`, `size=`)",
        "-blockdev driver=raw,node-name=n,offset=65536,file.driver=file,file.filename=data.raw",
    ),
    refused(
        "qcow2 with an external data file",
        "-drive file=a,if=virtio,format=qcow2,data-file.filename=b",
    ),
    refused("`format=luks`", "-drive file=a,if=virtio,format=luks"),
    refused("`format=vmdk`", "-drive file=a,if=virtio,format=vmdk"),
    refused("`format=vdi`", "-drive file=a,if=virtio,format=vdi"),
    refused("`format=vhdx`", "-drive file=a,if=virtio,format=vhdx"),
    refused("network disk `nbd:`", "-drive file=nbd:localhost:1,if=virtio,format=raw"),
    refused("network disk `rbd:`", "-drive file=rbd:pool/image,if=virtio,format=raw"),
    refused("directory as a disk (`fat:`)", "-drive file=fat:rw:sub,format=raw,if=virtio"),
    refused(
        "quorum",
        "-blockdev driver=quorum,node-name=q,vote-threshold=1,children.0=a,children.1=b",
    ),
    refused_to_both("null driver", "-blockdev driver=null-co,node-name=n,size=1048576"),
    refused_to_both(
        "`nvme`",
        "-drive file=data.raw,format=raw,if=none,id=n -device nvme,serial=1,drive=n",
    ),
    refused("`scsi-block`", "-device scsi-block,drive=d"),
    refused("`vhost-user-blk-pci`", "-device vhost-user-blk-pci,chardev=c"),
];

const MEDIA: &[Row] = &[
    carried(
        Vm::Pc,
        "CD drive with a medium",
        "-drive file=x.iso,media=cdrom,if=none,id=cd -device ide-cd,drive=cd,bus=ide.0",
    ),
    carried(Vm::Pc, "floppy drive with a medium", "-drive file=floppy.img,format=raw,if=floppy"),
    carried(
        Vm::Q35,
        "CD drive without a medium",
        "-drive if=none,id=empty,media=cdrom -device scsi-cd,drive=empty,bus=vs.0",
    ),
    carried(
        Vm::Q35,
        "medium ejected since the start",
        "-drive file=x.iso,media=cdrom,if=none,id=cd -device ide-cd,drive=cd,id=cd0,bus=ide.2",
    )
    .after(&[("eject", r#"{"id":"cd0","force":true}"#)]),
    carried(
        Vm::Paused,
        "medium changed since the start",
        "-drive file=x.iso,media=cdrom,if=none,id=cd -device ide-cd,drive=cd,id=cd0,bus=ide.1",
    )
    .after(&[(
        "blockdev-change-medium",
        r#"{"id":"cd0","filename":"sub/y.iso","format":"raw","force":true}"#,
    )]),
];

const NETWORK: &[Row] = &[
    carried(
        Vm::Pc,
        "`virtio-net-pci` on `-netdev user` with `hostfwd=`",
        "-netdev user,id=n1,hostfwd=tcp::0-:22 -device virtio-net-pci,netdev=n1",
    ),
    carried(Vm::Pc, "`e1000`", "-netdev user,id=n2 -device e1000,netdev=n2"),
    carried(Vm::Pc, "`-nic user,model=rtl8139`", "-nic user,model=rtl8139"),
    carried(Vm::Q35, "`e1000e`", "-netdev user,id=n3,restrict=on -device e1000e,netdev=n3"),
    carried(Vm::Q35, "`vmxnet3`", "-netdev user,id=n4 -device vmxnet3,netdev=n4"),
    carried(
        Vm::Paused,
        "`pcnet` on `-netdev hubport`",
        "-netdev hubport,id=n5,hubid=1 -device pcnet,netdev=n5",
    ),
    carried(Vm::Paused, "`-nic none`", "-nic none"),
    refused_to_both(
        "failover pair (`failover=`, `failover_pair_id=`)",
        "-netdev user,id=f -device virtio-net-pci,netdev=f,failover=on",
    ),
    refused("`-netdev vhost-user`", "-chardev null,id=c -netdev vhost-user,id=n,chardev=c"),
    refused("`-netdev vhost-vdpa`", "-netdev vhost-vdpa,id=n"),
    refused("`-netdev tap,fd=`", "-netdev tap,id=n,fd=3"),
    refused("`usb-net`", "-device usb-net"),
];

const DEVICES: &[Row] = &[
    carried(Vm::Pc, "`-vga std`", "-vga std"),
    carried(Vm::Q35, "`virtio-vga`", "-device virtio-vga"),
    carried(Vm::Paused, "`-vga cirrus`", "-vga cirrus"),
    carried(Vm::Paused, "`-vnc unix:`", "-vnc unix:vnc.sock"),
    carried(
        Vm::Pc,
        "USB tablet and keyboard on `qemu-xhci`",
        "-device qemu-xhci -device usb-tablet -device usb-kbd",
    ),
    carried(Vm::Paused, "`-usb`, `-usbdevice tablet`", "-usb -usbdevice tablet"),
    carried(
        Vm::Q35,
        "EHCI and UHCI with a mouse",
        "-device ich9-usb-ehci1,id=u -device ich9-usb-uhci1,masterbus=u.0,firstport=0 -device \
         usb-mouse",
    ),
    carried(
        Vm::Pc,
        "`intel-hda` with `hda-duplex`",
        "-audiodev none,id=snd -device intel-hda -device hda-duplex,audiodev=snd",
    ),
    carried(Vm::Paused, "`AC97`", "-audiodev none,id=snd -device AC97,audiodev=snd"),
    carried(Vm::Pc, "`virtio-rng-pci`", "-device virtio-rng-pci"),
    carried(
        Vm::Q35,
        "`virtio-rng-pci` with `rng-random`",
        "-object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng",
    ),
    carried(Vm::Pc, "`virtio-balloon-pci`", "-device virtio-balloon-pci"),
    carried(
        Vm::Q35,
        "`virtio-balloon-pci,free-page-reporting=on`",
        "-device virtio-balloon-pci,free-page-reporting=on",
    ),
    refused(
        "`virtio-balloon-pci,free-page-hint=on`",
        "-device virtio-balloon-pci,free-page-hint=on",
    ),
    carried(
        Vm::Q35,
        "`virtio-keyboard-pci`, `virtio-tablet-pci`",
        "-device virtio-keyboard-pci -device virtio-tablet-pci",
    ),
    carried(Vm::Pc, "`i6300esb` watchdog", "-device i6300esb"),
    carried(Vm::Pc, "`pvpanic`", "-device pvpanic"),
    carried(Vm::Paused, "`vmgenid`", "-device vmgenid,guid=8d1e2e5c-0000-4000-8000-00000000000b"),
    carried(Vm::Q35, "`intel-iommu`", "-device intel-iommu"),
    carried(
        Vm::Q35,
        "`pcie-root-port` with a device",
        "-device pcie-root-port,id=rp1,chassis=1,slot=1 -device virtio-rng-pci,bus=rp1",
    ),
    carried(
        Vm::Paused,
        "`pci-bridge` with a device",
        "-device pci-bridge,id=br,chassis_nr=2 -device e1000,bus=br,addr=2",
    ),
    Row {
        item: "9p share (`-virtfs`), not mounted",
        kind: Kind::Carried(Vm::OwnMemory),
        words: "-virtfs local,path=sub,mount_tag=share,security_model=none",
        acts: &[],
    },
    refused("`vfio-pci`", "-device vfio-pci,host=00:01.0"),
    refused("`vhost-user-fs-pci`", "-chardev null,id=c -device vhost-user-fs-pci,chardev=c,tag=t"),
    refused_to_both(
        "`ivshmem-plain`",
        "-object memory-backend-ram,id=iv,size=1M,share=on -device ivshmem-plain,memdev=iv",
    ),
    refused_to_both("`usb-uas`", "-device qemu-xhci -device usb-uas"),
    refused("`usb-mtp`", "-device usb-mtp,rootdir=sub"),
    refused("`usb-audio`", "-device usb-audio"),
    refused("`usb-serial`", "-device usb-serial"),
    refused("`usb-braille`", "-device usb-braille"),
    refused("`usb-wacom-tablet`", "-device usb-wacom-tablet"),
    refused("`virtio-sound-pci`", "-device virtio-sound-pci"),
    refused("`virtio-input-host-pci`", "-device virtio-input-host-pci"),
    refused("`rocker`", "-device rocker"),
    refused("`hv-syndbg`", "-device hv-syndbg"),
    refused("`amd-iommu`", "-device amd-iommu"),
    refused(
        "`virtio-crypto-pci`",
        "-object cryptodev-backend-builtin,id=c -device virtio-crypto-pci,cryptodev=c",
    ),
    refused_to_both("`isa-vga`", "-device isa-vga"),
    refused("`isa-cirrus-vga`", "-device isa-cirrus-vga"),
    refused_to_both("`ati-vga`", "-device ati-vga"),
    refused("`adlib`", "-audiodev none,id=snd -device adlib,audiodev=snd"),
    refused("`-audio model=adlib`", "-audio none,model=adlib"),
    refused("`cxl-rp`", "-device cxl-rp,id=rp1"),
    refused("`vmbus-bridge`", "-device vmbus-bridge"),
    refused("`pci-serial-2x`", "-device pci-serial-2x"),
    refused_to_both("`loader,data=`", "-device loader,addr=0x8000,data=0x1,data-len=4"),
];

const CHARACTER: &[Row] = &[
    carried(Vm::Pc, "`-serial file:`", "-serial file:serial.log"),
    carried(Vm::Q35, "`-serial unix:…,server=on`", "-serial unix:serial.sock,server=on,wait=off"),
    carried(Vm::Paused, "`-serial null`, `-parallel null`", "-serial null -parallel null"),
    carried(
        Vm::Pc,
        "guest agent's port (`virtserialport` on a socket)",
        "-device virtio-serial-pci,id=vser -chardev socket,id=ga,path=agent.sock,server=on,wait=off \
         -device virtserialport,bus=vser.0,chardev=ga,name=org.qemu.guest_agent.0",
    ),
    carried(
        Vm::Q35,
        "`pci-serial`",
        "-chardev ringbuf,id=ring,size=4096 -device pci-serial,chardev=ring",
    ),
    carried(Vm::Paused, "`-debugcon file:`", "-debugcon file:debug.log"),
];

const FIRMWARE: &[Row] = &[
    carried(Vm::Pc, "`-smbios type=1,…`", "-smbios type=1,manufacturer=Acme,serial=1"),
    carried(Vm::Pc, "`-fw_cfg name=,string=`", "-fw_cfg name=opt/x/a,string=b"),
    carried(Vm::Paused, "`-fw_cfg name=,file=`", "-fw_cfg name=opt/x/c,file=blob.bin"),
    carried(Vm::Paused, "`-acpitable`", "-acpitable sig=TEST,data=blob.bin"),
    carried(Vm::Pc, "`-boot order=,menu=`", "-boot order=c,menu=on"),
    carried(Vm::Paused, "`-option-rom`", "-option-rom blob.bin"),
];

const PROCESS: &[Row] = &[
    carried(Vm::Pc, "`-name`, `-uuid`", "-name guest -uuid 8d1e2e5c-0000-4000-8000-00000000000a"),
    carried(Vm::Pc, "`-pidfile`", "-pidfile vm.pid"),
    carried(Vm::Q35, "`-no-user-config`, `-msg timestamp=on`", "-no-user-config -msg timestamp=on"),
    carried(Vm::Paused, "`-readconfig`", "-readconfig vm.cfg"),
    carried(Vm::Paused, "`-object secret`", "-object secret,id=key,data=abc"),
    carried(Vm::Q35, "`-action`, `-no-shutdown`", "-action reboot=shutdown -no-shutdown"),
    carried(
        Vm::Pc,
        "`-sandbox on`",
        "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ),
    refused("`-incoming`", "-incoming defer"),
    refused("`-preconfig`", "-preconfig"),
    refused("`-add-fd`", "-add-fd fd=3,set=1"),
    refused("`-xen-attach`", "-xen-attach"),
    refused("`-object x-remote-object`", "-object x-remote-object,id=r,fd=3,devid=d"),
    refused("option that no QEMU from 7.2 to 11.1 has", "-newoption x"),
    refused("unknown key whose value could be a file", "-device e1000,newfile=/x"),
];
