//! Character devices of the new QEMU: what stands behind serial ports and monitors.

use super::line::{Walk, cannot};
use anyhow::Result;
use qmp_bridge::qmp::replies::ChardevInfo;
use serde::{Deserialize, Serialize};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vm::launch::arguments::{KeyList, QemuOption};

/// Behind the path of a socket while the old QEMU still serves it.
const SUFFIX: &str = ".adopting";
/// `sun_path` of a unix socket, less its final zero.
const MAX_SOCKET_PATH: usize = 107;

/// Backends that are the process's own.
const OWN: &[&str] =
    &["null", "vc", "ringbuf", "memory", "msmouse", "wctablet", "testdev", "mux", "hub"];

/// A socket that waits under another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Socket {
    pub waits: PathBuf,
    pub path: PathBuf,
}

impl Socket {
    /// Where the new QEMU makes the socket that is `path` on the command line.
    pub(super) fn beside(path: &str, directory: &Path) -> Result<(String, Self), String> {
        let waits = format!("{path}{SUFFIX}");
        if waits.len() > MAX_SOCKET_PATH {
            return Err(format!(
                "its path leaves no room for {SUFFIX}, under which the new QEMU makes it first"
            ));
        }
        let socket = Self { waits: directory.join(&waits), path: directory.join(path) };
        Ok((waits, socket))
    }
}

/// `-chardev BACKEND,id=…`.
pub(super) fn chardev(walk: &mut Walk<'_>, option: &QemuOption) -> Result<()> {
    if option.value().starts_with('{') {
        return Err(cannot(
            option,
            "it is written as JSON",
            "write it as a list: socket,id=ID,path=PATH,server=on,wait=off",
        ));
    }
    let keys = option.keys();
    let kind = keys.get_or_implied("backend").unwrap_or_default().to_owned();
    let keys = match kind.as_str() {
        own if OWN.contains(&own) => keys,
        "file" if !has(&keys, "input-path") => set(without(&keys, &["append"]), "append", "on"),
        "socket" => served(walk, option, &keys)?,
        _ => {
            return Err(cannot(
                option,
                "it belongs to the old process",
                "use a unix socket: socket,id=ID,path=PATH,server=on,wait=off",
            ));
        }
    };
    let keys = if has(&keys, "logfile") {
        set(without(&keys, &["logappend"]), "logappend", "on")
    } else {
        keys
    };
    walk.keep(QemuOption::with("chardev", keys.to_string()));
    Ok(())
}

/// `-serial DEV` and the like, in QEMU's old words.
pub(super) fn shorthand(walk: &mut Walk<'_>, option: &QemuOption) -> Result<()> {
    let number = walk.serials;
    walk.serials += usize::from(option.name == "serial");
    let value = option.value();
    let (mux, device) = value.strip_prefix("mon:").map_or(("", value), |rest| ("mon:", rest));
    let is_own = ["none", "null", "vc", "msmouse", "ringbuf"].iter().any(|own| {
        device.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ',']))
    });
    if is_own || device.starts_with("chardev:") {
        walk.keep(option.clone());
    } else if let Some(rest) = device.strip_prefix("unix:") {
        let keys = served(walk, option, &with_path(rest))?;
        // The path must come first there, without its key.
        let mut list = KeyList::default();
        list.push(None, keys.get("path").unwrap_or_default());
        without(&keys, &["path"]).iter().for_each(|(key, value)| list.push(key, value));
        walk.keep(QemuOption::with(&option.name, format!("{mux}unix:{list}")));
    } else if let Some(path) = device.strip_prefix("file:").filter(|_| mux.is_empty()) {
        // The old words know no appending. QEMU itself would call it by this id.
        let id = if option.name == "serial" {
            format!("serial{number}")
        } else {
            format!("stillpoint-{}{}", option.name, walk.line.options.len())
        };
        let mut keys = KeyList::default();
        keys.push(None, "file");
        for (key, value) in [("id", id.as_str()), ("path", path), ("append", "on")] {
            keys.push(Some(key), value);
        }
        walk.keep(QemuOption::with("chardev", keys.to_string()));
        walk.keep(QemuOption::with(&option.name, format!("chardev:{id}")));
    } else {
        return Err(cannot(
            option,
            "it belongs to the old process",
            "use unix:PATH,server=on,wait=off or file:PATH",
        ));
    }
    Ok(())
}

/// A socket that QEMU serves at a path, without waiting for a client.
fn served(walk: &mut Walk<'_>, option: &QemuOption, keys: &KeyList) -> Result<KeyList> {
    let remedy = "use a unix socket that QEMU serves: path=PATH,server=on,wait=off";
    let is_server = keys.iter().any(|(key, value)| match key {
        Some("server") => ["on", "yes", "true", "y"].contains(&value),
        None => value == "server",
        _ => false,
    });
    if !is_server {
        return Err(cannot(option, "its server is connected to the old process only", remedy));
    }
    let path = keys.get("path").filter(|_| keys.get("abstract") != Some("on"));
    let Some(path) = path else {
        return Err(cannot(option, "one process alone can listen there", remedy));
    };
    let (waits, socket) = Socket::beside(path, walk.directory)
        .map_err(|why| cannot(option, &why, "use a shorter path"))?;
    if !is_socket_directory(&socket.path) {
        return Err(cannot(
            option,
            "the directory of its socket is gone",
            "start the VM with another path",
        ));
    }
    walk.line.later.sockets.push(socket);
    let mut rest = KeyList::default();
    let waiting = |key: Option<&str>, value: &str| {
        key == Some("wait") || key.is_none() && ["wait", "nowait"].contains(&value)
    };
    for (key, value) in keys.iter().filter(|(key, value)| !waiting(*key, value)) {
        rest.push(key, if key == Some("path") { &waits } else { value });
    }
    Ok(set(rest, "wait", "off"))
}

/// In tests there is none.
fn is_socket_directory(socket: &Path) -> bool {
    cfg!(test) || socket.parent().is_some_and(Path::is_dir)
}

fn has(keys: &KeyList, key: &str) -> bool {
    keys.get(key).is_some()
}

fn without(keys: &KeyList, gone: &[&str]) -> KeyList {
    let mut rest = KeyList::default();
    let kept = keys.iter().filter(|(key, _)| !key.is_some_and(|key| gone.contains(&key)));
    kept.for_each(|(key, value)| rest.push(key, value));
    rest
}

/// `PATH,key=value` with the path under its key.
fn with_path(text: &str) -> KeyList {
    let parsed = KeyList::parse(text);
    let mut keys = KeyList::default();
    for (number, (key, value)) in parsed.iter().enumerate() {
        keys.push(if number == 0 { key.or(Some("path")) } else { key }, value);
    }
    keys
}

fn set(mut keys: KeyList, key: &str, value: &str) -> KeyList {
    keys.push(Some(key), value);
    keys
}

/// Whether a client of the user's is connected to a socket that QEMU serves, as `query-chardev`
/// tells. `ours` is the monitor that we hold.
pub(super) fn connected(chardevs: &[ChardevInfo], directory: &Path, ours: &Path) -> Option<String> {
    chardevs
        .iter()
        .filter_map(|chardev| Some((&chardev.label, chardev.filename.strip_prefix("unix:")?)))
        .find(|(_, rest)| {
            let path = directory.join(rest.split(',').next().unwrap_or_default());
            rest.contains(",server") && !is_same(&path, ours)
        })
        .map(|(label, rest)| format!("{label} (unix:{rest})"))
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(one).as_os_str().as_bytes() == real(other).as_os_str().as_bytes()
}

#[cfg(test)]
mod test {
    use super::super::line::{Line, rewrite};
    use super::*;
    use vm::launch::arguments::{parse, words};

    fn line(text: &str) -> Line {
        let words: Vec<String> =
            format!("-display none {text}").split(' ').map(str::to_owned).collect();
        rewrite(&parse(&words).unwrap(), Path::new("/vm")).unwrap()
    }

    fn rewritten(text: &str) -> String {
        words(&line(text).options)[2..].join(" ")
    }

    #[test]
    fn served_sockets_wait_under_another_name() {
        let found = line(
            "-qmp unix:q.sock,server,nowait -chardev socket,id=c,path=/run/s,server=on,telnet=off -serial mon:unix:t,server=on",
        );
        assert_eq!(
            words(&found.options)[2..].join(" "),
            "-qmp unix:q.sock.adopting,server,wait=off -chardev socket,id=c,path=/run/s.adopting,server=on,telnet=off,wait=off \
             -serial mon:unix:t.adopting,server=on,wait=off"
        );
        let socket = |waits: &str, path: &str| Socket { waits: waits.into(), path: path.into() };
        let expected = [
            socket("/vm/q.sock.adopting", "/vm/q.sock"),
            socket("/run/s.adopting", "/run/s"),
            socket("/vm/t.adopting", "/vm/t"),
        ];
        assert_eq!(found.later.sockets, expected);
    }

    #[test]
    fn logs_are_appended_to() {
        assert_eq!(
            rewritten("-serial null -serial file:b,c.log"),
            "-serial null -chardev file,id=serial1,path=b,,c.log,append=on -serial chardev:serial1"
        );
        assert_eq!(
            rewritten("-chardev file,id=f,path=x,append=off"),
            "-chardev file,id=f,path=x,append=on"
        );
        assert_eq!(
            rewritten("-chardev null,id=n,logfile=x,logappend=off"),
            "-chardev null,id=n,logfile=x,logappend=on"
        );
    }

    #[test]
    fn a_clients_connection_is_found() {
        let rows = [
            ["compat_monitor0", "unix:q.sock,server=on"],
            ["serial0", "disconnected:unix:/run/s,server=on"],
            ["parallel0", "vc"],
        ];
        let rows = rows.map(|[label, filename]| ChardevInfo {
            label: label.to_owned(),
            filename: filename.to_owned(),
            frontend_open: true,
        });
        assert_eq!(connected(&rows, Path::new("/vm"), Path::new("/vm/q.sock")), None);
        assert!(
            connected(&rows, Path::new("/vm"), Path::new("/vm/other"))
                .unwrap()
                .starts_with("compat_monitor0")
        );
    }
}
