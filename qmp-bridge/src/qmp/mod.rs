//! A QMP connection: commands in, replies and events out.
//!
//! Commands, their arguments and QEMU's error classes come from the `qapi` crate. Its own reader is
//! not used: it closes the connection at the first event or enum value newer than its schema, and
//! at a reply whose caller has given up waiting. Here a reply whose caller no longer waits is
//! dropped, and an unknown event is just an event.
//!
//! A line is written synchronously, by the caller, under a lock: it is at most a few KiB, a dropped
//! future can never leave half a line behind, and a guard's `drop` can send `cont` without a
//! runtime.

mod error;
pub mod line;
pub mod replies;
mod turn;
mod watch;
mod wire;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::names::ObjectNames;
use crate::quirks::{Quirk, Release};
pub use error::QmpError;
use turn::CaptureTurn;
pub use watch::EventWatch;
use wire::Connection;
pub use wire::connect_when_ready;

/// How long a command may take unless [`Qmp::with_timeout`] says otherwise.
pub const DEFAULT_COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Events kept for a slow listener; older ones are dropped, and the listener
/// gets an error.
pub const EVENT_QUEUE: usize = 256;

/// The `QMP.version` part of the greeting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
    /// The distributor's suffix, e.g. `Debian 1:10.0.2+ds-2`.
    pub package: String,
}

impl QemuVersion {
    /// Its first two numbers.
    pub fn release(&self) -> Release {
        Release { major: self.major, minor: self.minor }
    }

    /// Whether this QEMU does that.
    pub fn has(&self, quirk: Quirk) -> bool {
        self.release().has(quirk)
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An asynchronous message of QEMU.
#[derive(Debug, Clone)]
pub struct QmpEvent {
    /// QEMU's name of it, in capitals.
    pub name: String,
    /// Its members.
    pub data: Value,
    /// When it was read from the socket.
    pub at: Instant,
}

/// A handle on one QMP connection; clones share it. The socket closes with the last clone.
#[derive(Clone, Debug)]
pub struct Qmp {
    connection: Arc<Connection>,
    /// Whose turn it is to have a capture in this QEMU.
    capture_turn: Arc<CaptureTurn>,
    names: Arc<ObjectNames>,
    timeout: Duration,
}

impl Qmp {
    /// Connects and negotiates. Within `timeout` it waits for a socket that is not there yet, since
    /// QEMU makes it a moment after its start; one that has just been made is let alone for 250 ms
    /// more, since QEMU may hang on a client that comes too early; and one that refuses for 2 s
    /// belongs to no QEMU any more. A monitor already in use accepts but never greets: see the
    /// error.
    ///
    /// # Errors
    /// When nothing listens there, another client has the monitor, or QEMU does not answer within
    /// `timeout`.
    pub async fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, QmpError> {
        Self::negotiate(wire::open(path.as_ref(), timeout).await?, timeout).await
    }

    /// Negotiates on the other end of a socket that QEMU was started with (`-chardev socket,fd=N`).
    /// Unlike with a listening socket, a client can send while QEMU starts: QEMU need not accept a
    /// connection first.
    ///
    /// # Errors
    /// When the peer does not greet as a monitor within `timeout`.
    pub async fn over(socket: UnixStream, timeout: Duration) -> Result<Self, QmpError> {
        Self::negotiate(wire::over(socket, timeout).await?, timeout).await
    }

    async fn negotiate(connection: Connection, timeout: Duration) -> Result<Self, QmpError> {
        let qmp = Self {
            connection: Arc::new(connection),
            capture_turn: Arc::default(),
            names: Arc::new(ObjectNames::of("")),
            timeout: DEFAULT_COMMAND_TIMEOUT,
        };
        qmp.with_timeout(timeout).execute(qapi::qmp::qmp_capabilities { enable: None }).await?;
        Ok(qmp)
    }

    /// The same connection with another limit per command.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// The same connection on behalf of an instance of a VM: what is put into QEMU is named after
    /// it.
    #[must_use]
    pub fn for_instance(&self, instance: &str) -> Self {
        Self { names: Arc::new(ObjectNames::of(instance)), ..self.clone() }
    }

    pub(crate) fn names(&self) -> &ObjectNames {
        &self.names
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// QEMU's version as its greeting gave it.
    pub fn version(&self) -> &QemuVersion {
        self.connection.version()
    }

    pub(crate) fn capture_turn(&self) -> &Arc<CaptureTurn> {
        &self.capture_turn
    }

    /// Runs a command of the `qapi` schema. For what a reply holds see [`replies`]: the schema's
    /// own types fail at enumerations that have grown and at fields that other versions lack.
    ///
    /// # Errors
    /// When QEMU reports an error, does not answer in time, or has closed the connection.
    pub async fn execute<C: qapi::Command>(&self, command: C) -> Result<C::Ok, QmpError> {
        let arguments = serde_json::to_value(&command)
            .map_err(|source| QmpError::Encode { command: C::NAME.into(), source })?;
        self.query(C::NAME, arguments).await
    }

    /// Runs a command whose reply is read.
    pub(crate) async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        replies::parse(command, self.execute_json(command, arguments).await?)
    }

    /// Runs any command whose reply says nothing; `arguments` is an object or null.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn execute_json(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        Ok(self.run(command, arguments, None).await?.0)
    }

    /// The same, with the time at which the reply was read: events of a later one came after it.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn execute_timed(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<(Value, Instant), QmpError> {
        self.run(command, arguments, None).await
    }

    /// Runs a command with a file descriptor as ancillary data (`getfd`, `add-fd`).
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        Ok(self.run(command, arguments, Some(fd)).await?.0)
    }

    /// Runs an HMP line and returns its text. HMP reports failure as text only, so the caller must
    /// look at it.
    ///
    /// # Errors
    /// As for [`Self::execute`]; what QEMU prints is not looked at.
    pub async fn hmp(&self, line: &str) -> Result<String, QmpError> {
        self.query("human-monitor-command", json!({ "command-line": line })).await
    }

    /// Sends a command without waiting; its reply is dropped. Needs no runtime, so a `Drop` may
    /// call it.
    ///
    /// # Errors
    /// When the command cannot be written.
    pub fn send_detached(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        let id = self.connection.next_id();
        self.connection.send(command, &encode(command, arguments, id)?, None)
    }

    /// Sends a command and blocks the thread until QEMU answered, but not longer than `timeout`;
    /// returns whether QEMU accepted the command. For a `Drop` whose
    /// command must count although the process may end next: QEMU throws commands away that it has
    /// read and not yet begun when the connection closes (seen: a `cont` followed by a close is
    /// lost in most cases).
    ///
    /// # Errors
    /// When the command cannot be written.
    pub fn send_and_linger(
        &self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<bool, QmpError> {
        let id = self.connection.next_id();
        let line = encode(command, arguments, id)?;
        let reply = self.connection.expect_reply(command, id)?;
        self.connection.send(command, &line, None)?;
        let accepted = reply.wait_blocking(&self.connection, timeout);
        accepted.ok_or_else(|| QmpError::Timeout { command: command.into(), after: timeout })
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.connection.events()
    }

    /// Keeps the events of these names from now on.
    pub fn watch(&self, names: &'static [&'static str]) -> EventWatch {
        self.connection.watch(names)
    }

    /// Resolves when the connection is gone: QEMU ended or closed the monitor.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }

    async fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(Value, Instant), QmpError> {
        let id = self.connection.next_id();
        let line = encode(command, arguments, id)?;
        let reply = self.connection.expect_reply(command, id)?;
        self.connection.send(command, &line, fd)?;
        match within(self.timeout, reply.wait()).await {
            Some(Some((Ok(value), at))) => Ok((value, at)),
            Some(Some((Err(refusal), _))) => Err(QmpError::refused(command, refusal)),
            Some(None) => Err(self.connection.closed_error(command)),
            None => Err(QmpError::Timeout { command: command.into(), after: self.timeout }),
        }
    }
}

/// Waits for a time in which this process can run: while a host is stopped (suspended, or out of
/// memory), QEMU does too, and all of that counts as one slice.
async fn within<T>(timeout: Duration, work: impl Future<Output = T>) -> Option<T> {
    const SLICES: u32 = 8;
    let mut work = pin!(work);
    for _ in 0..SLICES {
        if let Ok(done) = tokio::time::timeout(timeout / SLICES, &mut work).await {
            return Some(done);
        }
    }
    None
}

fn encode(command: &str, arguments: Value, id: u64) -> Result<Vec<u8>, QmpError> {
    let mut message = json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        message["arguments"] = arguments;
    }
    let mut line = serde_json::to_vec(&message)
        .map_err(|source| QmpError::Encode { command: command.into(), source })?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
pub(crate) mod test;
