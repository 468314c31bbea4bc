//! The keys of each list whose values are something of the host, and what.

use super::Use::{
    self, Address, Boot, Code, Connect, Directory, Disk, Display, Firmware, HostDevice, HostFile,
    Output, Plain, Process, Program, Tap, User,
};

pub(super) type Rows = &'static [(&'static str, Use)];

pub(super) const ACPI: Rows = &[("file", Boot), ("data", Boot)];
pub(super) const AUDIO: Rows =
    &[("path", Output), ("dev", HostDevice), ("server", Connect), ("dsp-policy", Plain)];
pub(super) const BOOT: Rows = &[("splash", Firmware)];
pub(super) const CHARDEV: Rows = &[
    ("logfile", Output),
    ("out", Output),
    ("input-path", HostFile),
    ("in", HostFile),
    ("device", HostDevice),
    ("host", Address),
    ("port", Address),
    ("localaddr", Address),
    ("localport", Address),
];
pub(super) const DEVICE: Rows = &[
    ("romfile", Firmware),
    ("file", Boot),
    ("kernel", Boot),
    ("initrd", Boot),
    ("sdrfile", Boot),
    ("frudatafile", Boot),
    ("cdat", Boot),
    ("jsonfile", HostFile),
    ("pcap", Output),
    ("rootdir", Directory),
    ("db", HostFile),
    ("evdev", HostDevice),
    ("hidraw", HostDevice),
    ("sysfsdev", HostDevice),
    ("vhostdev", HostDevice),
    ("hostdevice", HostDevice),
    ("ibdev", HostDevice),
    ("fd", Process),
    ("vhostfd", Process),
];
/// Properties of devices that are texts without being paths; all other texts of QEMU's devices are
/// above.
pub(super) const DEVICE_TEXTS: &[&str] = &[
    "addr",
    "audiodev",
    "backend",
    "bootargs",
    "bus",
    "cert1",
    "cert2",
    "cert3",
    "chardev",
    "desc",
    "device_id",
    "display",
    "drive",
    "driver",
    "duplex",
    "failover_pair_id",
    "fdp.ruhs",
    "filter",
    "fp_start_macaddr",
    "fsdev",
    "guid",
    "hba_serial",
    "host",
    "host_ip",
    "hostport",
    "hv-vendor-id",
    "id",
    "instanceid",
    "iothread",
    "mac",
    "mad-chardev",
    "masterbus",
    "memdev",
    "model",
    "model-id",
    "mount_tag",
    "name",
    "netdev",
    "nguid",
    "nqn",
    "osk",
    "pci-type",
    "port",
    "product",
    "rng",
    "serial",
    "tag",
    "tpmdev",
    "tx",
    "uuid",
    "vdev",
    "vendor",
    "ver",
    "vf-token",
    "world",
    "wwpn",
];
pub(super) const DISPLAY: Rows = &[("rendernode", HostDevice), ("addr", Connect), ("vnc", Display)];
pub(super) const FSDEV: Rows = &[("path", Directory), ("socket", Connect), ("sock_fd", Process)];
pub(super) const ICOUNT: Rows = &[("rrfile", Output)];
pub(super) const VM: Rows = &[
    ("kernel", Boot),
    ("initrd", Boot),
    ("dtb", Boot),
    ("shim", Boot),
    ("firmware", Firmware),
    ("romfile", Firmware),
    ("dumpdtb", Output),
];
pub(super) const NET: Rows = &[
    ("script", Program),
    ("downscript", Program),
    ("helper", Program),
    ("ifname", Tap),
    ("br", HostDevice),
    ("devname", HostDevice),
    ("vhostdev", HostDevice),
    ("fd", Process),
    ("fds", Process),
    ("vhostfd", Process),
    ("vhostfds", Process),
    ("sock-fds", Process),
    ("tftp", Directory),
    ("smb", Program),
    ("sock", Connect),
    ("pcap", Output),
    ("param", Program),
    ("hostfwd", Address),
    ("hostfwd.str", Address),
    ("listen", Address),
    ("connect", Address),
    ("mcast", Address),
    ("udp", Address),
    ("host", Address),
    ("port", Address),
    ("src", Address),
    ("dst", Address),
];
pub(super) const PLUGIN: Rows = &[("file", Code)];
pub(super) const RUN_WITH: Rows =
    &[("chroot", Process), ("user", User), ("async-teardown", Process)];
pub(super) const SMBIOS: Rows = &[("file", Boot), ("path", Boot)];
pub(super) const SPICE: Rows = &[
    ("x509-dir", Directory),
    ("x509-key-file", HostFile),
    ("x509-cert-file", HostFile),
    ("x509-cacert-file", HostFile),
    ("x509-dh-key-file", HostFile),
    ("rendernode", HostDevice),
];
pub(super) const TPM: Rows = &[("path", HostDevice), ("cancel-path", HostDevice)];
pub(super) const TRACE: Rows = &[("file", Output), ("events", HostFile)];

/// Block keys whose last part names something outside of the image itself.
pub(super) const BLOCK: Rows = &[
    ("filename", Disk),
    ("config", HostFile),
    ("conf", HostFile),
    ("dir", Directory),
    ("device", HostDevice),
    ("path", Connect),
    ("logfile", Output),
    ("url", Connect),
    ("host", Connect),
    ("port", Connect),
];

/// Objects by type. A type that is not here is unknown: what QEMU opens for it is unknown too.
pub(super) const OBJECTS: &[(&str, Rows)] = &[
    ("acpi-generic-initiator", &[]),
    ("acpi-generic-port", &[]),
    ("authz-list", &[]),
    ("authz-list-file", &[("filename", HostFile)]),
    ("authz-pam", &[]),
    ("authz-simple", &[]),
    ("can-bus", &[]),
    ("can-host-socketcan", &[("if", HostDevice)]),
    ("colo-compare", &[]),
    ("cryptodev-backend", &[]),
    ("cryptodev-backend-builtin", &[]),
    ("cryptodev-backend-lkcf", &[("qom-type", HostDevice)]),
    ("cryptodev-vhost-user", &[]),
    ("dbus-vmstate", &[("addr", Connect)]),
    ("filter-buffer", &[]),
    ("filter-dump", &[("file", Output)]),
    ("filter-mirror", &[]),
    ("filter-redirector", &[]),
    ("filter-replay", &[]),
    ("filter-rewriter", &[]),
    ("igvm-cfg", &[("file", Boot)]),
    ("input-barrier", &[("server", Connect), ("port", Connect)]),
    ("input-linux", &[("evdev", HostDevice)]),
    ("iommufd", &[("qom-type", HostDevice), ("fd", Process)]),
    ("iothread", &[]),
    ("main-loop", &[]),
    ("memory-backend-epc", &[("qom-type", HostDevice)]),
    ("memory-backend-file", &[("mem-path", HostFile)]),
    ("memory-backend-memfd", &[]),
    ("memory-backend-ram", &[]),
    ("memory-backend-shm", &[]),
    ("monitor-hmp", &[]),
    ("monitor-qmp", &[]),
    ("pr-manager-helper", &[("path", Connect)]),
    ("rng-builtin", &[]),
    ("rng-egd", &[]),
    ("rng-random", &[("filename", HostDevice)]),
    ("secret", &[("file", HostFile)]),
    ("secret_keyring", &[("serial", HostFile)]),
    ("thread-context", &[]),
    ("throttle-group", &[]),
    ("tls-cipher-suites", &[("dir", Directory)]),
    ("tls-creds-anon", &[("dir", Directory)]),
    ("tls-creds-psk", &[("dir", Directory)]),
    ("tls-creds-x509", &[("dir", Directory)]),
];

/// Files of `/dev` that are the same on every host, and harmless.
pub(super) const EVERYWHERE: &[&str] =
    &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/hwrng"];
