//! One table of QEMU's options (7.2 to 11.1): what each value is for the host.
//!
//! A restore starts a command line that was written on another host. Whether a value is a file, a
//! name or a size depends on the option that it belongs to, never on its spelling: an image may be
//! called `on`, and an id `/etc/passwd`. So every rewrite and every check asks this table. What it
//! does not know is [`Use::Unknown`], and refused where it could be a path.

mod devices;
mod keys;
mod options;
pub mod unsupported;

pub(crate) use devices::matches;
pub use devices::{SHORTHANDS, audio_model, device_model};
use keys::*;
use options::{NOT_SAVED, OPTIONS};

/// What a value is for the host, and so what a restore does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Use {
    /// An id, a format, a size, a switch, text for the guest: the same on every host. Kept.
    Plain,
    /// The image of a disk or of a layer below one. Mapped to the restored file.
    Disk,
    /// A file that QEMU reads at its start and at a reboot (a kernel, a table for the guest).
    /// Carried as a layer.
    Boot,
    /// The same, but a bare name may be one of QEMU's own files (`-bios bios-256k.bin`), which
    /// every host has.
    Firmware,
    /// A file that QEMU makes or appends to: a log, a capture, a pidfile. Made in the restored VM's
    /// directory.
    Output,
    /// A unix socket that QEMU makes. Made in the restored VM's directory.
    Listen,
    /// A socket or pipe of another process, to which QEMU connects.
    Connect,
    /// A file of the host that no checkpoint holds: a secret, a certificate, a configuration.
    HostFile,
    /// A directory of the host that QEMU reads or shares with the guest.
    Directory,
    /// Where QEMU looks for its own files (`-L`): the restoring host's QEMU has its own. Left out.
    DataDirectory,
    /// A device of the host, or a bridge that the VM joins.
    HostDevice,
    /// A tap of the host by its name; made or joined by name, without a script. Kept.
    Tap,
    /// A program that QEMU starts.
    Program,
    /// Code that QEMU loads into itself.
    Code,
    /// A monitor or debugger that others reach over the network: who talks to it commands QEMU.
    Control,
    /// A display that others reach over the network.
    Display,
    /// A network address or port of the guest's own network. Kept.
    Address,
    /// What the process is to be (its root directory) or how it begins.
    Process,
    /// The user that the process is to become. As another one it could open nothing of a restored
    /// VM.
    User,
    /// What QEMU would not be asked by a saved command line: another configuration, an incoming
    /// stream.
    Never,
    /// Not in the table.
    Unknown,
}

/// How the value of an option is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// No value.
    Flag,
    /// One text, read as it is.
    Text(Use),
    /// `key=value,…` or a JSON object; the first word may stand for a key.
    Keys(Option<&'static str>, Group),
    /// The old words for a character device: `unix:PATH,server=on`, `file:PATH`, `chardev:ID`.
    Chardev {
        /// Whether it is a monitor.
        monitor: bool,
    },
    /// The address of a display (`-vnc`).
    Vnc,
}

/// Which table has the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after QEMU's options")]
pub enum Group {
    /// All values are plain.
    Plain,
    AcpiTable,
    Audio,
    Block,
    Boot,
    Chardev,
    Device,
    Display,
    Drive,
    Fsdev,
    FwCfg,
    Global,
    Icount,
    Vm,
    Monitor,
    Net,
    Object,
    Plugin,
    RunWith,
    Smbios,
    Spice,
    Tpm,
    Trace,
}

use Group as G;
use Syntax::{Flag, Keys};
use Use::{
    Address, Boot, Connect, Disk, Display, HostDevice, HostFile, Listen, Output, Plain, Process,
    Program, Unknown,
};

/// How the value of an option is written; `None` for an option that the table lacks.
pub fn syntax(option: &str) -> Option<Syntax> {
    let found = OPTIONS.iter().find(|(name, _)| *name == option);
    match option {
        // Its own list names the driver, the property and the value.
        "global" => Some(Keys(None, G::Global)),
        _ => found.map(|(_, syntax)| *syntax),
    }
}

/// Every option of the table.
pub fn options() -> impl Iterator<Item = &'static str> {
    OPTIONS.iter().map(|(name, _)| *name)
}

/// Options that stand alone; every other option, known or not, takes one value.
pub fn is_flag(option: &str) -> bool {
    syntax(option) == Some(Flag)
}

/// What a switch is for the host.
pub fn flag_use(option: &str) -> Use {
    match option {
        "s" => Use::Control,
        _ if NOT_SAVED.contains(&option) => Process,
        _ => Plain,
    }
}

/// The key that an option's first word stands for.
pub fn implied_key(option: &str) -> Option<&'static str> {
    match syntax(option) {
        Some(Keys(implied, _)) => implied,
        _ => None,
    }
}

/// The kind of an option's value as a whole says how its keys are read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kind<'a> {
    /// `driver`, `backend`, `type` or `qom-type`.
    pub name: &'a str,
    /// Whether QEMU serves a socket here.
    pub is_server: bool,
    /// Whether the socket's name is in no file system.
    pub is_abstract: bool,
    /// Whether the list is that of a monitor, or of a character device that one uses.
    pub is_monitor: bool,
}

/// What the value of `key` is in a list of `group`. `key` may be dotted; `kind` is that of the
/// whole list.
pub fn key_use(group: Group, kind: Kind<'_>, key: &str, value: &str) -> Use {
    let last = key.rsplit('.').next().unwrap_or(key);
    let found = match group {
        G::Plain => Plain,
        G::AcpiTable => row(ACPI, key).unwrap_or(Plain),
        G::Audio => audio(last, value),
        G::Block => block(last, value),
        G::Boot => row(BOOT, key).unwrap_or(Plain),
        G::Chardev => chardev(kind, last),
        G::Device => device(kind, key, value),
        G::Display if key == "type" && value == "spice-app" => Program,
        G::Display => row(DISPLAY, key).unwrap_or(Plain),
        G::Drive if key == "file" => Disk,
        G::Drive => block(last, value),
        G::Fsdev => row(FSDEV, key).unwrap_or(Plain),
        G::FwCfg => {
            if key == "file" {
                Boot
            } else {
                Plain
            }
        }
        G::Global => Plain,
        G::Icount => row(ICOUNT, key).unwrap_or(Plain),
        G::Vm => row(VM, key).unwrap_or(Plain),
        G::Monitor => Plain,
        G::Net => net(kind, key, last, value),
        G::Object => object(kind, last),
        G::Plugin => row(PLUGIN, key).unwrap_or(Plain),
        G::RunWith => row(RUN_WITH, key).unwrap_or(Plain),
        G::Smbios => row(SMBIOS, key).unwrap_or(Plain),
        G::Spice => spice(key, value),
        G::Tpm if key == "type" && value == "passthrough" => HostDevice,
        G::Tpm => row(TPM, key).unwrap_or(Plain),
        G::Trace => row(TRACE, key).unwrap_or(Plain),
    };
    of_path(found, value)
}

/// Some values of a path's place are none: nothing, and files that every host has.
pub fn of_path(means: Use, value: &str) -> Use {
    if value.is_empty() || is_everywhere(means, value) { Plain } else { means }
}

fn row(rows: Rows, key: &str) -> Option<Use> {
    rows.iter().find(|(name, _)| *name == key).map(|(_, use_)| *use_)
}

fn is_everywhere(found: Use, value: &str) -> bool {
    matches!(found, HostDevice | HostFile | Output | Unknown) && EVERYWHERE.contains(&value)
}

/// Drivers of images and files, and the filters that change nothing of their content.
pub const BLOCK_DRIVERS: &[&str] =
    &["qcow2", "raw", "file", "host_device", "throttle", "copy-on-read"];

fn block(last: &str, value: &str) -> Use {
    match last {
        "driver" | "format" if !BLOCK_DRIVERS.contains(&value) => Connect,
        _ => row(BLOCK, last).unwrap_or(Plain),
    }
}

fn audio(last: &str, value: &str) -> Use {
    match row(AUDIO, last).unwrap_or(Plain) {
        // ALSA's `default` and `hw:0` are the host's sound, not its files.
        HostDevice if !value.starts_with('/') => Plain,
        found => found,
    }
}

/// `path` is what its backend makes of it.
fn chardev(kind: Kind<'_>, last: &str) -> Use {
    if last == "path" {
        return match kind.name {
            "socket" | "unix" if kind.is_abstract => {
                if kind.is_monitor {
                    Use::Control
                } else {
                    Address
                }
            }
            "socket" | "unix" if kind.is_server => Listen,
            "socket" | "unix" | "pipe" => Connect,
            "file" | "pty" => Output,
            "serial" | "tty" | "parallel" | "parport" => HostDevice,
            _ => Unknown,
        };
    }
    match row(CHARDEV, last) {
        Some(Address) if kind.is_monitor => Use::Control,
        Some(found) => found,
        None => {
            if last == "fd" {
                Process
            } else {
                Plain
            }
        }
    }
}

fn device(kind: Kind<'_>, key: &str, value: &str) -> Use {
    if key == "driver" {
        let is_host = unsupported::device(value, unsupported::Command::Restore).is_some();
        return if is_host { HostDevice } else { Plain };
    }
    // The host of a VFIO device or of an RDMA one; `host` of others is a port of the guest's.
    if key == "host" && kind.name.starts_with("vfio-") {
        return HostDevice;
    }
    let is_chardev = key
        .strip_prefix("chardev")
        .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
    if is_chardev || DEVICE_TEXTS.contains(&key) {
        return Plain;
    }
    row(DEVICE, key).unwrap_or(Unknown)
}

fn net(kind: Kind<'_>, key: &str, last: &str, value: &str) -> Use {
    match (kind.name, last) {
        ("passt", "type") => Program,
        ("bridge", "type")
        | (
            "vmnet-host" | "vmnet-shared" | "vmnet-bridged" | "af-xdp" | "netmap" | "l2tpv3",
            "type",
        ) => HostDevice,
        ("tap" | "bridge", "script" | "downscript") if value == "no" => Plain,
        ("passt", "path") => Program,
        ("netmap" | "af-xdp" | "vmnet-bridged", "ifname") => HostDevice,
        (_, "path") if kind.is_server || key == "local.path" => Listen,
        (_, "path") => Connect,
        (_, "guestfwd") => guest_forward(value),
        (_, "str") if key.starts_with("guestfwd") => guest_forward(value),
        _ => row(NET, key).or_else(|| row(NET, last)).unwrap_or(Plain),
    }
}

/// `tcp:SERVER:PORT-TARGET`: the target is a character device in the old words, or `cmd:` and a
/// program.
fn guest_forward(value: &str) -> Use {
    let target = value.split_once('-').map_or("", |(_, target)| target);
    match target.split(':').next().unwrap_or_default() {
        "tcp" | "chardev" | "null" => Address,
        "unix" | "pipe" => Connect,
        "file" => Output,
        _ => Program,
    }
}

fn object(kind: Kind<'_>, last: &str) -> Use {
    match OBJECTS.iter().find(|(name, _)| *name == kind.name) {
        Some((_, rows)) => row(rows, last).unwrap_or(Plain),
        None => Unknown,
    }
}

fn spice(key: &str, value: &str) -> Use {
    match key {
        "port" | "tls-port" => Plain,
        "addr" if value.starts_with('/') => Listen,
        "addr" if !is_loopback(value) => Display,
        _ => row(SPICE, key).unwrap_or(Plain),
    }
}

/// An address that only this host reaches.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host == "::1" || host.starts_with("127.")
}

/// Whether an object's type is known.
pub fn is_known_object(kind: &str) -> bool {
    OBJECTS.iter().any(|(name, _)| *name == kind)
}
