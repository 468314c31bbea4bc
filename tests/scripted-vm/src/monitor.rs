//! One client at the monitor: lines in, with descriptors beside them; answers and events out.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::state::script::Act;
use crate::state::{Refusal, send};
use crate::{Shared, lock, start_threads};

/// Serves the client on a thread of its own until it leaves.
pub(crate) fn serve(shared: Shared, stream: UnixStream) {
    let out = Arc::new(stream.try_clone().expect("a socket"));
    {
        let mut state = lock(&shared);
        if state.has_ended {
            return;
        }
        let version = state.version;
        let version = json!({
            "qemu": { "major": version.major, "minor": version.minor, "micro": version.micro },
            "package": "scripted",
        });
        send(&out, &json!({ "QMP": { "version": version, "capabilities": ["oob"] } }));
        state.connections.push(Arc::clone(&out));
    }
    std::thread::spawn(move || {
        let mut client = Client { shared, stream, out, buffer: Vec::new(), fds: Vec::new() };
        while let Some(message) = client.next() {
            if !client.obey(&message) {
                break;
            }
        }
        let _ = client.out.shutdown(std::net::Shutdown::Both);
        lock(&client.shared).connections.retain(|other| !Arc::ptr_eq(other, &client.out));
    });
}

struct Client {
    shared: Shared,
    stream: UnixStream,
    out: Arc<UnixStream>,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Client {
    fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            if self.receive()? == 0 {
                return None;
            }
        }
    }

    fn receive(&mut self) -> Option<usize> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.stream, &mut parts, &mut beside, RecvFlags::CMSG_CLOEXEC).ok()?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.buffer.extend(&bytes[..got.bytes]);
        Some(got.bytes)
    }

    /// Whether the connection continues.
    fn obey(&mut self, message: &Value) -> bool {
        let command = message["execute"].as_str().unwrap_or_default().to_owned();
        // It may have come with a command that stands behind this one.
        let takes_fd = matches!(command.as_str(), "getfd" | "add-fd") && !self.fds.is_empty();
        let fd = takes_fd.then(|| self.fds.remove(0));
        let act = {
            let mut state = lock(&self.shared);
            if command != "qmp_capabilities" {
                state.log.push(command.clone());
            }
            state.script.take(&command)
        };
        match act {
            Some(Act::Silence) => true,
            Some(Act::Cut) => false,
            Some(Act::Refuse(why)) => {
                let _state = lock(&self.shared);
                self.reply(message, Err(Refusal::generic(why)));
                true
            }
            Some(Act::Hold(hold)) if !hold.is_after => {
                hold.wait();
                // The client may have been killed meanwhile, and QEMU throws its commands away.
                if !self.is_connected() {
                    return false;
                }
                self.run(message, &command, fd, None)
            }
            other => self.run(message, &command, fd, other),
        }
    }

    fn is_connected(&self) -> bool {
        lock(&self.shared).connections.iter().any(|other| Arc::ptr_eq(other, &self.out))
    }

    fn run(
        &mut self,
        message: &Value,
        command: &str,
        fd: Option<OwnedFd>,
        act: Option<Act>,
    ) -> bool {
        let (mut is_answered, mut continues) = (true, true);
        let mut after = None;
        let mut state = lock(&self.shared);
        match act {
            Some(Act::Before(act)) => act(&mut state),
            Some(Act::After(act)) => after = Some(act),
            Some(Act::LoseAnswer) => is_answered = false,
            Some(Act::CutAfter) => (is_answered, continues) = (false, false),
            Some(Act::Late(time)) => {
                drop(state);
                std::thread::sleep(time);
                state = lock(&self.shared);
            }
            Some(Act::Hold(hold)) => {
                let done = state.execute(command, &message["arguments"], fd);
                drop(state);
                start_threads(&self.shared);
                hold.wait();
                let _state = lock(&self.shared);
                self.reply(message, done);
                return true;
            }
            _ => {}
        }
        let done = state.execute(command, &message["arguments"], fd);
        if is_answered {
            self.reply(message, done);
        }
        if let Some(act) = after {
            act(&mut state);
        }
        drop(state);
        start_threads(&self.shared);
        continues
    }

    /// To be called with the state locked, so that events keep their place between answers.
    fn reply(&self, message: &Value, done: Result<Value, Refusal>) {
        let id = &message["id"];
        send(
            &self.out,
            &match done {
                Ok(value) => json!({ "return": value, "id": id }),
                Err(Refusal { class, description }) => {
                    json!({ "error": { "class": class, "desc": description }, "id": id })
                }
            },
        );
    }
}
