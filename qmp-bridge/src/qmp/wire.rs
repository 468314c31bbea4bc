//! Lines on the QMP socket: a locked synchronous writer and one reader task that hands out replies
//! by id.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::JoinHandle;

use super::line::{LineBuffer, Message};
use super::watch::{EventWatch, Seen};
use super::{EVENT_QUEUE, QemuVersion, QmpError, QmpEvent};

/// Most lines of an earlier session that may come before the greeting.
const MAX_LINES_BEFORE_GREETING: usize = 1024;
/// Most commands waiting for their reply at once.
const MAX_PENDING: usize = 1024;
/// How long QEMU may leave our lines unread with its socket buffer full before the connection
/// counts as dead.
const WRITE_TIMEOUT_MS: u16 = 5_000;
/// Interval between two checks for the reply of a lingering command.
const LINGER_POLL: Duration = Duration::from_micros(200);
/// How many unread bytes those checks read; events before the reply have some hundred bytes.
const PEEKED: usize = 64 << 10;
/// Pause between attempts to reach a socket that is not there yet.
const CONNECT_RETRY: Duration = Duration::from_millis(5);
/// A socket that refuses connections for so long was left by a QEMU that has ended: bind(2) and
/// listen(2) are only microseconds apart.
const DESERTED: Duration = Duration::from_secs(2);
/// A listening socket younger than this is left alone.
///
/// While QEMU (all versions known) starts, the main thread watches a `server=on,wait=off` socket
/// from the moment it is bound, and hands it over to the monitor's thread a little later, without a
/// lock. To a client that connects in between, one of these happens, about once in a thousand
/// starts on an overloaded host: both threads accept, and one waits in accept(2) for ever; both
/// then read the connection, byte by byte, and no command arrives whole; or the client is greeted
/// twice. The migration to the other thread takes less than a millisecond on an idle CPU.
const SETTLING: Duration = Duration::from_millis(250);

/// What QEMU said to a command, and when that was read.
pub(super) type Answer = (Result<Value, qapi::Error>, Instant);
type Waiting = HashMap<u64, oneshot::Sender<Answer>>;

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    events: broadcast::Sender<QmpEvent>,
    watches: Mutex<Vec<Weak<Seen>>>,
    /// Why the connection ended; `None` while it lives.
    ended: watch::Sender<Option<String>>,
}

impl Shared {
    fn new() -> Self {
        Self {
            waiting: Mutex::default(),
            events: broadcast::channel(EVENT_QUEUE).0,
            watches: Mutex::default(),
            ended: watch::channel(None).0,
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: QmpEvent) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.retain(|watch| {
            watch.upgrade().is_some_and(|seen| {
                seen.note(&event);
                true
            })
        });
        // Sending fails only when there is no listener.
        let _ = self.events.send(event);
    }

    /// Marks the end first, so that no command can start waiting after the waiters were woken.
    fn end(&self, why: String) {
        self.ended.send_if_modified(|slot| slot.is_none().then(|| *slot = Some(why)).is_some());
        self.waiting().clear();
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    writer: Mutex<StdStream>,
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
    ids: AtomicU64,
    version: QemuVersion,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// The wait for one reply; dropping it forgets the command.
pub(super) struct Reply<'a> {
    shared: &'a Shared,
    id: u64,
    receiver: oneshot::Receiver<Answer>,
}

impl Reply<'_> {
    /// `None` when the connection ended first.
    pub(super) async fn wait(mut self) -> Option<Answer> {
        (&mut self.receiver).await.ok()
    }

    /// Waits without a runtime: either the reader task, on another thread, takes the reply, or it
    /// lies unread in the socket because this very thread should have run the reader. Returns
    /// whether it is an acceptance; none if no reply came.
    pub(super) fn wait_blocking(
        mut self,
        connection: &Connection,
        timeout: Duration,
    ) -> Option<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.receiver.try_recv() {
                Ok((reply, _)) => return Some(reply.is_ok()),
                Err(oneshot::error::TryRecvError::Closed) => return None,
                Err(oneshot::error::TryRecvError::Empty) => {}
            }
            if let Some(accepted) = connection.unread_reply(self.id) {
                return Some(accepted);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(LINGER_POLL);
        }
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        self.shared.waiting().remove(&self.id);
    }
}

impl Connection {
    pub(super) fn version(&self) -> &QemuVersion {
        &self.version
    }

    pub(super) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.shared.events.subscribe()
    }

    pub(super) fn watch(&self, names: &'static [&'static str]) -> EventWatch {
        let seen = Arc::new(Seen::of(names));
        self.shared
            .watches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(&seen));
        EventWatch(seen)
    }

    pub(super) async fn closed(&self) {
        // An error means that the sender is gone, which is an end as well.
        let _ = self.shared.ended.subscribe().wait_for(Option::is_some).await;
    }

    /// The reply to `id`, if it lies in the socket, looked at without taking it: whether it is an
    /// acceptance.
    fn unread_reply(&self, id: u64) -> Option<bool> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unread = vec![0; PEEKED];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let count = recv(writer.as_raw_fd(), &mut unread, flags).unwrap_or(0);
        let mut lines = unread[..count].split(|byte| *byte == b'\n');
        lines.find_map(|line| match Message::parse(line) {
            Ok(Message::Reply(is, result)) if is == id => Some(result.is_ok()),
            _ => None,
        })
    }

    pub(super) fn closed_error(&self, command: &str) -> QmpError {
        let why = self.shared.ended.borrow().clone().unwrap_or_else(|| "the reader stopped".into());
        QmpError::Closed { command: command.into(), why }
    }

    pub(super) fn expect_reply(&self, command: &str, id: u64) -> Result<Reply<'_>, QmpError> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.shared.waiting();
        if self.shared.ended.borrow().is_some() {
            return Err(self.closed_error(command));
        }
        if waiting.len() >= MAX_PENDING {
            let why = format!("{MAX_PENDING} commands already wait for QEMU");
            return Err(QmpError::Closed { command: command.into(), why });
        }
        waiting.insert(id, sender);
        Ok(Reply { shared: &self.shared, id, receiver })
    }

    pub(super) fn send(
        &self,
        command: &str,
        line: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), QmpError> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_line(&writer, line, fd).map_err(|errno| {
            let why = format!("writing to the socket: {errno}");
            // A half-written line cannot be undone: QEMU could not parse anything after it.
            self.shared.end(why.clone());
            QmpError::Closed { command: command.into(), why }
        })
    }
}

fn write_line(
    socket: &StdStream,
    mut line: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let mut ancillary: Vec<ControlMessage<'_>> =
        fds.iter().map(|fds| ControlMessage::ScmRights(fds.as_slice())).collect();
    while !line.is_empty() {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(line)],
            &ancillary,
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        );
        match sent {
            Ok(count) => {
                line = &line[count..];
                ancillary.clear();
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_writable(socket)?,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn wait_writable(socket: &StdStream) -> Result<(), Errno> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::from(WRITE_TIMEOUT_MS)) {
        Ok(0) => Err(Errno::ETIMEDOUT),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Connects, reads the greeting and starts the reader.
pub(super) async fn open(path: &Path, timeout: Duration) -> Result<Connection, QmpError> {
    let deadline = Instant::now() + timeout;
    let connect_error = |source| QmpError::Connect { path: path.into(), source };
    let stream = connect_until(path, deadline).await.map_err(connect_error)?;
    begin(stream, deadline).await.map_err(|failure| match failure {
        Beginning::Broken(source) => connect_error(source),
        Beginning::Silent => QmpError::NoGreeting { path: path.into(), after: timeout },
        Beginning::Foreign(why) => QmpError::NotQmp { path: path.into(), why },
    })
}

/// The same on a socket whose other end QEMU has already.
pub(super) async fn over(socket: StdStream, timeout: Duration) -> Result<Connection, QmpError> {
    let deadline = Instant::now() + timeout;
    let begun = async {
        socket.set_nonblocking(true).map_err(Beginning::Broken)?;
        begin(UnixStream::from_std(socket).map_err(Beginning::Broken)?, deadline).await
    };
    begun.await.map_err(|failure| QmpError::NoMonitor {
        why: match failure {
            Beginning::Broken(source) => source.to_string(),
            Beginning::Silent => format!("no greeting within {timeout:?}"),
            Beginning::Foreign(why) => why,
        },
    })
}

/// Why a connected socket did not become a [`Connection`].
enum Beginning {
    Broken(std::io::Error),
    Silent,
    Foreign(String),
}

async fn begin(stream: UnixStream, deadline: Instant) -> Result<Connection, Beginning> {
    let writer = stream.as_fd().try_clone_to_owned().map_err(Beginning::Broken)?;
    let mut lines = Lines { stream, buffer: LineBuffer::default() };
    let greeting = tokio::time::timeout_at(deadline.into(), read_greeting(&mut lines)).await;
    let version = greeting.map_err(|_| Beginning::Silent)?.map_err(Beginning::Foreign)?;
    let shared = Arc::new(Shared::new());
    let reader = tokio::spawn(read_all(lines, shared.clone()));
    Ok(Connection {
        writer: Mutex::new(writer.into()),
        shared,
        reader,
        ids: AtomicU64::new(first_id()),
        version,
    })
}

/// Ids of a connection begin at an unlikely number: a late reply to the client before us must not
/// look like ours.
fn first_id() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) << 20
}

/// Its own loop, since a monitor that refuses is given up sooner than one that is not there yet.
async fn connect_until(path: &Path, deadline: Instant) -> Result<UnixStream, std::io::Error> {
    let mut last_hope = None;
    loop {
        let error = match connect_when_ready(path, deadline).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let end = match error.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                *last_hope.get_or_insert(Instant::now() + DESERTED)
            }
            _ => deadline,
        };
        if Instant::now() + CONNECT_RETRY >= end.min(deadline) {
            return Err(error);
        }
        tokio::time::sleep(CONNECT_RETRY).await;
    }
}

/// Connects to a monitor, but not to one that has only just been bound: it may not listen yet.
///
/// Looks at the file first: a socket that appears only then is younger than any.
///
/// # Errors
/// When nothing accepts the connection by the deadline.
pub async fn connect_when_ready(
    path: &Path,
    deadline: Instant,
) -> Result<UnixStream, std::io::Error> {
    let bound = std::fs::metadata(path)?.modified()?;
    // None when the clock was set back since. It is tried after this one wait in any case.
    let age = bound.elapsed().unwrap_or_default();
    let left = deadline.saturating_duration_since(Instant::now());
    tokio::time::sleep(SETTLING.saturating_sub(age).min(left)).await;
    UnixStream::connect(path).await
}

struct Lines {
    stream: UnixStream,
    buffer: LineBuffer,
}

impl Lines {
    async fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            if let Some(line) = self.buffer.next_line().map_err(|error| error.to_string())? {
                return Ok(line);
            }
            match self.stream.read_buf(self.buffer.unread()).await {
                Ok(0) => return Err("the peer closed the connection".into()),
                Ok(_) => {}
                Err(error) => return Err(format!("reading from the socket: {error}")),
            }
        }
    }
}

async fn read_all(mut lines: Lines, shared: Arc<Shared>) {
    let why = loop {
        match lines.next().await {
            Ok(line) => {
                if let Err(why) = dispatch(&shared, &line) {
                    break why;
                }
            }
            Err(why) => break why,
        }
    };
    tracing::debug!(%why, "QMP connection ended");
    shared.end(why);
}

/// Passes a reply to the caller that waits for it; an error ends the connection.
fn dispatch(shared: &Shared, line: &[u8]) -> Result<(), String> {
    match Message::parse(line) {
        Ok(Message::Event(name, data)) => {
            shared.tell(QmpEvent { name, data, at: Instant::now() });
        }
        Ok(Message::Reply(id, result)) => {
            if let Some(sender) = shared.waiting().remove(&id) {
                let result = result.map_err(|(class, desc)| qapi::Error {
                    class: serde_json::from_value(Value::String(class))
                        .unwrap_or(qapi::ErrorClass::GenericError),
                    desc,
                    id: None,
                });
                // The caller may have stopped waiting in this very moment.
                let _ = sender.send((result, Instant::now()));
            }
        }
        // Each of our commands has an id, so one of them is lost, and its caller would never get a
        // reply. See [`SETTLING`] for how that comes about.
        Ok(Message::Unparsed(why)) => {
            return Err(format!(
                "QEMU could not read what was sent ({why}); a new connection is sound"
            ));
        }
        Ok(Message::Greeting(_) | Message::Foreign) => {}
        Err(error) => tracing::warn!(%error, "ignored a line of QEMU's monitor"),
    }
    Ok(())
}

/// QEMU may send what was left for the client before us, a reply or an event, ahead of the greeting
/// (seen with 7.2).
async fn read_greeting(lines: &mut Lines) -> Result<QemuVersion, String> {
    for _ in 0..MAX_LINES_BEFORE_GREETING {
        let line = lines.next().await?;
        let message = Message::parse(&line).map_err(|error| error.to_string())?;
        if let Message::Greeting(version) = message {
            return Ok(version);
        }
    }
    Err("it does not greet".into())
}
