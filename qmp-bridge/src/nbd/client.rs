//! The connection: requests go out through a writer task, replies come back in any order through a
//! reader task.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::NbdError;
use super::chunks::{self, Kind, Outcome, Pending, io_error};
use super::coverage::Coverage;
use super::extents::{ContextExtents, Extent};
use super::handshake::{self, ExportInfo};
use super::wire::*;

/// How long one request may take. Local storage answers in milliseconds; a disk on a slow network
/// may need seconds.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a polite disconnect may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
const READ_BUFFER: usize = 256 << 10;

/// What `write_zeroes` may leave behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// The blocks may be unmapped.
    Hole,
    /// The blocks must be allocated, which hides what a backing image has there.
    Allocated,
}

type Frame = ([u8; 28], Bytes);

#[derive(Debug)]
enum State {
    Open(HashMap<u64, Pending>),
    Ended(NbdError),
}

type SharedState = Arc<Mutex<State>>;

#[derive(Debug)]
struct Inner {
    info: ExportInfo,
    frames: mpsc::Sender<Frame>,
    state: SharedState,
    slots: Semaphore,
    cookies: AtomicU64,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

/// A connection to one export; clones share it. For more throughput open several.
#[derive(Debug, Clone)]
pub struct NbdClient {
    inner: Arc<Inner>,
}

fn lock(state: &SharedState) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails every waiting request and all that come.
fn end(state: &SharedState, why: NbdError) {
    let mut state = lock(state);
    if let State::Open(pending) = std::mem::replace(&mut *state, State::Ended(why.clone())) {
        for (_, request) in pending {
            let _ = request.sender.send(Err(why.clone()));
        }
    }
}

/// Whether a server listens at `path`, however busy it is.
pub(crate) async fn answers(path: &Path) -> bool {
    let Ok(Ok(mut stream)) =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, UnixStream::connect(path)).await
    else {
        return false;
    };
    // Who has accepted lives, whatever becomes of the farewell.
    let left = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake::leave(&mut stream)).await;
    tracing::trace!(?left, "an NBD server answers");
    true
}

impl NbdClient {
    /// Connects to `export` behind a unix socket and asks for all of `contexts`; one that is
    /// missing is an error.
    ///
    /// # Errors
    /// When nothing listens there, or the server does not have the export or a context.
    pub async fn connect(path: &Path, export: &str, contexts: &[&str]) -> Result<Self, NbdError> {
        let error = |why: String| NbdError::Connect { path: path.into(), why };
        let handshake = async {
            let stream =
                UnixStream::connect(path).await.map_err(|source| error(source.to_string()))?;
            let (read, write) = stream.into_split();
            Self::over(read, write, export, contexts).await
        };
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(result) => result,
            Err(_) => Err(error(format!("no handshake within {HANDSHAKE_TIMEOUT:?}"))),
        }
    }

    /// The same on a connection whose server has accepted it, without a limit of time.
    ///
    /// # Errors
    /// When the peer is no NBD server, or does not have the export or a context.
    pub async fn over(
        mut read: impl AsyncRead + Send + Unpin + 'static,
        mut write: impl AsyncWrite + Send + Unpin + 'static,
        export: &str,
        contexts: &[&str],
    ) -> Result<Self, NbdError> {
        let mut both = tokio::io::join(&mut read, &mut write);
        let info = handshake::negotiate(&mut both, export, contexts).await?;
        Ok(Self::start(read, write, info))
    }

    fn start(
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
        info: ExportInfo,
    ) -> Self {
        let state: SharedState = Arc::new(Mutex::new(State::Open(HashMap::new())));
        let (frames, queue) = mpsc::channel(MAX_IN_FLIGHT);
        let reader =
            tokio::spawn(read_replies(BufReader::with_capacity(READ_BUFFER, read), state.clone()));
        let writer = tokio::spawn(write_frames(write, queue, state.clone()));
        let slots = Semaphore::new(MAX_IN_FLIGHT);
        Self {
            inner: Arc::new(Inner {
                info,
                frames,
                state,
                slots,
                cookies: AtomicU64::new(1),
                reader,
                writer,
            }),
        }
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.inner.info.size
    }

    /// Longest read or write in bytes.
    pub fn max_request(&self) -> u32 {
        self.inner.info.max_request
    }

    /// Whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.inner.info.flags & EXPORT_READ_ONLY != 0
    }

    /// Reads one request's worth of bytes.
    ///
    /// # Errors
    /// When the range is outside of the export or longer than a request, or the server reports an
    /// error.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, NbdError> {
        self.check_bounds("read", offset, u64::from(length), u64::from(self.max_request()))?;
        let kind = Kind::Read { buffer: vec![0; length as usize], coverage: Coverage::default() };
        match self.request("read", CMD_READ, 0, (offset, length), kind, Bytes::new()).await? {
            Outcome::Data(data) => Ok(data),
            other => Err(NbdError::Protocol(format!("{other:?} in reply to a read"))),
        }
    }

    /// Writes one request's worth of bytes.
    ///
    /// # Errors
    /// When the range is outside of the export or longer than a request, or the server reports an
    /// error.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        self.check_bounds("write", offset, data.len() as u64, u64::from(self.max_request()))?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most the size of a request, as just checked"
        )]
        let length = data.len() as u32;
        self.request("write", CMD_WRITE, 0, (offset, length), Kind::Plain, data).await.map(drop)
    }

    /// Any length: it is cut into requests.
    ///
    /// # Errors
    /// When the range is outside of the export, or the server reports an error.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<(), NbdError> {
        self.need("write_zeroes", EXPORT_SEND_WRITE_ZEROES)?;
        let flags = if mode == ZeroMode::Allocated { CMD_FLAG_NO_HOLE } else { 0 };
        self.cut("write_zeroes", CMD_WRITE_ZEROES, flags, offset, length).await
    }

    /// Any length: it is cut into requests. What a trimmed block reads as is the image's business.
    ///
    /// # Errors
    /// When the range is outside of the export, or the server reports an error.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), NbdError> {
        self.need("trim", EXPORT_SEND_TRIM)?;
        self.cut("trim", CMD_TRIM, 0, offset, length).await
    }

    /// Everything answered before is on stable storage after this.
    ///
    /// # Errors
    /// When the server reports an error.
    pub async fn flush(&self) -> Result<(), NbdError> {
        self.need("flush", EXPORT_SEND_FLUSH)?;
        self.request("flush", CMD_FLUSH, 0, (0, 0), Kind::Plain, Bytes::new()).await.map(drop)
    }

    /// The extents of every context asked for at [`Self::connect`], over exactly this range. A
    /// large fragmented disk has many: go through it window by window.
    ///
    /// # Errors
    /// When the range is outside of the export, or the server reports an error.
    pub async fn block_status(
        &self,
        offset: u64,
        length: u64,
    ) -> Result<Vec<ContextExtents>, NbdError> {
        self.check_bounds("block_status", offset, length, u64::MAX)?;
        let end = offset + length;
        let contexts = &self.inner.info.contexts;
        let empty = |(_, name): &(u32, String)| ContextExtents {
            context: name.clone(),
            extents: Vec::new(),
        };
        let mut known: Vec<ContextExtents> = contexts.iter().map(empty).collect();
        let mut at = offset;
        while at < end && !known.is_empty() {
            let step = (end - at).min(MAX_STATUS_RANGE);
            let kind = Kind::Status(Vec::new());
            let outcome = self
                .request("block_status", CMD_BLOCK_STATUS, 0, (at, step as u32), kind, Bytes::new())
                .await?;
            let Outcome::Status(states) = outcome else {
                return Err(NbdError::Protocol(format!("{outcome:?} in reply to block_status")));
            };
            append_states(contexts, &mut known, &states, at)?;
            // Contexts may reach differently far; continue where the shortest ends.
            let reached = known.iter().map(|context| context.end(at)).min().unwrap_or(at).min(end);
            if reached <= at {
                return Err(NbdError::Protocol(format!("no block status for {at}")));
            }
            known.iter_mut().for_each(|context| context.truncate(reached));
            at = reached;
        }
        Ok(known)
    }

    /// Says goodbye and waits a moment for the server to hang up, so that the export can be removed
    /// at once.
    pub async fn close(self) {
        let goodbye = request(0, CMD_DISCONNECT, 0, 0, 0);
        let ended = async {
            if self.inner.frames.send((goodbye, Bytes::new())).await.is_ok() {
                while matches!(*lock(&self.inner.state), State::Open(_)) {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            }
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the NBD server did not hang up");
        }
    }

    fn need(&self, command: &str, flag: u16) -> Result<(), NbdError> {
        if self.inner.info.flags & flag != 0 {
            return Ok(());
        }
        Err(NbdError::Refused { what: command.into(), why: "this export does not offer it".into() })
    }

    fn check_bounds(
        &self,
        command: &'static str,
        offset: u64,
        length: u64,
        limit: u64,
    ) -> Result<(), NbdError> {
        let size = self.size();
        if length <= limit && offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(NbdError::Bounds { command, offset, length, size, limit })
    }

    async fn cut(
        &self,
        name: &'static str,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Result<(), NbdError> {
        self.check_bounds(name, offset, length, u64::MAX)?;
        let (mut at, end) = (offset, offset + length);
        while at < end {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "at most the size of a request, a u32"
            )]
            let step = (end - at).min(u64::from(self.max_request())) as u32;
            self.request(name, command, flags, (at, step), Kind::Plain, Bytes::new()).await?;
            at += u64::from(step);
        }
        Ok(())
    }

    async fn request(
        &self,
        name: &'static str,
        command: u16,
        flags: u16,
        (offset, length): (u64, u32),
        kind: Kind,
        payload: Bytes,
    ) -> Result<Outcome, NbdError> {
        let inner = &self.inner;
        let exchange = async {
            // A slot is free again when the caller gives up, though the server may still be busy
            // with it: the reader copes with late replies, and the server's own limit holds.
            let _slot =
                inner.slots.acquire().await.map_err(|_| NbdError::Closed("shut down".into()))?;
            let cookie = inner.cookies.fetch_add(1, Ordering::Relaxed);
            let (sender, receiver) = oneshot::channel();
            let pending = Pending {
                command: name,
                offset,
                length: u64::from(length),
                kind,
                error: None,
                sender,
            };
            match &mut *lock(&inner.state) {
                State::Ended(why) => return Err(why.clone()),
                State::Open(requests) => requests.insert(cookie, pending),
            };
            let _forget = Forget { state: &inner.state, cookie };
            let frame = (request(flags, command, cookie, offset, length), payload);
            inner
                .frames
                .send(frame)
                .await
                .map_err(|_| NbdError::Closed("the writer ended".into()))?;
            receiver.await.unwrap_or_else(|_| Err(NbdError::Closed("the reader ended".into())))
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, exchange).await {
            Ok(result) => result,
            Err(_) => Err(NbdError::Timeout { command: name, offset, after: REQUEST_TIMEOUT }),
        }
    }
}

/// Removes a request from the list when its caller no longer waits.
struct Forget<'a> {
    state: &'a SharedState,
    cookie: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let State::Open(requests) = &mut *lock(self.state) {
            requests.remove(&self.cookie);
        }
    }
}

fn append_states(
    contexts: &[(u32, String)],
    known: &mut [ContextExtents],
    states: &[(u32, Vec<(u32, u32)>)],
    at: u64,
) -> Result<(), NbdError> {
    for ((id, name), context) in contexts.iter().zip(known) {
        let Some((_, runs)) = states.iter().find(|(state, _)| state == id) else {
            return Err(NbdError::Protocol(format!("no block status of context {name}")));
        };
        let mut start = at;
        for (length, flags) in runs {
            let end = start.saturating_add(u64::from(*length));
            if end == start {
                return Err(NbdError::Protocol("an extent of no length".into()));
            }
            context.push(Extent { start, end, flags: *flags });
            start = end;
        }
    }
    Ok(())
}

async fn write_frames(
    mut socket: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Frame>,
    state: SharedState,
) {
    while let Some((header, payload)) = queue.recv().await {
        let written = async {
            socket.write_all(&header).await?;
            socket.write_all(&payload).await
        };
        if let Err(error) = written.await {
            return end(&state, io_error(error));
        }
    }
}

async fn read_replies(mut reader: impl AsyncRead + Unpin, state: SharedState) {
    loop {
        if let Err(error) = read_reply(&mut reader, &state).await {
            return end(&state, error);
        }
    }
}

fn take(state: &SharedState, cookie: u64) -> Option<Pending> {
    match &mut *lock(state) {
        State::Open(requests) => requests.remove(&cookie),
        State::Ended(_) => None,
    }
}

async fn read_reply(
    reader: &mut (impl AsyncRead + Unpin),
    state: &SharedState,
) -> Result<(), NbdError> {
    match reader.read_u32().await.map_err(io_error)? {
        SIMPLE_REPLY_MAGIC => {
            let errno = reader.read_u32().await.map_err(io_error)?;
            let cookie = reader.read_u64().await.map_err(io_error)?;
            if let Some(mut pending) = take(state, cookie) {
                pending.simple(errno)?;
                pending.finish();
            }
            Ok(())
        }
        CHUNK_MAGIC => read_chunk(reader, state).await,
        other => Err(NbdError::Protocol(format!("a reply begins with {other:#x}"))),
    }
}

async fn read_chunk(
    reader: &mut (impl AsyncRead + Unpin),
    state: &SharedState,
) -> Result<(), NbdError> {
    let mut header = [0; 16];
    reader.read_exact(&mut header).await.map_err(io_error)?;
    let mut fields = Fields(&header);
    let (Some(flags), Some(kind), Some(cookie), Some(length)) =
        (fields.u16(), fields.u16(), fields.u64(), fields.u32())
    else {
        return Err(NbdError::Protocol("a short chunk header".into()));
    };
    // While its chunk is read the request is ours alone, so nothing is locked across a wait.
    let Some(mut pending) = take(state, cookie) else { return chunks::skip(reader, length).await };
    let result = pending.chunk(reader, kind, length).await;
    if let Err(error) = result {
        pending.error = Some(error.clone());
        pending.finish();
        return Err(error);
    }
    if flags & CHUNK_DONE != 0 {
        pending.finish();
    } else if !pending.sender.is_closed()
        && let State::Open(requests) = &mut *lock(state)
    {
        requests.insert(cookie, pending);
    }
    Ok(())
}

#[cfg(test)]
mod test;
