//! The command line of the new QEMU: the old one's, less what cannot be there twice, for both run
//! for a moment.
//!
//! A unix socket that QEMU serves is made under another name and gets its own when the old QEMU has
//! let go; forwarded ports and a debugger's come by monitor commands then. A log is opened for
//! appending. What one process alone can have is refused (`qemu_cmdline::unsupported`), before
//! anything is done.

use super::sockets::{self, Socket};
use anyhow::Result;
use qemu_cmdline::unsupported::{self, Command};
use serde::{Deserialize, Serialize};
use std::path::Path;
use vm::error::refused;
use vm::launch::arguments::{KeyList, QemuOption};
use vm::launch::form::Form;

/// What is done when the old QEMU is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Later {
    pub sockets: Vec<Socket>,
    pub forwards: Vec<Forward>,
}

/// A port of the host that user networking forwards to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Forward {
    pub netdev: String,
    /// As `-netdev user,hostfwd=` has it.
    pub rule: String,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    pub options: Vec<QemuOption>,
    pub later: Later,
    /// What the owner should know.
    pub notes: Vec<String>,
}

/// Options that are about the old process, or begin what has begun.
const DROPPED: &[&str] =
    &["S", "D", "d", "daemonize", "incoming", "loadvm", "pidfile", "preconfig"];

/// Builds it from the options of the VM. `directory` is the QEMU's own.
pub(super) fn rewrite(options: &[QemuOption], directory: &Path) -> Result<Line> {
    if let Some(refusal) = unsupported::on_line(options, Command::Adopt) {
        return Err(refused(refusal.to_string()));
    }
    let mut walk =
        Walk { directory, line: Line::default(), serials: 0, networks: 0, has_display: false };
    for option in options {
        walk.visit(option)?;
    }
    if !walk.has_display {
        walk.keep(QemuOption::with("display", "none"));
        walk.note(
            "it has no display of its own any more: QEMU's default one belongs to the old process",
        );
    }
    Ok(walk.line)
}

pub(super) struct Walk<'a> {
    pub(super) directory: &'a Path,
    pub(super) line: Line,
    /// Serial ports so far, by which QEMU numbers what stands behind them.
    pub(super) serials: usize,
    networks: usize,
    has_display: bool,
}

impl Walk<'_> {
    pub(super) fn keep(&mut self, option: QemuOption) {
        self.line.options.push(option);
    }

    pub(super) fn note(&mut self, text: &str) {
        self.line.notes.push(text.to_owned());
    }

    fn visit(&mut self, option: &QemuOption) -> Result<()> {
        if DROPPED.contains(&option.name.as_str()) {
            return Ok(());
        }
        match option.name.as_str() {
            "chardev" => sockets::chardev(self, option),
            "serial" | "parallel" | "monitor" | "qmp" | "qmp-pretty" | "debugcon" => {
                sockets::shorthand(self, option)
            }
            "netdev" | "nic" | "net" => self.network(option),
            "gdb" | "s" => {
                self.note("no debugger can connect any more: say 'gdbserver' in its monitor");
                Ok(())
            }
            name => {
                self.has_display |= ["display", "vnc"].contains(&name);
                self.keep(option.clone());
                Ok(())
            }
        }
    }

    fn network(&mut self, option: &QemuOption) -> Result<()> {
        let kind = Form::of(option).get("type").unwrap_or_default();
        if option.name == "net" && kind == "nic" {
            self.keep(option.clone());
            return Ok(());
        }
        self.networks += 1;
        if kind != "user" {
            self.keep(option.clone());
            return Ok(());
        }
        self.user_network(option)
    }

    /// The old QEMU listens at the forwarded ports until it is gone.
    fn user_network(&mut self, option: &QemuOption) -> Result<()> {
        if option.value().starts_with('{') {
            if option.value().contains("hostfwd") {
                return Err(cannot(
                    option,
                    "its forwarded ports are written as JSON",
                    "write it as a list: user,id=ID,hostfwd=…",
                ));
            }
            self.keep(option.clone());
            return Ok(());
        }
        let (mut keys, mut rules) = (KeyList::default(), Vec::new());
        for (key, value) in option.keys().iter() {
            match key {
                Some("hostfwd") => rules.push(value.to_owned()),
                _ => keys.push(key, value),
            }
        }
        if !rules.is_empty() {
            let id = match keys.get("id").or_else(|| keys.get("name")) {
                Some(id) => id.to_owned(),
                None => {
                    let id = format!("stillpoint-net{}", self.networks);
                    keys.push(Some("id"), id.clone());
                    id
                }
            };
            self.note("connections through forwarded ports are cut; new ones come through when the old QEMU has gone");
            self.line
                .later
                .forwards
                .extend(rules.into_iter().map(|rule| Forward { netdev: id.clone(), rule }));
        }
        self.keep(QemuOption::with(&option.name, keys.to_string()));
        Ok(())
    }
}

pub(super) fn cannot(option: &QemuOption, why: &str, remedy: &str) -> anyhow::Error {
    let what = option.value.as_ref().map_or_else(String::new, |value| format!(" {value}"));
    refused(format!(
        "-{}{what} cannot be adopted: {why}; {remedy}, or checkpoint it by stream as it is",
        option.name
    ))
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::launch::arguments::{parse, words};

    fn line(text: &str) -> Result<Line> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        rewrite(&parse(&words).unwrap(), Path::new("/vm"))
    }

    fn rewritten(text: &str) -> String {
        words(&line(text).unwrap().options).join(" ")
    }

    #[test]
    fn an_ordinary_vm_stays_as_it_is() {
        let same = "-machine type=pc-q35-7.2 -m 1G -display none -drive file=a.qcow2,node-name=sp-a -device virtio-net-pci,netdev=n \
                    -netdev bridge,id=n,br=br0 -serial none -monitor none -object iothread,id=t -vnc none";
        let same = same.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(rewritten(&same), same);
    }

    #[test]
    fn what_one_process_alone_can_have_is_refused_with_a_remedy() {
        for option in [
            "-nographic",
            "-spice port=5900",
            "-tpmdev passthrough,id=t",
            "-display gtk",
            "-vnc :1",
            "-netdev tap,id=n,ifname=tap0",
            "-netdev tap,id=n,fd=21",
            "-netdev socket,id=n,listen=:1234",
            "-nic vde",
            "-device usb-host,vendorid=1",
            "-device vhost-vsock-pci,guest-cid=3",
            "-object memory-backend-ram,id=m,size=1G",
            "-object filter-dump,id=f,netdev=n,file=x",
            "-audiodev wav,id=a",
            "-chardev stdio,id=c",
            "-chardev pty,id=c",
            "-chardev socket,id=c,host=::1,port=1,server=on",
            "-chardev socket,id=c,path=s",
            "-chardev socket,id=c,fd=5,server=on",
            "-chardev pipe,id=c,path=p",
            "-serial stdio",
            "-serial mon:stdio",
            "-serial pty",
            "-serial tcp::4444,server=on",
            "-serial /dev/ttyS0",
            "-monitor unix:m",
            r#"-netdev {"type":"tap","id":"n","ifname":"t"}"#,
        ] {
            let error = line(option).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(option.split(' ').next().unwrap()) && text.contains("; "),
                "{option}: {text}"
            );
            assert_eq!(vm::error::class_of(&error), vm::error::Class::Refused);
        }
    }

    #[test]
    fn unsupported_row_of_an_adoption_is_refused() {
        let rows = unsupported::ROWS.iter().filter(|row| row.is_refused_by(Command::Adopt));
        for option in rows.flat_map(unsupported::examples) {
            let error = line(&option).expect_err(&option);
            assert_eq!(vm::error::class_of(&error), vm::error::Class::Refused, "{option}");
        }
    }

    #[test]
    fn forwarded_ports_come_later() {
        let found =
            line("-display none -netdev user,id=n,hostfwd=tcp::2222-:22,hostfwd=udp::53-:53 -nic user,hostfwd=tcp::80-:80").unwrap();
        assert_eq!(
            words(&found.options).join(" "),
            "-display none -netdev user,id=n -nic user,id=stillpoint-net2"
        );
        let forward =
            |netdev: &str, rule: &str| Forward { netdev: netdev.to_owned(), rule: rule.to_owned() };
        let expected = [
            forward("n", "tcp::2222-:22"),
            forward("n", "udp::53-:53"),
            forward("stillpoint-net2", "tcp::80-:80"),
        ];
        assert_eq!(found.later.forwards, expected);
    }

    #[test]
    fn what_has_begun_does_not_begin_again() {
        assert_eq!(
            rewritten("-S -incoming tcp:0:1 -loadvm x -daemonize -pidfile p -m 1G -display none"),
            "-m 1G -display none"
        );
        assert!(rewritten("-m 1G").ends_with("-display none"));
    }
}
