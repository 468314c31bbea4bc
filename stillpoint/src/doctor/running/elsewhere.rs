//! What another host must have so that the machine can be restored there, and what no other host has.

use super::super::Row;
use crate::launch::arguments::QemuOption;
use crate::launch::form::Form;
use std::borrow::Cow;

/// Device models that are a piece of this host's hardware.
const HARDWARE: &[&str] = &["usb-host", "virtio-input-host", "u2f-passthru", "ccid-card-emulated"];
/// Such paths are the same on every host.
const EVERYWHERE: &[&str] = &["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/hwrng", "/dev/vhost-net", "/dev/net/tun"];

const MAP: &str = "make it there, or name another by 'restore --map OLD=NEW'";

pub fn check(options: &[QemuOption]) -> Vec<Row> {
    let mut rows = Vec::new();
    for option in options {
        let form = Form::of(option);
        rows.extend(local(option, &form));
        rows.extend(need(option, &form));
    }
    rows
}

/// What exists only here.
fn local(option: &QemuOption, form: &Form) -> Option<Row> {
    const CHECK: &str = "only on this host";
    let driver = form.get("driver").filter(|_| option.name == "device").unwrap_or_default();
    if HARDWARE.contains(&driver.as_str()) {
        return Some(Row::warn(CHECK, format!("-device {driver} is a piece of this host"), "a restored machine finds it unplugged"));
    }
    if ["blockdev", "drive", "accel"].contains(&option.name.as_str()) {
        return None;
    }
    let is_local = |value: &str| value.starts_with("/dev/") && !EVERYWHERE.contains(&value);
    let (_, path) = form.scalars().into_iter().find(|(_, value)| is_local(value.trim_start_matches("file:")))?;
    Some(Row::warn(CHECK, format!("-{} uses {path}", option.name), MAP))
}

/// What must be there.
fn need(option: &QemuOption, form: &Form) -> Option<Row> {
    const CHECK: &str = "restore elsewhere needs";
    let get = |key: &str| form.get(key).filter(|value| !value.is_empty());
    let row = |what: String, remedy: &'static str| Some(Row::warn(CHECK, what, remedy));
    match option.name.as_str() {
        "netdev" | "nic" => match (get("type")?.as_str(), get("ifname"), get("br")) {
            ("tap", Some(name), _) => row(format!("a tap {name}, or the right to make one"), MAP),
            ("tap", None, _) => row("the right to make a tap".to_owned(), "run the restore as root, or make a tap beforehand"),
            ("bridge", _, bridge) => row(format!("a bridge {}", bridge.as_deref().unwrap_or("br0")), MAP),
            _ => None,
        },
        "chardev" | "qmp" | "monitor" | "serial" | "parallel" => socket_directory(option, form).and_then(|place| row(place, MAP)),
        "object" if get("qom-type").as_deref() == Some("secret") => {
            get("file").and_then(|file| row(format!("the secret {file}"), "bring it there; it is in no checkpoint"))
        }
        "object" if get("qom-type").is_some_and(|kind| kind.starts_with("tls-creds")) => {
            get("dir").and_then(|dir| row(format!("the certificates {dir}"), "bring them there; they are in no checkpoint"))
        }
        "fsdev" | "virtfs" => get("path").and_then(|path| row(format!("the shared directory {path}"), MAP)),
        "vnc" | "spice" if option.value() != "none" => row(format!("a free display port (-{} {})", option.name, option.value()), MAP),
        "cpu" if option.keys().get_or_implied("model").is_some_and(|model| model == "host") => {
            row("a processor like this host's (-cpu host)".to_owned(), "restore only on hosts of the same processor model")
        }
        _ => None,
    }
}

/// A socket or a log at an absolute path needs its directory.
fn socket_directory(option: &QemuOption, form: &Form) -> Option<String> {
    let value = option.value();
    let plain = ["unix:", "file:", "pipe:"]
        .iter()
        .find_map(|scheme| value.strip_prefix(scheme))
        .map(|rest| Cow::from(rest.split(',').next().unwrap_or_default()));
    let path = plain.or_else(|| form.get("path").map(Cow::from))?;
    let is_absolute = path.starts_with('/') && !path.starts_with("/dev/");
    is_absolute.then(|| format!("the place of {path}"))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::launch::arguments::parse;

    fn told(line: &str) -> String {
        let rows = check(&parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap());
        rows.iter().map(|row| format!("{}: {}\n", row.check, row.detail)).collect()
    }

    #[test]
    fn what_another_host_must_have_is_listed() {
        let cases = [
            ("-netdev tap,id=n,ifname=tap100i0,script=/var/lib/x", "a tap tap100i0"),
            (r#"-netdev {"type":"tap","id":"n","ifname":"vnet0"}"#, "a tap vnet0"),
            ("-netdev bridge,id=n,br=br7", "a bridge br7"),
            ("-chardev socket,id=c,path=/run/x.sock,server=on", "the place of /run/x.sock"),
            ("-qmp unix:/run/y.qmp,server=on", "the place of /run/y.qmp"),
            (r#"-object {"qom-type":"secret","id":"s","file":"/etc/key"}"#, "the secret /etc/key"),
            ("-vnc 127.0.0.1:0", "a free display port"),
            ("-cpu host,migratable=on", "-cpu host"),
            ("-device usb-host,hostbus=1", "only on this host: -device usb-host"),
            ("-chardev serial,id=c,path=/dev/ttyS0", "only on this host: -chardev uses /dev/ttyS0"),
        ];
        for (line, expected) in cases {
            assert!(told(line).contains(expected), "{line}: {}", told(line));
        }
    }

    #[test]
    fn what_is_everywhere_is_not_listed() {
        let line = "-netdev user,id=n -serial file:serial.log -qmp unix:x.sock,server=on -object rng-random,id=r,filename=/dev/urandom -cpu qemu64 \
                    -chardev pty,id=p -vnc none -drive file=/dev/vg/lv,format=raw";
        assert_eq!(told(line), "");
    }
}
