//! The command line of a restored VM without its host: the same guest devices, nothing behind them.
//!
//! What the guest sees stays: devices, their properties, the number of serial ports, the offloads
//! of its network cards. What is behind it goes: network backends lead nowhere (QEMU runs in an
//! empty network namespace), character devices become null devices or sockets of a private
//! directory, displays and sound are off, and no file of the host is written.

use std::path::{Path, PathBuf};
use vm::launch::arguments::{KeyList, QemuOption};
use vm::launch::form::{self, Form};

/// Options that only concern the process and its place on the host.
#[rustfmt::skip]
const DROPPED: &[&str] = &[
    "D", "S", "chroot", "curses", "d", "daemonize", "dfilter", "display", "full-screen", "gdb", "incoming", "mon", "monitor",
    "msg", "pidfile", "plugin", "qmp", "qmp-pretty", "qtest", "qtest-log", "runas", "run-with", "s", "sandbox", "sdl",
    "spice", "trace", "vnc", "writeconfig",
];
/// Options whose value is a character device, written out or by its id.
const CHARACTER: &[&str] = &["debugcon", "parallel", "serial", "virtioconsole"];
/// Keys by which the user network reaches the host.
const USER_REACHES: &[&str] =
    &["hostfwd", "guestfwd", "smb", "smbserver", "tftp", "bootfile", "restrict"];
/// Keys of a tap or bridge that stay: `vhost` and queues decide what the card offers.
const TAP_STAYS: &[&str] = &["type", "id", "vhost", "queues", "vnet_hdr", "sndbuf"];
/// Keys of `-nic` and `-net` that describe the card.
const CARD: &[&str] = &["id", "model", "mac", "macaddr", "addr", "vectors", "name"];
/// Character devices that are inside QEMU.
const INTERNAL: &[&str] = &["null", "ringbuf", "memory", "msmouse", "testdev", "wctablet", "hub"];
/// Objects that open something of the host and that the guest does not see.
#[rustfmt::skip]
const DROPPED_OBJECTS: &[&str] = &[
    "authz-", "can-host-", "colo-compare", "dbus-", "filter-", "input-barrier", "input-linux", "qtest", "tls-c",
    "vfio-user-server",
];
/// Hubs of the VM's own have small numbers.
const FIRST_HUB: u32 = 1_000_000;
/// Context ids that a host gives to its own VMs are small.
const FIRST_CID: u32 = 0x7000_0000;

/// Rewrites all options. `directory` is private: sockets are made there.
pub(super) fn isolate(options: Vec<QemuOption>, directory: &Path) -> Vec<QemuOption> {
    let mut walk = Walk { directory, number: 0, tpms: tpm_chardevs(&options) };
    let mut isolated: Vec<QemuOption> =
        options.into_iter().filter_map(|option| walk.visit(option)).collect();
    isolated.push(QemuOption::with("display", "none"));
    isolated.push(QemuOption::with("monitor", "none"));
    // The clock of the host does not wait until the comparison is done; its interrupts would change
    // the state that is compared. The last `clock` counts.
    isolated.push(QemuOption::with("rtc", "clock=vm"));
    isolated
}

/// Ids of the character devices by which QEMU talks to a software TPM.
fn tpm_chardevs(options: &[QemuOption]) -> Vec<String> {
    let tpms = options.iter().filter(|option| option.name == "tpmdev").map(Form::of);
    tpms.filter_map(|form| form.get("chardev")).collect()
}

/// Sockets, in new options, at which QEMU expects software TPMs.
pub(super) fn tpm_sockets(options: &[QemuOption]) -> Vec<PathBuf> {
    let ids = tpm_chardevs(options);
    let chardevs = options.iter().filter(|option| option.name == "chardev").map(Form::of);
    let of_tpm = chardevs.filter(|form| form.get("id").is_some_and(|id| ids.contains(&id)));
    of_tpm.filter_map(|form| form.get("path")).map(PathBuf::from).collect()
}

/// The directories that the new command line expects in `directory`.
pub(super) fn directories(options: &[QemuOption], directory: &Path) -> Vec<PathBuf> {
    let shares = options
        .iter()
        .filter(|option| is_share(option))
        .filter_map(|option| Form::of(option).get("path"));
    shares.map(|path| directory.join(path)).collect()
}

/// What `--allow` takes for devices of the host that [`isolate`] has made to match nothing, and for
/// directories and sockets that it has made private.
pub(super) fn harmless(options: &[QemuOption]) -> Vec<String> {
    let drivers = options
        .iter()
        .filter(|option| option.name == "device")
        .filter_map(|option| Form::of(option).get("driver"));
    let mut allowed: Vec<String> = drivers
        .filter(|driver| driver == "usb-host")
        .map(|driver| format!("device.driver={driver}"))
        .collect();
    allowed.dedup();
    allowed
        .extend(tpm_sockets(options).iter().map(|path| format!("chardev.path={}", path.display())));
    for option in options.iter().filter(|option| is_share(option)) {
        allowed.extend(
            Form::of(option).get("path").map(|path| format!("{}.path={path}", option.name)),
        );
    }
    allowed
}

fn is_share(option: &QemuOption) -> bool {
    option.name == "fsdev" || option.name == "virtfs"
}

/// Key and value, in their order; the first word has the key that it stands for, a later one is a
/// switch that is on (`server,nowait`).
type Pairs = Vec<(String, String)>;

fn pairs(option: &QemuOption, implied: &str) -> Pairs {
    match Form::of(option) {
        form @ Form::Object(_) => form.scalars(),
        Form::List { keys, .. } => {
            let named = |(number, (key, value)): (usize, (Option<&str>, &str))| match key {
                Some(key) => pair(key, value),
                None if number == 0 => pair(implied, value),
                None => pair(value, "on"),
            };
            keys.iter().enumerate().map(named).collect()
        }
    }
}

fn get<'a>(pairs: &'a Pairs, key: &str) -> Option<&'a str> {
    pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

fn is_on(pairs: &Pairs, key: &str) -> bool {
    get(pairs, key).is_some_and(form::is_on)
}

/// Whether `key` is `name`, or an element of the list `name` (`hostfwd.0.str`).
fn is_key(key: &str, names: &[&str]) -> bool {
    let first = key.split('.').next().unwrap_or(key);
    names.contains(&first)
}

fn option(name: &str, pairs: &Pairs) -> QemuOption {
    let mut keys = KeyList::default();
    pairs.iter().for_each(|(key, value)| keys.push(Some(key), value.as_str()));
    QemuOption::with(name, keys.to_string())
}

fn pair(key: &str, value: impl Into<String>) -> (String, String) {
    (key.to_owned(), value.into())
}

struct Walk<'a> {
    directory: &'a Path,
    /// Counts what needs a name of its own.
    number: u32,
    /// Character devices behind which there is a TPM.
    tpms: Vec<String>,
}

impl Walk<'_> {
    fn visit(&mut self, given: QemuOption) -> Option<QemuOption> {
        let name = given.name.as_str();
        if DROPPED.contains(&name) {
            return None;
        }
        if CHARACTER.contains(&name) {
            return Some(QemuOption::with(name, quiet_character(given.value())));
        }
        let isolated = match name {
            // It switches the guest's graphics off too, which `-display none` does not.
            "nographic" => QemuOption::with("machine", "graphics=off"),
            "chardev" => self.chardev(&given),
            "netdev" => option(name, &self.backend(pairs(&given, "type"), &["id"])),
            "nic" | "net" => self.nic(&given),
            "audiodev" | "audio" => without_sound(&given),
            "fsdev" | "virtfs" => self.share(&given),
            "device" => device(given),
            "machine" | "M" => described(given),
            "object" => return object(given),
            _ => given,
        };
        // A list that has become empty is none.
        (!isolated.value.as_ref().is_some_and(String::is_empty)).then_some(isolated)
    }

    fn next(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    fn chardev(&mut self, given: &QemuOption) -> QemuOption {
        let old = pairs(given, "backend");
        let kind = get(&old, "backend").unwrap_or_default();
        let id = get(&old, "id").unwrap_or_default();
        if self.tpms.iter().any(|tpm| tpm == id) {
            // The guest's TPM is part of its state: the proof starts another one there.
            let path = self.directory.join(format!("tpm-{}", self.next())).join("socket");
            let new = [
                pair("backend", "socket"),
                pair("id", id),
                pair("path", path.display().to_string()),
            ];
            return option("chardev", &new.into());
        }
        if INTERNAL.contains(&kind) {
            let stays = old
                .iter()
                .filter(|(key, _)| !is_key(key, &["logfile", "logappend"]))
                .cloned()
                .collect();
            return option("chardev", &stays);
        }
        // The guest can tell a server without a client from a null device, and a restore makes such
        // a server.
        let listens = kind == "socket" && is_on(&old, "server");
        let mut new = vec![pair("backend", if listens { "socket" } else { "null" })];
        new.push(pair("id", id));
        if listens {
            let path = self.directory.join(format!("character-{}", self.next()));
            new.extend([
                pair("path", path.display().to_string()),
                pair("server", "on"),
                pair("wait", "off"),
            ]);
        }
        if is_on(&old, "mux") {
            new.push(pair("mux", "on"));
        }
        option("chardev", &new)
    }

    /// `stays` are the keys that are not the backend's.
    fn backend(&mut self, old: Pairs, stays: &[&str]) -> Pairs {
        match get(&old, "type").unwrap_or_default() {
            "none" | "hubport" | "nic" => old,
            "user" => {
                let mut new: Pairs =
                    old.into_iter().filter(|(key, _)| !is_key(key, USER_REACHES)).collect();
                new.push(pair("restrict", "on"));
                new
            }
            // In the empty network namespace. It has the offloads that the guest's driver uses.
            kind @ ("tap" | "bridge") => {
                let with_header = kind == "bridge";
                let keep = |key: &str| is_key(key, TAP_STAYS) || is_key(key, stays);
                let mut new: Pairs =
                    old.iter().filter(|(key, _)| keep(key) && key != "type").cloned().collect();
                new.insert(0, pair("type", "tap"));
                new.extend([pair("script", "no"), pair("downscript", "no")]);
                if with_header && get(&new, "vnet_hdr").is_none() {
                    new.push(pair("vnet_hdr", "on"));
                }
                new
            }
            _ => {
                let mut new = vec![
                    pair("type", "hubport"),
                    pair("hubid", (FIRST_HUB + self.next()).to_string()),
                ];
                new.extend(old.into_iter().filter(|(key, _)| is_key(key, stays)));
                new
            }
        }
    }

    /// `-nic` and `-net` name the backend and, among the same keys, the card.
    fn nic(&mut self, given: &QemuOption) -> QemuOption {
        let new = self.backend(pairs(given, "type"), CARD);
        // Alone in its list the word needs no key, and `-net none` allows none.
        if let [(key, value)] = new.as_slice()
            && key == "type"
        {
            return QemuOption::with(&given.name, value.as_str());
        }
        option(&given.name, &new)
    }

    /// A directory of the host that the guest could mount.
    fn share(&mut self, given: &QemuOption) -> QemuOption {
        let mut new = pairs(given, "fsdriver");
        let path = format!("share-{}", self.next());
        let in_use = new.iter_mut().filter(|(key, _)| key == "path");
        in_use.for_each(|(_, value)| path.clone_into(value));
        option(&given.name, &new)
    }
}

/// `chardev:ID` and `none` stay: whether there is a port is the guest's business.
fn quiet_character(value: &str) -> &str {
    let stays = value == "none" || value.starts_with("chardev:");
    if stays { value } else { "null" }
}

fn without_sound(given: &QemuOption) -> QemuOption {
    let old = pairs(given, "driver");
    let mut new = vec![pair("driver", "none")];
    new.extend(old.into_iter().filter(|(key, _)| is_key(key, &["id", "model", "timer-period"])));
    option(&given.name, &new)
}

fn device(given: QemuOption) -> QemuOption {
    let mut form = Form::of(&given);
    match form.get("driver").unwrap_or_default().as_str() {
        // It waits for a device of a vendor that does not exist.
        "usb-host" => {
            ["hostbus", "hostaddr", "hostport", "hostdevice", "vendorid", "productid"]
                .into_iter()
                .for_each(|key| form.remove(key));
            form.set("vendorid", "0xffff");
            form.set("productid", "0xffff");
        }
        driver if driver.starts_with("vhost-vsock") => {
            form.set_number("guest-cid", u64::from(FIRST_CID + std::process::id()))
        }
        _ => return given,
    }
    form.into_option("device")
}

/// The proof needs QEMU's description of its state, which is no part of it.
fn described(given: QemuOption) -> QemuOption {
    let mut form = Form::of(&given);
    form.remove("suppress-vmdesc");
    form.into_option("machine")
}

fn object(given: QemuOption) -> Option<QemuOption> {
    let kind = Form::of(&given).get("qom-type").unwrap_or_default();
    (!DROPPED_OBJECTS.iter().any(|prefix| kind.starts_with(prefix))).then_some(given)
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::launch::arguments::{parse, words};

    fn isolated(line: &str) -> String {
        let list: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let all = words(&isolate(parse(&list).unwrap(), Path::new("/p"))).join(" ");
        all.trim_end_matches("-display none -monitor none -rtc clock=vm").trim().to_owned()
    }

    #[test]
    fn networks_lead_nowhere_and_keep_what_the_card_offers() {
        let cases = [
            (
                "-netdev user,id=n,hostfwd=tcp::22-:22,net=10.1.0.0/24",
                "-netdev type=user,id=n,net=10.1.0.0/24,restrict=on",
            ),
            (
                "-netdev tap,id=n,ifname=t0,script=/s,vhost=on",
                "-netdev type=tap,id=n,vhost=on,script=no,downscript=no",
            ),
            (
                "-netdev bridge,id=n,br=br0",
                "-netdev type=tap,id=n,script=no,downscript=no,vnet_hdr=on",
            ),
            ("-netdev socket,id=n,listen=:1", "-netdev type=hubport,hubid=1000001,id=n"),
            (
                r#"-netdev {"type":"tap","id":"n","fd":"3"}"#,
                "-netdev type=tap,id=n,script=no,downscript=no",
            ),
            ("-nic user,model=e1000,hostfwd=tcp::1-:1", "-nic type=user,model=e1000,restrict=on"),
            ("-nic none", "-nic none"),
            ("-net nic -net user", "-net nic -net type=user,restrict=on"),
        ];
        for (given, wanted) in cases {
            assert_eq!(isolated(given), wanted, "{given}");
        }
    }

    #[test]
    fn character_devices_keep_their_ports_and_nothing_else() {
        let cases = [
            (
                "-serial file:/host.log -serial none -serial chardev:c",
                "-serial null -serial none -serial chardev:c",
            ),
            (
                "-chardev socket,id=c,path=/run/x,server=on,wait=on",
                "-chardev backend=socket,id=c,path=/p/character-1,server=on,wait=off",
            ),
            (
                "-chardev socket,id=c,path=/x,server,nowait",
                "-chardev backend=socket,id=c,path=/p/character-1,server=on,wait=off",
            ),
            ("-chardev socket,id=c,path=/run/x,reconnect=1", "-chardev backend=null,id=c"),
            ("-chardev stdio,id=c,mux=on,logfile=/l", "-chardev backend=null,id=c,mux=on"),
            (
                "-chardev ringbuf,id=c,size=4096,logfile=/l",
                "-chardev backend=ringbuf,id=c,size=4096",
            ),
            (
                "-chardev socket,id=c,path=/run/swtpm -tpmdev emulator,id=t,chardev=c",
                "-chardev backend=socket,id=c,path=/p/tpm-1/socket -tpmdev emulator,id=t,chardev=c",
            ),
        ];
        for (given, wanted) in cases {
            assert_eq!(isolated(given), wanted, "{given}");
        }
    }

    #[test]
    fn what_only_the_host_sees_goes() {
        let line = "-nographic -vnc :1 -pidfile /p -qmp unix:/q,server -audiodev alsa,id=a,out.dev=x -object filter-dump,id=f,netdev=n,file=/d \
                    -device usb-host,hostbus=1 -fsdev local,id=f,path=/home,security_model=none -S -m 16";
        assert_eq!(
            isolated(line),
            "-machine graphics=off -audiodev driver=none,id=a -device usb-host,vendorid=0xffff,productid=0xffff \
             -fsdev fsdriver=local,id=f,path=share-1,security_model=none -m 16"
        );
    }
}
