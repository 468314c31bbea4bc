//! What a VM must not have so that it can be checkpointed, adopted or restored: one table of the
//! devices, options and disks, each row with the reason, the remedy and the commands that refuse
//! it.
//!
//! The tracker sees every write that goes through QEMU's own mapping of guest RAM: vCPUs, emulated
//! devices, vhost in the kernel. It does not see a process or a piece of hardware that writes
//! through a mapping of its own. QEMU's migration stream does not ask whose memory it is, so an
//! external VM may have what a managed VM may not; what no engine can save is refused to both.
//! An adoption has one thing more against it: two processes that have the same host resource.
//!
//! The rows are found on a command line by [`crate::unsupported`].

use super::BLOCK_DRIVERS;
use super::devices::matches;
use Command::{Adopt, Attach, Checkpoint, Restore, Run};
use Value::{Any, Is, Not, Off, On};
use What::{Descriptors, Devices, Disks, Key, Objects, Options, Property, Several};

/// Who refuses a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `run`, on the command line of the new VM.
    Run,
    /// `attach --qmp` and `doctor --qmp`, on the command line of an external VM.
    Attach,
    /// `checkpoint`, `adopt` and `doctor --qmp`, among the devices of the running VM.
    Checkpoint,
    /// `adopt`, on the command line of an attached VM.
    Adopt,
    /// `restore` and `verify --restore`, on the saved command line, until `--allow` or `--map`
    /// names it.
    Restore,
}

/// How a row is found. A name that ends in `*` stands for all that begin so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Options, whatever their value.
    Options(&'static [&'static str]),
    /// Device models: of `-device` and the options that stand for one, and QOM types.
    Devices(&'static [&'static str]),
    /// Types of `-object`.
    Objects(&'static [&'static str]),
    /// A key of these options; an empty one is the first word.
    Key(&'static [&'static str], &'static str, Value),
    /// A property of a device model, set by `-device` or `-global`.
    Property(&'static str, &'static str, Value),
    /// A key at any depth of `-drive` or `-blockdev`; `protocol` is that of any disk's file.
    Disks(&'static str, Value),
    /// A file descriptor of the process, wherever one is named.
    Descriptors,
    /// More than one of a device model, or of user networks, in a QEMU that saves the state of all
    /// under one name.
    Several(&'static str),
}

/// The values of a key that are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// All.
    Any,
    /// A switch that is on.
    On,
    /// A switch that is off or absent.
    Off,
    /// This one.
    Is(&'static str),
    /// All others; an absent key is empty.
    Not(&'static [&'static str]),
}

/// One thing that is refused. Without a reason, a remedy or a command it does not compile.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    what: &'static [What],
    by: &'static [Command],
    reason: &'static str,
    remedy: &'static str,
}

impl Row {
    const fn new(
        by: &'static [Command],
        what: &'static [What],
        reason: &'static str,
        remedy: &'static str,
    ) -> Self {
        assert!(!by.is_empty() && !what.is_empty(), "a row that is never refused");
        assert!(!reason.is_empty() && !remedy.is_empty(), "a row without reason or remedy");
        Self { what, by, reason, remedy }
    }

    /// What it is about: any of these.
    pub fn what(&self) -> &'static [What] {
        self.what
    }

    /// Why it is refused.
    pub fn reason(&self) -> &'static str {
        self.reason
    }

    /// What to do instead.
    pub fn remedy(&self) -> &'static str {
        self.remedy
    }

    /// Whether `command` refuses it.
    pub fn is_refused_by(&self, command: Command) -> bool {
        self.by.contains(&command)
    }
}

/// The row of a device model that `command` refuses.
pub fn device(model: &str, command: Command) -> Option<&'static Row> {
    let is_it = |what: &What| matches!(what, Devices(names) if matches(names, model));
    ROWS.iter().find(|row| row.is_refused_by(command) && row.what.iter().any(is_it))
}

const ALL: &[Command] = &[Run, Attach, Checkpoint, Adopt, Restore];
/// Devices that no engine can save.
const NO_ENGINE: &[Command] = &[Run, Attach, Checkpoint, Adopt];
/// The same of what is on a command line alone.
const LINE: &[Command] = &[Run, Attach, Adopt];

const BOARD: &[&str] = &["machine", "M"];
const NETWORK: &[&str] = &["netdev", "nic", "net"];

const OWN_RAM: &str = "it gives the guest RAM of its own, which the tracker does not map";
const LEAVE_MEMORY: &str =
    "leave it out: Stillpoint gives the VM sealed shared memory of the size of -m";
const ENCRYPTED: &str = "encrypted guest memory cannot be read by the helper";
const NOTHING_SAVED: &str = "QEMU saves nothing of its state and does not say so";
const WRONG_MEMORY: &str = "QEMU saves other memory of its process in place of this card's \
    registers, and may crash when it loads that";
const ABORTS: &str = "QEMU aborts, guest and all, when it saves this device's state";
const DAEMON: &str = "a vhost-user daemon writes guest RAM through a mapping of its own";
const DMA: &str = "its hardware writes guest RAM by DMA, past the page tables";
/// Of whom a restored VM's files and sockets are.
pub(crate) const OTHER_USER: &str =
    "a restored VM's files and sockets are open to the user of the restore alone";
const OLD_PEER: &str = "the other end of its connection knows the old process only";
const ONE_PROCESS: &str = "one process alone can have it";
const OLD_SCREEN: &str = "its window, terminal or port belongs to the old process";
const LEAVE_OUT: &str = "leave it out";
const WITHOUT: &str = "start the VM without it";
const NO_DISPLAY: &str = "start the VM with -display none or -vnc none";
const PORTS: &str = "use pcie-root-port and devices on it";
const OVERLAY: &str = "make an overlay: qemu-img create -f qcow2 -b BASE -F qcow2 OVERLAY";
const VANISHES: &str = "it writes to a disk that vanishes with QEMU";
const CONVERT: &str = "convert it by qemu-img into a qcow2 or raw image";
const FAILOVER: &str = "QEMU takes the primary device of a failover pair from the guest at each \
    migration, and has it again only when the guest's driver asks for it";

/// Models of which QEMU says itself that they are not migratable (`-only-migratable`), 7.2 and
/// 10.0 alike; a test asks it again.
pub const UNMIGRATABLE: &[&str] = &[
    "amd-iommu",
    "nvme",
    "rocker",
    "hv-syndbg",
    "usb-audio",
    "usb-braille",
    "usb-mtp",
    "usb-net",
    "usb-serial",
    "usb-uas",
    "usb-wacom-tablet",
    "virtio-crypto-pci",
    "virtio-input-host-pci",
    // Not in 7.2.
    "ufs",
    "virtio-sound-pci",
];

/// All of them; the first row that matches is the one that is reported.
pub const ROWS: &[Row] = &[
    // Memory that no checkpoint has, or that others write.
    Row::new(ALL, &[Devices(&["vhost-user*"])], DAEMON, "use the virtio device that QEMU emulates"),
    Row::new(
        ALL,
        &[Devices(&["vfio*", "vhost-vdpa*"])],
        DMA,
        "use an emulated device or vhost-net",
    ),
    Row::new(
        LINE,
        &[Key(&["netdev", "nic"], "type", Is("vhost-user"))],
        DAEMON,
        "use tap, user or bridge",
    ),
    Row::new(
        LINE,
        &[Key(&["netdev", "nic"], "type", Is("vhost-vdpa"))],
        DMA,
        "use tap, user or bridge",
    ),
    Row::new(
        NO_ENGINE,
        &[Devices(&["virtio-mem*", "pc-dimm"])],
        "a checkpoint knows one memory, the VM's own",
        "give the VM all of its memory by -m",
    ),
    Row::new(
        NO_ENGINE,
        &[Devices(&["virtio-pmem*", "nvdimm"])],
        "it maps a file that is no part of the checkpoint",
        "use a virtio-blk disk",
    ),
    Row::new(
        NO_ENGINE,
        &[Devices(&["ivshmem*"])],
        "other processes write its shared memory",
        "use a virtio-serial or network device",
    ),
    Row::new(
        LINE,
        &[
            Objects(&["sev-guest*", "sev-snp-guest*", "tdx-guest*"]),
            Key(BOARD, "confidential-guest-support", Any),
            Key(BOARD, "memory-encryption", Any),
        ],
        ENCRYPTED,
        "run the guest without it",
    ),
    Row::new(
        LINE,
        &[Objects(&["memory-backend-epc"])],
        "SGX memory cannot be read by the host",
        "run the guest without it",
    ),
    Row::new(LINE, &[Options(&["xen-attach"])], "Xen owns the guest's memory", "use KVM or TCG"),
    Row::new(
        &[Run],
        &[Options(&["mem-path"]), Key(BOARD, "memory-backend", Any)],
        OWN_RAM,
        LEAVE_MEMORY,
    ),
    Row::new(&[Run, Adopt], &[Objects(&["memory-backend-*"])], OWN_RAM, LEAVE_MEMORY),
    Row::new(
        &[Run],
        &[Key(&["numa"], "memdev", Any)],
        OWN_RAM,
        "leave -numa out (QEMU takes no node without memdev), or start QEMU without 'stillpoint \
         run' and attach to it by 'stillpoint attach --qmp'",
    ),
    Row::new(
        NO_ENGINE,
        &[Property("virtio-balloon*", "free-page-hint", On)],
        "it keeps pages out of QEMU's migration stream",
        "leave free-page-hint out",
    ),
    Row::new(
        LINE,
        &[Property("loader", "data", Any)],
        "QEMU writes it into the guest's memory whenever it starts, also when it starts for a \
         restore",
        "use -device loader,file=…",
    ),
    // Device state that QEMU does not save, or not so that it could load it.
    Row::new(
        NO_ENGINE,
        &[Devices(UNMIGRATABLE)],
        "QEMU itself cannot save its state",
        "use another device",
    ),
    // Seen with 7.2 and 10.0: an assertion in vmstate_save_state_v.
    Row::new(NO_ENGINE, &[Devices(&["vmbus-bridge"])], ABORTS, "leave VMBus out"),
    Row::new(NO_ENGINE, &[Devices(&["pci-serial-2x"])], ABORTS, "use pci-serial or pci-serial-4x"),
    // Their class describes the registers alone, and QEMU applies that to the device around them.
    Row::new(NO_ENGINE, &[Devices(&["isa-vga"])], WRONG_MEMORY, "use VGA on a PCI VM"),
    Row::new(
        NO_ENGINE,
        &[Devices(&["isa-cirrus-vga"])],
        WRONG_MEMORY,
        "use cirrus-vga on a PCI VM",
    ),
    // `-dump-vmstate` lists none of the following, or the description of a larger device's part.
    Row::new(NO_ENGINE, &[Devices(&["adlib"])], NOTHING_SAVED, "use AC97 or intel-hda"),
    Row::new(NO_ENGINE, &[Devices(&["ati-vga"])], NOTHING_SAVED, "use VGA or virtio-vga"),
    Row::new(ALL, &[Devices(&["ccid-card-emulated"])], NOTHING_SAVED, LEAVE_OUT),
    Row::new(
        NO_ENGINE,
        &[Devices(&[
            "edu",
            "hyperv-testdev",
            "i2c-echo",
            // A guest in the middle of a key's transfer would find the controller in another
            // command and position.
            "isa-applesmc",
            "pc-testdev",
            "pci-testdev",
        ])],
        NOTHING_SAVED,
        LEAVE_OUT,
    ),
    // The `pxb` have no description, and the class of all PCI devices has none that QEMU would take
    // instead: what firmware and guest wrote into their configuration space is lost. The bridges
    // and ports on them are saved.
    Row::new(NO_ENGINE, &[Devices(&["pxb"])], NOTHING_SAVED, "use pci-bridge"),
    Row::new(NO_ENGINE, &[Devices(&["cxl-*", "pxb-cxl", "pxb-pcie"])], NOTHING_SAVED, PORTS),
    // Seen with 10.0: `used_storage` is another number after each load.
    Row::new(
        NO_ENGINE,
        &[Devices(&["uefi-vars-*"])],
        "QEMU counts its used storage wrongly when it loads its state",
        "keep the variables in a pflash drive",
    ),
    Row::new(
        &[Checkpoint],
        &[Property("ramfb", "x-migrate", Off)],
        "QEMU before 8.2, and machine types from before it, save nothing of its state",
        "use VGA, or a newer machine type",
    ),
    // ISA devices have no path that would be part of the name.
    Row::new(
        &[Checkpoint],
        &[
            Several("isa-ide"),
            Several("isa-ipmi-bt"),
            Several("isa-ipmi-kcs"),
            Several(USER_NETWORKS),
        ],
        "QEMU before 8.2 saves the state of all of them under one name, so that only one could be \
         restored",
        "leave one, use another machine type, or a newer QEMU",
    ),
    Row::new(
        ALL,
        &[Devices(&["vhost-*"])],
        "its state is in the kernel of this host",
        "use a device that QEMU emulates, such as virtio-scsi-pci or virtio-serial",
    ),
    Row::new(
        LINE,
        &[Objects(&["x-remote*"])],
        "a process of its own holds the device",
        "use the device that QEMU emulates",
    ),
    Row::new(
        LINE,
        &[Property("*", "failover", On), Property("*", "failover_pair_id", Any)],
        FAILOVER,
        "leave failover and failover_pair_id out",
    ),
    // A restored QEMU would read another form.
    Row::new(
        LINE,
        &[Property("migration", "*", Any)],
        "it changes the form of the saved state",
        LEAVE_OUT,
    ),
    Row::new(
        LINE,
        &[Key(&["icount"], "rr", Any)],
        "it records or replays, and QEMU saves no state of that",
        "leave rr out",
    ),
    Row::new(
        &[Run],
        &[Devices(&["virtio-9p*"])],
        "a mounted 9p share blocks QEMU's migration",
        "use a disk or a network file system",
    ),
    // Disks. What a running QEMU's block graph shows is judged by `qmp_bridge::disks`.
    Row::new(
        NO_ENGINE,
        &[Devices(&["scsi-block", "scsi-generic"])],
        "it sends the guest's writes to the hardware past QEMU's bitmaps",
        "use scsi-hd on the same device",
    ),
    Row::new(LINE, &[Options(&["snapshot"]), Disks("snapshot", On)], VANISHES, OVERLAY),
    Row::new(
        LINE,
        &[
            Disks("driver", Not(BLOCK_DRIVERS)),
            Disks("format", Not(BLOCK_DRIVERS)),
            Disks("protocol", Not(&["host_device"])),
        ],
        "a checkpoint holds no disk of that kind",
        CONVERT,
    ),
    Row::new(
        LINE,
        &[Disks("offset", Not(&["0"])), Disks("size", Not(&["0"]))],
        "it shows a part of a file as the disk",
        "copy that part into an image of its own",
    ),
    Row::new(LINE, &[Disks("data-file", Any)], "the image keeps its data in another file", CONVERT),
    // About the process: a restored or adopted VM is another one.
    Row::new(
        &[Run],
        &[Options(&["incoming"])],
        "it waits for the VM of another QEMU",
        "use 'stillpoint restore', or start the VM without it",
    ),
    Row::new(
        &[Run],
        &[Options(&["preconfig"])],
        "the VM would not exist when the helper attaches",
        LEAVE_OUT,
    ),
    Row::new(
        &[Run, Adopt, Restore],
        &[Options(&["runas"]), Key(&["run-with"], "user", Any)],
        OTHER_USER,
        "start the VM as that user",
    ),
    Row::new(
        &[Run, Adopt],
        &[Descriptors],
        "a descriptor belongs to one process, and no other process has it",
        "name the file or socket instead, or use -netdev bridge",
    ),
    Row::new(
        &[Adopt],
        &[Options(&["chroot", "run-with"])],
        "the new process cannot be set up so",
        WITHOUT,
    ),
    Row::new(
        &[Adopt],
        &[Options(&["xen-domid-restrict"])],
        "Xen owns the guest's memory",
        "use KVM or TCG",
    ),
    Row::new(
        &[Adopt],
        &[
            Options(&["curses", "sdl", "spice"]),
            Key(&["display"], "type", Not(&["none", "egl-headless"])),
            Key(&["vnc"], "", Not(&["none"])),
        ],
        OLD_SCREEN,
        NO_DISPLAY,
    ),
    Row::new(
        &[Adopt],
        &[Options(&["nographic"])],
        OLD_SCREEN,
        "use -display none -serial unix:PATH,server=on,wait=off",
    ),
    Row::new(
        &[Adopt],
        &[Key(NETWORK, "ifname", Any)],
        ONE_PROCESS,
        "use -netdev bridge, or tap without ifname, which make a tap for each process",
    ),
    Row::new(
        &[Adopt],
        &[Key(NETWORK, "type", Not(&["user", "bridge", "hubport", "none", "tap", "nic"]))],
        ONE_PROCESS,
        "use user networking or a bridge",
    ),
    Row::new(
        &[Adopt],
        &[Key(&["audiodev"], "driver", Is("wav"))],
        "the new QEMU would write over its file",
        "use another audio backend",
    ),
    Row::new(
        &[Adopt],
        &[Options(&["tpmdev"]), Objects(&["filter-*", "input-linux*"])],
        ONE_PROCESS,
        WITHOUT,
    ),
    Row::new(&[Adopt, Restore], &[Devices(&["usb-host"])], ONE_PROCESS, WITHOUT),
    Row::new(
        &[Adopt],
        &[Devices(&["usb-redir", "ccid-card-passthru"]), Objects(&["rng-egd", "x-vfio-user*"])],
        OLD_PEER,
        WITHOUT,
    ),
    Row::new(
        &[Restore],
        &[Devices(&["pvrdma", "u2f-passthru", "virtio-input-host*", "x-pci-proxy-dev", "xen-*"])],
        "it is a device of the host",
        "name it by --allow",
    ),
];

/// The user networks of a QEMU, as [`Several`] names them.
pub const USER_NETWORKS: &str = "user networks";
