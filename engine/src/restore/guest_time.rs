//! The clock of a guest that continues at an instant of the past. Its agent sets it, where it has
//! one; docs/copies.md says what the guest sees otherwise.

use qemu_cmdline::arguments::{self, QemuOption};
use qemu_cmdline::form::Form;
use qmp_bridge::poll::poll_until;
use qmp_bridge::{Qmp, QmpError, guest_agent};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vm::runtime_dir::VmFile;

/// From the connection until the clock is set. An agent forks a program for it, in a guest that may
/// still wait for its memory.
const TIMEOUT: Duration = Duration::from_secs(5);

/// QEMU tells a moment after the guest has begun to run that its port is open.
const OPEN: Duration = Duration::from_secs(1);
const OPEN_POLL: Duration = Duration::from_millis(20);

/// Where the agent of a VM answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Channel {
    chardev: String,
    socket: PathBuf,
}

impl Channel {
    /// None unless QEMU serves the agent's port on a socket in the file system.
    pub(super) fn of(vm: &VmFile) -> Option<Self> {
        Self::find(&vm.arguments, &vm.directory)
    }

    fn find(words: &[String], directory: &Path) -> Option<Self> {
        let options = arguments::parse(words).ok()?;
        let port = find(&options, "device", |form| {
            form.get("name").as_deref() == Some(guest_agent::PORT)
        })?;
        let chardev = port.get("chardev")?;
        let socket = find(&options, "chardev", |form| form.get("id").as_ref() == Some(&chardev))?;
        if !socket.is_on("server") || socket.is_on("abstract") {
            return None;
        }
        let path = socket.get("path")?;
        Some(Self { chardev, socket: directory.join(path) })
    }

    /// Lets the agent of a guest that runs set its clock. Returns what the operator should know.
    pub(super) async fn set_clock(&self, qmp: &Qmp) -> String {
        match self.try_set_clock(qmp).await {
            Ok(()) => "the guest agent has set the guest's clock to that of this host".to_owned(),
            Err(why) => format!("the guest's clock is as of the checkpoint: {why}"),
        }
    }

    async fn try_set_clock(&self, qmp: &Qmp) -> Result<(), String> {
        match poll_until(OPEN, OPEN_POLL, || self.is_open(qmp)).await {
            Some(asked) => asked.map_err(|error| error.to_string())?,
            None => return Err("no guest agent has its port open".to_owned()),
        }
        let set = guest_agent::set_time(&self.socket, TIMEOUT).await;
        set.map_err(|error| error.to_string())
    }

    /// None while the guest has not opened the port.
    async fn is_open(&self, qmp: &Qmp) -> Option<Result<(), QmpError>> {
        match qmp.query_chardev().await {
            Ok(devices) => {
                let own = devices.iter().find(|device| device.label == self.chardev);
                own.is_some_and(|device| device.frontend_open).then_some(Ok(()))
            }
            Err(error) => Some(Err(error)),
        }
    }
}

fn find(options: &[QemuOption], name: &str, is_it: impl Fn(&Form) -> bool) -> Option<Form> {
    options.iter().filter(|option| option.name == name).map(Form::of).find(is_it)
}

#[cfg(test)]
mod test {
    use super::*;

    fn channel(line: &str) -> Option<(String, PathBuf)> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let found = Channel::find(&words, Path::new("/srv/vm"))?;
        Some((found.chardev, found.socket))
    }

    #[test]
    fn agent_is_found_in_each_form_of_the_command_line() {
        let port = "-device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";
        let found = |path: &str| Some(("qga0".to_owned(), PathBuf::from(path)));
        for (socket, path) in [
            ("socket,path=vm.qga,server=on,wait=off,id=qga0", "/srv/vm/vm.qga"),
            ("socket,id=qga0,server,nowait,path=/run/qga", "/run/qga"),
        ] {
            assert_eq!(channel(&format!("-chardev {socket} {port}")), found(path), "{socket}");
        }
        let json = concat!(
            r#"-device {"driver":"virtserialport","bus":"b.0","chardev":"qga0","#,
            r#""name":"org.qemu.guest_agent.0"}"#
        );
        let socket =
            "-chardev socket,id=other,path=x,server=on -chardev socket,id=qga0,path=q,server=on";
        assert_eq!(channel(&format!("{json} {socket}")), found("/srv/vm/q"));
    }

    #[test]
    fn agent_without_a_socket_of_qemu_is_not_asked() {
        let port = "-device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";
        for line in [
            "-m 1G".to_owned(),
            port.to_owned(),
            format!("{port} -chardev pty,id=qga0"),
            format!("{port} -chardev socket,id=qga0,host=localhost,port=7,server=on"),
            format!("{port} -chardev socket,id=qga0,path=q"),
            format!("{port} -chardev socket,id=qga0,path=q,server=on,abstract=on"),
            "-chardev socket,id=qga0,path=q,server=on -device virtserialport,chardev=qga0"
                .to_owned(),
        ] {
            assert_eq!(channel(&line), None, "{line}");
        }
    }
}
