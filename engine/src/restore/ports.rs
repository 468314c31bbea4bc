//! Host ports, displays, abstract sockets and taps that the restored VM would need and that another
//! process has in use: the original VM's QEMU, mostly.
//!
//! QEMU itself would refuse them, but only after everything was made. This module finds them
//! before, and names the `--map` option that helps.

use super::link::link;
use qemu_cmdline::form::{Form, is_on};
use qemu_cmdline::{KeyList, QemuOption, Use, visit};
use std::io::ErrorKind;
use std::net::{TcpListener, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

const FIRST_VNC: u16 = 5900;
const FIRST_VNC_WEB: u16 = 5700;
const GDB_OF_S: u16 = 1234;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

/// One address that QEMU binds.
struct Bind {
    protocol: Protocol,
    host: String,
    /// The port, as the command line counts it.
    number: u16,
    /// What is added to that; two ports with one number are a display and its web socket.
    base: u16,
    second_base: Option<u16>,
    /// How many more QEMU tries.
    more: u16,
    option: String,
    /// The value that `--map` takes for OLD; none where there is no value.
    old: Option<String>,
    /// `old` with another number is this prefix, the number, this suffix.
    around: (String, String),
}

/// Why each of them cannot be had, and what to do. `saved`: what `--map` takes for a value of these
/// options.
pub(super) fn taken(options: &[QemuOption], saved: &dyn Fn(&str) -> String) -> Vec<String> {
    let binds = binds(options);
    let mut reserved: Vec<u16> =
        binds.iter().map(|bind| bind.base.saturating_add(bind.number)).collect();
    let mut found: Vec<String> =
        binds.iter().filter_map(|bind| bind.trouble(&mut reserved, saved)).collect();
    found.extend(options.iter().filter_map(|option| abstract_socket(option, saved)));
    found.extend(taps(options, saved));
    found
}

impl Bind {
    fn trouble(&self, reserved: &mut Vec<u16>, saved: &dyn Fn(&str) -> String) -> Option<String> {
        let mut why = None;
        for number in (0..=self.more).filter_map(|more| self.number.checked_add(more)) {
            match self.try_number(&self.host, number) {
                None => return None,
                Some(error) => why = why.or(Some(error)),
            }
        }
        let (port, kind) = why?;
        let reason = match kind {
            ErrorKind::AddrInUse => "is in use",
            ErrorKind::AddrNotAvailable => "is no address of this host",
            _ => "may not be used by this user",
        };
        let host = if kind == ErrorKind::AddrNotAvailable { "127.0.0.1" } else { &self.host };
        let what = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        let remedy = match (&self.old, self.free_number(host, reserved)) {
            (Some(old), Some(number)) => {
                format!("use --map {}={}", saved(old), self.with(host, number))
            }
            _ => "end what uses it".to_owned(),
        };
        Some(format!("{what} {}:{port} (-{}) {reason}: {remedy}", self.host, self.option))
    }

    fn with(&self, host: &str, number: u16) -> String {
        let prefix = if host == self.host {
            self.around.0.clone()
        } else {
            self.around.0.replacen(&self.host, host, 1)
        };
        format!("{prefix}{number}{}", self.around.1)
    }

    /// The port that cannot be had, and why.
    fn try_number(&self, host: &str, number: u16) -> Option<(u16, ErrorKind)> {
        let bases = [Some(self.base), self.second_base];
        let mut ports = bases.into_iter().flatten().map(|base| number.saturating_add(base));
        ports.find_map(|port| try_bind(self.protocol, host, port).map(|error| (port, error)))
    }

    fn free_number(&self, host: &str, reserved: &mut Vec<u16>) -> Option<u16> {
        let is_free = |number: &u16| {
            number.checked_add(self.base).is_some_and(|port| !reserved.contains(&port))
                && self.try_number(host, *number).is_none()
        };
        // The port itself may be free on the other address.
        let begin = if host == self.host { self.number.saturating_add(1) } else { self.number };
        let unprivileged = (1024 - self.base.min(1024)).max(begin);
        let number =
            (begin..=u16::MAX).find(is_free).or_else(|| (unprivileged..=u16::MAX).find(is_free))?;
        reserved.push(number + self.base);
        Some(number)
    }
}

/// None if it can be had, as QEMU would ask for it.
fn try_bind(protocol: Protocol, host: &str, port: u16) -> Option<ErrorKind> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let hosts: &[&str] = if host.is_empty() || host == "*" { &["::", "0.0.0.0"] } else { &[host] };
    let troubles = [ErrorKind::AddrInUse, ErrorKind::AddrNotAvailable, ErrorKind::PermissionDenied];
    let is_any = hosts.len() > 1;
    hosts.iter().find_map(|host| {
        let addresses = (*host, port).to_socket_addrs().ok()?;
        addresses.into_iter().find_map(|address| {
            let error = match protocol {
                Protocol::Tcp => TcpListener::bind(address).err(),
                Protocol::Udp => UdpSocket::bind(address).err(),
            }?;
            // A host without IPv6 has no address `::`.
            troubles
                .contains(&error.kind())
                .then(|| error.kind())
                .filter(|kind| !is_any || *kind != ErrorKind::AddrNotAvailable)
        })
    })
}

fn binds(options: &[QemuOption]) -> Vec<Bind> {
    let mut found: Vec<Bind> =
        options.iter().flat_map(|option| of_option(option, options)).collect();
    visit(options, |site| {
        if matches!(site.option, "netdev" | "nic" | "net") && site.key.starts_with("hostfwd") {
            found.extend(forward(site.option, site.value));
        }
    });
    found
}

fn of_option(option: &QemuOption, all: &[QemuOption]) -> Vec<Bind> {
    let value = option.value();
    match option.name.as_str() {
        "vnc" => vnc(option, value),
        "display" => value.strip_prefix("vnc=").map(|rest| vnc(option, rest)).unwrap_or_default(),
        "spice" => spice(option, all),
        "gdb" | "serial" | "parallel" | "monitor" | "qmp" | "qmp-pretty" | "debugcon" => {
            compat(option).into_iter().collect()
        }
        "s" => vec![Bind {
            protocol: Protocol::Tcp,
            host: String::new(),
            number: GDB_OF_S,
            base: 0,
            second_base: None,
            more: 0,
            option: "s".to_owned(),
            old: None,
            around: Default::default(),
        }],
        "chardev" => chardev(option, all),
        "netdev" | "nic" | "net" => network(option, all),
        _ => Vec::new(),
    }
}

fn vnc(option: &QemuOption, value: &str) -> Vec<Bind> {
    let keys = KeyList::parse(value);
    let Some((None, address)) = keys.iter().next() else { return Vec::new() };
    let is_on = |key: &str| keys.get(key).is_some_and(is_on);
    let Some((host, number)) =
        address.rsplit_once(':').filter(|_| !address.starts_with("unix:") && !is_on("reverse"))
    else {
        return Vec::new();
    };
    let Ok(number) = number.parse::<u16>() else { return Vec::new() };
    let more = keys.get("to").and_then(|to| to.parse().ok()).unwrap_or(0);
    let bind = |number, base, more, old: &str, prefix: &str| Bind {
        protocol: Protocol::Tcp,
        host: host.to_owned(),
        number,
        base,
        second_base: (base == FIRST_VNC && keys.get("websocket") == Some("on"))
            .then_some(FIRST_VNC_WEB),
        more,
        option: option.name.clone(),
        old: Some(old.to_owned()),
        around: (prefix.to_owned(), String::new()),
    };
    let mut found = vec![bind(number, FIRST_VNC, more, address, &format!("{host}:"))];
    if let Some((port, number)) =
        keys.get("websocket").and_then(|port| Some((port, port.parse::<u16>().ok()?)))
    {
        found.push(bind(number, 0, 0, port, ""));
    }
    found
}

/// A bind by keys: the number alone is OLD, unless another value is spelled like it; then the whole
/// list is.
fn by_key(
    option: &QemuOption,
    all: &[QemuOption],
    protocol: Protocol,
    host: Option<String>,
    key: &str,
) -> Option<Bind> {
    let form = Form::of(option);
    let text = form.get(key)?;
    let number: u16 = text.parse().ok().filter(|number| *number > 0)?;
    let more = form
        .get("to")
        .and_then(|to| to.parse::<u16>().ok())
        .map_or(0, |to| to.saturating_sub(number));
    let (old, around) = if is_only(all, &text) {
        (text, Default::default())
    } else {
        let value = option.value();
        let (before, after) = value.split_once(&format!("{key}={text}"))?;
        (value.to_owned(), (format!("{before}{key}="), after.to_owned()))
    };
    let host = host.unwrap_or_default();
    Some(Bind {
        protocol,
        host,
        number,
        base: 0,
        second_base: None,
        more,
        option: option.name.clone(),
        old: Some(old),
        around,
    })
}

fn is_only(options: &[QemuOption], value: &str) -> bool {
    let mut count = 0;
    visit(options, |site| count += usize::from(site.value == value));
    count == 1
}

fn spice(option: &QemuOption, all: &[QemuOption]) -> Vec<Bind> {
    let form = Form::of(option);
    let host = form.get("addr").filter(|_| !form.is_on("unix"));
    if form.is_on("unix") {
        return Vec::new();
    }
    ["port", "tls-port"]
        .into_iter()
        .filter_map(|key| by_key(option, all, Protocol::Tcp, host.clone(), key))
        .collect()
}

fn chardev(option: &QemuOption, all: &[QemuOption]) -> Vec<Bind> {
    let form = Form::of(option);
    match form.get("backend").as_deref() {
        Some("socket") if form.is_on("server") || has_word(option, "server") => {
            by_key(option, all, Protocol::Tcp, form.get("host"), "port").into_iter().collect()
        }
        Some("udp") => by_key(option, all, Protocol::Udp, form.get("localaddr"), "localport")
            .into_iter()
            .collect(),
        _ => Vec::new(),
    }
}

fn has_word(option: &QemuOption, word: &str) -> bool {
    option.keys().iter().skip(1).any(|(key, value)| key.is_none() && value == word)
}

/// `tcp:HOST:PORT,server=on`, `udp:…@HOST:PORT`, behind `mon:` or not.
fn compat(option: &QemuOption) -> Option<Bind> {
    let keys = option.keys();
    let (_, first) = keys.iter().next().filter(|(key, _)| key.is_none())?;
    let rest = first.strip_prefix("mon:").unwrap_or(first);
    let (scheme, address) = rest.split_once(':')?;
    let bind = |protocol, address: &str| {
        let before = first.strip_suffix(address)?;
        // Only these first words are values of their own; else the whole text is.
        let is_word = ["tcp", "udp", "telnet"].contains(&scheme) || first.starts_with("mon:");
        let after = if is_word { "" } else { option.value().strip_prefix(first)? };
        at_address(&option.name, protocol, address, (before, after))
    };
    // A debugger's socket serves without being told to.
    let serves =
        option.name == "gdb" || has_word(option, "server") || keys.get("server").is_some_and(is_on);
    match scheme {
        "tcp" | "telnet" | "tn3270" | "websocket" if serves => bind(Protocol::Tcp, address),
        "udp" => bind(Protocol::Udp, address.split_once('@')?.1),
        _ => None,
    }
}

fn network(option: &QemuOption, all: &[QemuOption]) -> Vec<Bind> {
    let form = Form::of(option);
    let keyed = |protocol, host: &str, port: &str| {
        by_key(option, all, protocol, form.get(host), port).into_iter().collect()
    };
    match form.get("type").as_deref() {
        Some("socket") => {
            let bind =
                |protocol, address: String| at_address(&option.name, protocol, &address, ("", ""));
            let listen = form.get("listen").and_then(|address| bind(Protocol::Tcp, address));
            let local = form.get("localaddr").filter(|_| form.has("udp"));
            let local = local.and_then(|address| bind(Protocol::Udp, address));
            listen.into_iter().chain(local).collect()
        }
        Some("stream")
            if form.is_on("server") && form.get("addr.type").as_deref() == Some("inet") =>
        {
            keyed(Protocol::Tcp, "addr.host", "addr.port")
        }
        Some("dgram") if form.get("local.type").as_deref() == Some("inet") => {
            keyed(Protocol::Udp, "local.host", "local.port")
        }
        _ => Vec::new(),
    }
}

/// A bind at `address` (`HOST:PORT`), which stands between these two in the value that `--map`
/// takes for OLD.
fn at_address(
    option: &str,
    protocol: Protocol,
    address: &str,
    (before, after): (&str, &str),
) -> Option<Bind> {
    let (host, number) = address.rsplit_once(':')?;
    Some(Bind {
        protocol,
        host: host.to_owned(),
        number: number.parse().ok().filter(|number| *number > 0)?,
        base: 0,
        second_base: None,
        more: 0,
        option: option.to_owned(),
        old: Some(format!("{before}{address}{after}")),
        around: (format!("{before}{host}:"), after.to_owned()),
    })
}

/// `[tcp|udp]:[HOST]:PORT-[GUEST]:PORT`.
fn forward(option: &str, rule: &str) -> Option<Bind> {
    let (outside, inside) = rule.split_once('-')?;
    let (scheme, address) = outside.split_once(':')?;
    let protocol = if scheme == "udp" { Protocol::Udp } else { Protocol::Tcp };
    at_address(option, protocol, address, (&format!("{scheme}:"), &format!("-{inside}")))
}

fn abstract_socket(option: &QemuOption, saved: &dyn Fn(&str) -> String) -> Option<String> {
    let form = Form::of(option);
    let serves = form.is_on("server") || has_word(option, "server");
    let is_one = option.name == "chardev" && form.is_on("abstract") && serves;
    let name = form.get("path").filter(|_| is_one)?;
    let address = SocketAddr::from_abstract_name(name.as_bytes()).ok()?;
    let error = UnixListener::bind_addr(&address)
        .err()
        .filter(|error| error.kind() == ErrorKind::AddrInUse);
    error.map(|_| {
        format!(
            "the abstract socket {name} (-chardev) is in use: use --map {}={name}-2",
            saved(&name)
        )
    })
}

/// Taps that some process holds. What cannot be asked is left to QEMU.
fn taps(options: &[QemuOption], saved: &dyn Fn(&str) -> String) -> Vec<String> {
    let mut found = Vec::new();
    visit(options, |site| {
        let is_used = |name: &str| {
            link(name).is_ok_and(|link| link.is_some_and(|link| link.is_tap && link.has_carrier))
        };
        if site.means == Use::Tap && is_used(site.value) {
            let is_free = |name: &String| link(name).is_ok_and(|link| link.is_none());
            let free = (0..=u8::MAX).map(|number| format!("tap{number}")).find(is_free);
            let (tap, free) = (site.value, free.unwrap_or_else(|| "NEW".to_owned()));
            found.push(format!(
                "tap {tap} (-{}) is in use: use --map {}={free}",
                site.option,
                saved(tap)
            ));
        }
    });
    found
}

#[cfg(test)]
mod test {
    use super::*;
    use qemu_cmdline::restorable::{Wishes, map};
    use vm::launch::arguments::{parse, words};

    fn taken(options: &[QemuOption]) -> Vec<String> {
        super::taken(options, &str::to_owned)
    }

    fn options(line: &str) -> Vec<QemuOption> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    /// The `OLD=NEW` of a message.
    fn proposal(message: &str) -> (String, String) {
        let text =
            message.split_once("--map ").unwrap_or_else(|| panic!("no --map in {message}")).1;
        let places = text
            .match_indices('=')
            .map(|(at, _)| (text[..at].to_owned(), text[at + 1..].to_owned()));
        let (old, new) = places.min_by_key(|(old, new)| old.len().abs_diff(new.len())).unwrap();
        (old, new)
    }

    /// Every spelling of a port that is taken is noticed, and what is proposed changes the line
    /// into one that is free.
    #[test]
    fn ports_in_use_are_named_with_a_map_that_helps() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        let display = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let _vnc = TcpListener::bind(("127.0.0.1", display)).unwrap();
        let (vnc, web) = (display - FIRST_VNC, display - FIRST_VNC_WEB);
        let lines = [
            format!("-netdev user,id=n,hostfwd=tcp::{port}-:22"),
            format!("-nic user,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:22,model=e1000"),
            format!(
                r#"-netdev {{"type":"user","id":"n","hostfwd":[{{"str":"tcp::{port}-:22"}}]}}"#
            ),
            format!("-netdev socket,id=n,listen=127.0.0.1:{port}"),
            format!(
                "-netdev stream,id=n,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
            ),
            format!("-chardev socket,id=c,host=127.0.0.1,port={port},server=on,wait=off"),
            format!(
                "-chardev socket,id=c,host=127.0.0.1,port={port},server,nowait -device x,port={port}"
            ),
            format!("-serial tcp:127.0.0.1:{port},server=on,wait=off"),
            format!("-serial mon:telnet::{port},server,nowait"),
            format!("-monitor websocket:127.0.0.1:{port},server=on"),
            format!("-gdb tcp::{port}"),
            format!("-spice port={port},addr=127.0.0.1,disable-ticketing=on"),
            format!("-vnc 127.0.0.1:{vnc}"),
            format!("-display vnc=:{vnc}"),
            format!("-vnc 127.0.0.1:1077,websocket={port}"),
            format!("-vnc 127.0.0.1:{web},websocket=on"),
        ];
        for line in lines {
            let options = options(&line);
            let found = taken(&options);
            assert_eq!(found.len(), 1, "{line}: {found:?}");
            let mapped =
                map(options, &Wishes { map: vec![proposal(&found[0])], ..Wishes::default() });
            let now = words(&mapped.options).join(" ");
            assert!(mapped.unused.is_empty() && now != line, "{line}: {} gives {now}", found[0]);
            assert!(taken(&mapped.options).is_empty(), "{line}: {} gives {now}", found[0]);
        }
        drop(holder);
    }

    #[test]
    fn ports_of_datagrams_and_abstract_sockets_too() {
        let holder = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        for line in [
            format!("-netdev user,id=n,hostfwd=udp::{port}-:53"),
            format!("-chardev udp,id=c,host=127.0.0.1,port=9,localaddr=127.0.0.1,localport={port}"),
            format!("-serial udp:127.0.0.1:9@127.0.0.1:{port}"),
            format!("-netdev dgram,id=n,local.type=inet,local.host=127.0.0.1,local.port={port}"),
        ] {
            assert_eq!(taken(&options(&line)).len(), 1, "{line}");
        }
        let name = format!("stillpoint-test-{}", std::process::id());
        let line = format!("-chardev socket,id=c,path={name},abstract=on,server=on,wait=off");
        assert!(taken(&options(&line)).is_empty());
        let _bound =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap())
                .unwrap();
        assert!(taken(&options(&line))[0].contains(&format!("--map {name}=")));
    }

    #[test]
    fn ports_that_qemu_chooses_or_connects_to_are_no_trouble() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        for line in [
            format!("-chardev socket,id=c,host=127.0.0.1,port={port}"),
            format!("-chardev socket,id=c,host=127.0.0.1,port={port},to={},server=on", port + 50),
            format!("-netdev socket,id=n,connect=127.0.0.1:{port}"),
            format!("-netdev user,id=n,guestfwd=tcp:10.0.2.100:{port}-tcp:127.0.0.1:{port}"),
            "-netdev user,id=n,hostfwd=tcp::0-:22 -vnc unix:x -vnc none -display none -spice unix=on,addr=/x".to_owned(),
        ] {
            assert_eq!(taken(&options(&line)), [""; 0], "{line}");
        }
        let elsewhere = taken(&options("-netdev user,id=n,hostfwd=tcp:192.0.2.1:4022-:22"));
        assert!(
            elsewhere[0].contains("no address of this host")
                && elsewhere[0].contains("tcp:127.0.0.1:"),
            "{elsewhere:?}"
        );
    }
}
