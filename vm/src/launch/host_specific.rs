//! What a command line says of the process and not of the VM: a restored VM is another process, on
//! another host, without the manager of the first.
//!
//! Monitors, logs, descriptors that a manager passed, and what happens only at the start. Each
//! option that is left out is reported with its reason; `docs/attach.md` has the same table in
//! prose.

use super::arguments::{KeyList, QemuOption};
use super::form::Form;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// Options that go as a whole, and why.
const WHOLE: &[(&str, &str)] = &[
    ("S", "the VM runs already"),
    ("D", LOGS),
    ("add-fd", FDS),
    ("async-teardown", PROCESS),
    ("chroot", PROCESS),
    ("d", LOGS),
    ("daemonize", PROCESS),
    ("dfilter", LOGS),
    ("gdb", DEBUG),
    ("id", "only Proxmox's QEMU knows it"),
    ("incoming", "the VM has arrived"),
    ("loadvm", "the snapshot has been loaded"),
    ("msg", LOGS),
    ("pidfile", PROCESS),
    ("preconfig", "the VM exists"),
    ("run-with", PROCESS),
    ("runas", PROCESS),
    ("s", DEBUG),
    ("trace", LOGS),
];

const LOGS: &str = "a log of the old process";
const PROCESS: &str = "it is about the old process";
const DEBUG: &str = "a debugger of the old process";
const FDS: &str = "a descriptor that a manager handed to the old process";
const UNKNOWN_BACKEND: &str = "is a descriptor that the VM's manager opened, and what is behind it cannot be identified, so it could not be \
                               made again elsewhere; give the VM a tap by name, a bridge or user networking";
const MONITOR: &str = "a monitor of the old process; the restored VM has Stillpoint's";
const PLUGIN: &str = "the restored VM gets the plugin again";
const SECRET: &str = "nothing on the command line uses this secret";
const WATCHED: &str = "its manager ended QEMU after a shutdown; the restored VM has no manager";
const GONE_OPTION: &str = "QEMU 9 and later say it by -machine hpet=off";
const THREADS: &str = "how the old process shows itself";

/// What was taken out of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// In the words of the command line.
    pub what: String,
    /// The reason, for the user.
    pub why: &'static str,
}

/// Who started the VM and looks after it, as far as its command line shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// libvirt.
    Libvirt,
    /// Proxmox VE.
    Proxmox,
}

impl Manager {
    /// Who wrote this command line.
    pub fn of(options: &[QemuOption]) -> Option<Self> {
        let has = |word: &str| options.iter().any(|option| option.value().contains(word));
        if has("id=charmonitor") || has("/libvirt/qemu/domain-") {
            Some(Self::Libvirt)
        } else if has("/var/run/qemu-server/") || has("/run/qemu-server/") {
            Some(Self::Proxmox)
        } else {
            None
        }
    }

    /// For the user.
    pub fn name(self) -> &'static str {
        match self {
            Self::Libvirt => "libvirt",
            Self::Proxmox => "Proxmox VE",
        }
    }
}

/// What has to be known of the process besides its command line.
pub(crate) struct Hold<'a> {
    /// The monitor that we are attached by.
    pub monitor: &'a Path,
    pub directory: &'a Path,
    /// The tap behind a descriptor of the process.
    pub tap: &'a dyn Fn(&str) -> Option<String>,
    /// The regular file behind a path such as `/dev/fdset/0`.
    pub fd_path: &'a dyn Fn(&str) -> Option<PathBuf>,
}

/// The options of the VM alone, and what was taken out.
pub(crate) fn without_process(
    options: Vec<QemuOption>,
    hold: &Hold<'_>,
) -> Result<(Vec<QemuOption>, Vec<Dropped>)> {
    let managed = Manager::of(&options).is_some();
    let mut walk = Walk {
        hold,
        managed,
        gone: monitor_chardevs(&options, hold),
        shared: shared_chardevs(&options),
        unused: unused_secrets(&options),
        dropped: Vec::new(),
    };
    let mut kept = Vec::new();
    for option in options {
        kept.extend(walk.visit(option)?);
    }
    Ok((kept, walk.dropped))
}

struct Walk<'a> {
    hold: &'a Hold<'a>,
    /// Character devices that only serve monitors which go.
    gone: Vec<String>,
    /// Character devices that something else than a monitor uses.
    shared: Vec<String>,
    unused: Vec<String>,
    /// A manager (libvirt, Proxmox) watches the process.
    managed: bool,
    dropped: Vec<Dropped>,
}

impl Walk<'_> {
    fn drop_it(&mut self, option: &QemuOption, why: &'static str) -> Option<QemuOption> {
        let what = std::iter::once(format!("-{}", option.name))
            .chain(option.value.clone())
            .collect::<Vec<_>>()
            .join(" ");
        self.dropped.push(Dropped { what, why });
        None
    }

    fn visit(&mut self, option: QemuOption) -> Result<Option<QemuOption>> {
        if let Some((_, why)) = WHOLE.iter().find(|(name, _)| *name == option.name) {
            return Ok(self.drop_it(&option, why));
        }
        Ok(match option.name.as_str() {
            "mon" if self.gone.contains(&Form::of(&option).get("chardev").unwrap_or_default()) => {
                self.drop_it(&option, MONITOR)
            }
            "chardev" => self.chardev(option),
            "qmp" | "qmp-pretty" if self.is_gone_monitor(option.value()) => {
                self.drop_it(&option, MONITOR)
            }
            "monitor" if option.value() != "none" && self.is_gone_monitor(option.value()) => {
                self.drop_it(&option, MONITOR);
                // Without a word QEMU would make one of its own.
                Some(QemuOption::with("monitor", "none"))
            }
            "no-shutdown" if self.managed => self.drop_it(&option, WATCHED),
            "no-hpet" => {
                self.drop_it(&option, GONE_OPTION);
                Some(QemuOption::with("machine", "hpet=off"))
            }
            "netdev" | "nic" | "net" => Some(self.network(option)?),
            "object" if self.is_unused_secret(&option) => self.drop_it(&option, SECRET),
            "name" => Some(self.name(option)),
            "plugin" if is_our_plugin(&option) => self.drop_it(&option, PLUGIN),
            _ => Some(option),
        })
    }

    /// A device of the guest stands behind it, so something must be there.
    fn chardev(&mut self, option: QemuOption) -> Option<QemuOption> {
        let mut form = Form::of(&option);
        let id = form.get("id").unwrap_or_default();
        if self.gone.contains(&id) && !self.shared.contains(&id) {
            return self.drop_it(&option, MONITOR);
        }
        if is_handed_over(&form) {
            self.drop_it(&option, FDS);
            return Some(self.made_again(&form, &id));
        }
        if form.get("logfile").is_some_and(|file| is_fd_path(&file)) {
            self.dropped.push(Dropped { what: format!("-chardev logfile of {id}"), why: FDS });
            ["logfile", "logappend"].into_iter().for_each(|key| form.remove(key));
            return Some(form.into_option("chardev"));
        }
        Some(option)
    }

    /// The same kind of backend, at a place in the restored VM's own directory (to which relative
    /// paths belong).
    fn made_again(&self, form: &Form, id: &str) -> QemuOption {
        let kind = form.get("backend").unwrap_or_default();
        let mut keys = KeyList::default();
        let mut add = |key: Option<&str>, value: &str| keys.push(key, value);
        match kind.as_str() {
            "socket" if form.is_on("server") => {
                add(None, "socket");
                add(Some("id"), id);
                add(Some("path"), &format!("{id}.sock"));
                add(Some("server"), "on");
                add(Some("wait"), "off");
            }
            "file" => {
                let real = form.get("path").and_then(|path| (self.hold.fd_path)(&path));
                let name = real
                    .as_deref()
                    .and_then(Path::file_name)
                    .map(|name| name.to_string_lossy().into_owned());
                add(None, "file");
                add(Some("id"), id);
                add(Some("path"), &name.unwrap_or_else(|| format!("{id}.log")));
                add(Some("append"), "on");
            }
            _ => {
                add(None, "null");
                add(Some("id"), id);
            }
        }
        QemuOption::with("chardev", keys.to_string())
    }

    /// Only monitors at a place that can be made again stay; of those, not the one that is ours.
    fn is_gone_monitor(&self, value: &str) -> bool {
        match value.strip_prefix("unix:") {
            Some(rest) => is_same_file(
                &self.hold.directory.join(rest.split(',').next().unwrap_or_default()),
                self.hold.monitor,
            ),
            None => !["tcp:", "telnet:", "chardev:"].iter().any(|scheme| value.starts_with(scheme)),
        }
    }

    fn network(&mut self, option: QemuOption) -> Result<QemuOption> {
        let mut form = Form::of(&option);
        if ["addr.type", "local.type"].iter().any(|key| form.get(key).as_deref() == Some("fd")) {
            bail!("network backend {} {UNKNOWN_BACKEND}", form.get("id").unwrap_or_default());
        }
        let held: Vec<String> = ["fd", "fds"]
            .iter()
            .filter_map(|key| form.get(key))
            .flat_map(|fds| fds.split(':').map(str::to_owned).collect::<Vec<_>>())
            .collect();
        if held.is_empty() {
            return Ok(option);
        }
        let kind = form.get("type").unwrap_or_default();
        let id = form.get("id").unwrap_or_default();
        let tap = held.first().filter(|_| kind == "tap").and_then(|fd| (self.hold.tap)(fd));
        let Some(tap) = tap else {
            bail!("network backend {id} ({kind}) {UNKNOWN_BACKEND}");
        };
        self.dropped.push(Dropped {
            what: format!("-{} {}: its descriptors", option.name, option.value()),
            why: FDS,
        });
        let with_vhost = form.has("vhostfd") || form.has("vhostfds");
        ["fd", "fds", "vhostfd", "vhostfds", "ifname", "script", "downscript"]
            .into_iter()
            .for_each(|key| form.remove(key));
        form.set("ifname", &tap);
        form.set("script", "no");
        form.set("downscript", "no");
        if held.len() > 1 {
            form.remove("queues");
            form.set_number("queues", held.len() as u64);
        }
        if with_vhost {
            form.set_on("vhost");
        }
        Ok(form.into_option(&option.name))
    }

    fn name(&mut self, option: QemuOption) -> QemuOption {
        let mut form = Form::of(&option);
        for key in ["debug-threads", "process"] {
            if form.has(key) {
                self.dropped.push(Dropped { what: format!("-name …,{key}"), why: THREADS });
                form.remove(key);
            }
        }
        form.into_option("name")
    }

    fn is_unused_secret(&self, option: &QemuOption) -> bool {
        let form = Form::of(option);
        form.get("qom-type").as_deref() == Some("secret")
            && form.get("id").is_some_and(|id| self.unused.contains(&id))
    }
}

/// libvirt hands most sockets over as descriptors, log files as sets of them.
fn is_handed_over(form: &Form) -> bool {
    form.has("fd") || form.get("path").is_some_and(|path| is_fd_path(&path))
}

fn is_fd_path(path: &str) -> bool {
    path.starts_with("/dev/fdset/")
        || path.starts_with("/dev/fd/")
        || path.starts_with("/proc/self/fd/")
}

/// Character devices of monitors that are left out: the one that the helper uses, and those that no
/// client can reach by a path.
fn monitor_chardevs(options: &[QemuOption], hold: &Hold<'_>) -> Vec<String> {
    let used: Vec<String> = options
        .iter()
        .filter(|option| option.name == "mon")
        .filter_map(|option| Form::of(option).get("chardev"))
        .collect();
    let chardevs = options.iter().filter(|option| option.name == "chardev").map(Form::of);
    let goes = |form: &Form| {
        let has_place = form.has("path") || form.has("host") || form.has("port");
        let is_ours = form
            .get("path")
            .is_some_and(|path| is_same_file(&hold.directory.join(path), hold.monitor));
        // A monitor that calls its manager is that manager's.
        let calls = form.get("backend").as_deref() == Some("socket") && !form.is_on("server");
        is_ours || !has_place || calls || is_handed_over(form)
    };
    chardevs.filter(goes).filter_map(|form| form.get("id")).filter(|id| used.contains(id)).collect()
}

/// `mux=on` lets a monitor and a serial port share one.
fn shared_chardevs(options: &[QemuOption]) -> Vec<String> {
    let users = options.iter().filter(|option| !["mon", "chardev"].contains(&option.name.as_str()));
    let values = users.flat_map(|option| Form::of(option).scalars());
    values
        .filter_map(|(key, value)| {
            value
                .strip_prefix("chardev:")
                .map(str::to_owned)
                .or((key == "chardev").then_some(value))
        })
        .collect()
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

/// Secrets that no other option names. libvirt gives every VM a master key, used or not.
fn unused_secrets(options: &[QemuOption]) -> Vec<String> {
    let scalars: Vec<Vec<(String, String)>> =
        options.iter().map(|option| Form::of(option).scalars()).collect();
    let secrets = options.iter().enumerate().filter(|(_, option)| option.name == "object");
    let secrets = secrets.filter_map(|(index, option)| {
        let form = Form::of(option);
        (form.get("qom-type").as_deref() == Some("secret")).then_some((index, form.get("id")?))
    });
    let is_used = |index: usize, id: &str| {
        scalars
            .iter()
            .enumerate()
            .any(|(other, list)| other != index && list.iter().any(|(_, value)| value == id))
    };
    secrets.filter(|(index, id)| !is_used(*index, id)).map(|(_, id)| id).collect()
}

fn is_our_plugin(option: &QemuOption) -> bool {
    plugin_socket(option).is_some()
}

/// Where our plugin in that QEMU listens, if this option loads it.
pub fn plugin_socket(option: &QemuOption) -> Option<PathBuf> {
    if option.name != "plugin" {
        return None;
    }
    let keys = option.keys();
    let file = keys.get_or_implied("file")?;
    let is_ours = Path::new(file).file_name()?.to_string_lossy().contains("stillpoint_plugin");
    // Older command lines say `arg="socket=…"`.
    let socket = keys
        .get("socket")
        .or_else(|| keys.get("arg").and_then(|arg| arg.strip_prefix("socket=")))?;
    is_ours.then(|| PathBuf::from(socket))
}
