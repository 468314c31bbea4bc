//! A second monitor of a VM under test: what an administrator would do beside the helper, and a
//! look at the truth.

use crate::process::wait_until;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Error, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(30);
const SETTLING: Duration = Duration::from_millis(250);

pub struct QmpClient {
    read: BufReader<UnixStream>,
    write: UnixStream,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl QmpClient {
    pub fn connect(socket: &Path) -> Self {
        let age = || {
            std::fs::metadata(socket)
                .and_then(|facts| facts.modified())
                .ok()
                .and_then(|bound| bound.elapsed().ok())
        };
        // While QEMU starts, two of its threads may serve one client.
        wait_until(TIMEOUT, || age().is_none_or(|age| age > SETTLING));
        let mut stream = UnixStream::connect(socket);
        // It is refused between the socket's bind and its listen.
        wait_until(TIMEOUT, || {
            let refused = |error: &Error| error.kind() == ErrorKind::ConnectionRefused;
            let again = stream.as_ref().is_err_and(refused);
            if again {
                stream = UnixStream::connect(socket);
            }
            !again
        });
        let stream = stream.unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        stream.set_read_timeout(Some(TIMEOUT)).expect("a socket");
        let mut client = Self {
            read: BufReader::new(stream.try_clone().expect("a socket")),
            write: stream,
            events: Vec::new(),
        };
        client.answer("QMP").expect("a greeting");
        client.execute("qmp_capabilities", json!({}));
        client
    }

    /// Panics with QEMU's own words when it refuses.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let said = writeln!(self.write, "{}", json!({"execute": command, "arguments": arguments}));
        said.map_err(|error| error.to_string())?;
        self.answer("return")
    }

    /// Events since the last call, oldest first.
    pub fn events(&mut self) -> Vec<Value> {
        // Events come in order with answers.
        self.execute("query-status", json!({}));
        std::mem::take(&mut self.events)
    }

    /// When an event of that name came last, in seconds of QEMU's clock (that of the host). Events
    /// are used up.
    pub fn time_of_event(&mut self, name: &str) -> Option<f64> {
        let event = self.events().into_iter().rev().find(|event| event["event"] == name)?;
        let part = |key: &str| event["timestamp"][key].as_f64();
        Some(part("seconds")? + part("microseconds")? / 1e6)
    }

    /// A command of the human monitor; its output.
    pub fn human(&mut self, line: &str) -> String {
        self.execute("human-monitor-command", json!({"command-line": line}))
            .as_str()
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    /// The next message that is no event.
    fn answer(&mut self, key: &str) -> Result<Value, String> {
        loop {
            let mut line = String::new();
            let count = self.read.read_line(&mut line).map_err(|error| error.to_string())?;
            if count == 0 {
                return Err("QEMU has ended".to_owned());
            }
            let mut message: Value =
                serde_json::from_str(&line).map_err(|error| format!("{error} in {line}"))?;
            if let Some(error) = message.get("error") {
                return Err(error.to_string());
            }
            if let Some(value) = message.get_mut(key) {
                return Ok(value.take());
            }
            self.events.push(message);
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.execute("query-status", json!({}))["running"].as_bool().expect("QEMU says so")
    }

    pub fn stop(&mut self) {
        self.execute("stop", json!({}));
    }

    pub fn cont(&mut self) {
        self.execute("cont", json!({}));
    }

    /// The guest's physical memory from 0 on, as QEMU itself writes it out.
    pub fn memory(&mut self, bytes: u64) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        self.execute("pmemsave", json!({"val": 0, "size": bytes, "filename": file.path()}));
        std::fs::read(file.path()).expect("QEMU wrote it")
    }

    /// A request to a drive as a guest would make it, in the language of qemu-io.
    pub fn disk_io(&mut self, drive: &str, command: &str) {
        let said = self.human(&format!("qemu-io {drive} \"{command}\""));
        assert!(said.is_empty(), "{drive}: {command}: {said}");
    }
}
