//! Requests and their replies.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use super::handshake::{ALLOCATION_ID, Session};
use super::{ExportError, Exports};
use crate::nbd::chunks::io_error;
use crate::nbd::extents::{ContextExtents, Extent};
use crate::nbd::wire::*;
use crate::nbd::{MAX_IN_FLIGHT, NbdError};

/// A longer read is read and sent in pieces, if the client takes chunks.
const PIECE: u64 = 1 << 20;
/// Most extents in one reply; the client asks on where they end.
const MAX_EXTENTS: usize = 4096;
/// Longest error text.
const MAX_MESSAGE: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// Why a request fails: the error's number and a text.
struct Failure(u32, String);

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        Self(EIO, error.0)
    }
}

struct Connection<W> {
    session: Session,
    exports: Exports,
    /// Whole replies or whole chunks.
    write: Mutex<W>,
}

/// Answers requests until the client leaves. What is not answered when the connection breaks is
/// given up.
pub(super) async fn run<R, W>(
    mut read: R,
    write: W,
    session: Session,
    exports: Exports,
) -> Result<(), NbdError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let connection = Arc::new(Connection { session, exports, write: Mutex::new(write) });
    let slots = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut requests = JoinSet::new();
    loop {
        let request = read_request(&mut read).await?;
        if request.command == CMD_DISCONNECT {
            // It may not wait for the answers, but it gets them.
            while requests.join_next().await.is_some() {}
            return Ok(());
        }
        while requests.try_join_next().is_some() {}
        let slot = slots.clone().acquire_owned().await.map_err(|_| ended())?;
        let connection = connection.clone();
        requests.spawn(async move {
            if let Err(error) = connection.serve(&request).await {
                // The next read of a request ends the connection.
                tracing::debug!(%error, ?request, "answering an NBD request");
            }
            drop(slot);
        });
    }
}

fn ended() -> NbdError {
    NbdError::Closed("shut down".into())
}

async fn read_request<R: AsyncRead + Unpin>(read: &mut R) -> Result<Request, NbdError> {
    let mut header = [0; 28];
    read.read_exact(&mut header).await.map_err(io_error)?;
    let mut fields = Fields(&header);
    let magic = fields.u32().filter(|magic| *magic == REQUEST_MAGIC);
    let (flags, command, cookie) = (fields.u16(), fields.u16(), fields.u64());
    let (offset, length) = (fields.u64(), fields.u32());
    let (Some(_), Some(flags), Some(command)) = (magic, flags, command) else {
        return Err(NbdError::Protocol("a request begins with another number".into()));
    };
    let (Some(cookie), Some(offset), Some(length)) = (cookie, offset, length) else {
        return Err(NbdError::Protocol("a short request".into()));
    };
    if command == CMD_WRITE {
        // It is refused, but its data comes all the same.
        if length > MAX_REQUEST {
            return Err(NbdError::Protocol(format!("a write of {length} bytes")));
        }
        let mut payload = read.take(u64::from(length));
        let skipped = tokio::io::copy(&mut payload, &mut tokio::io::sink()).await;
        if skipped.map_err(io_error)? < u64::from(length) {
            return Err(NbdError::Closed("in the middle of a write".into()));
        }
    }
    Ok(Request { flags, command, cookie, offset, length })
}

impl<W: AsyncWrite + Unpin> Connection<W> {
    async fn serve(&self, request: &Request) -> std::io::Result<()> {
        let answered = AssertUnwindSafe(self.answer(request)).catch_unwind().await;
        let failure = match answered {
            Ok(Ok(result)) => return result,
            Ok(Err(failure)) => failure,
            Err(_) => Failure(EIO, "internal error: reading panicked".into()),
        };
        self.fail(request, failure).await
    }

    /// The inner result is that of writing the answer.
    async fn answer(&self, request: &Request) -> Result<std::io::Result<()>, Failure> {
        let range = self.check(request)?;
        match request.command {
            CMD_BLOCK_STATUS => self.status(request, range).await,
            _ if self.session.structured => self.read_chunks(request, range).await,
            _ => self.read_simple(request, range).await,
        }
    }

    /// The range of a request that may be answered.
    fn check(&self, request: &Request) -> Result<Range<u64>, Failure> {
        let invalid = |why: &str| Err(Failure(EINVAL, why.into()));
        let allowed = match request.command {
            CMD_READ if self.session.structured => CMD_FLAG_DF,
            CMD_READ => 0,
            CMD_BLOCK_STATUS if self.session.allocation => CMD_FLAG_REQ_ONE,
            CMD_BLOCK_STATUS => return invalid("no meta context was negotiated"),
            CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES => {
                return Err(Failure(EPERM, "the export is read-only".into()));
            }
            _ => return invalid("this command is not offered"),
        };
        let end = request.offset.checked_add(u64::from(request.length));
        let Some(end) = end.filter(|end| *end <= self.session.export.size()) else {
            return invalid("beyond the end of the export");
        };
        if request.flags & !allowed != 0 {
            return invalid("unknown flags");
        }
        match request.command {
            CMD_READ if request.length > MAX_REQUEST => invalid("a read that is too long"),
            CMD_BLOCK_STATUS if request.length == 0 => invalid("a block status of nothing"),
            CMD_READ if request.flags & CMD_FLAG_DF != 0 && u64::from(request.length) > PIECE => {
                Err(Failure(EOVERFLOW, "too long for one chunk".into()))
            }
            _ => Ok(request.offset..end),
        }
    }

    /// As the protocol has it no error can follow once the data has begun: all of it is read first.
    async fn read_simple(
        &self,
        request: &Request,
        range: Range<u64>,
    ) -> Result<std::io::Result<()>, Failure> {
        let _buffered = self.buffer(&range).await?;
        let data = self.content(range).await?;
        Ok(self.write(&simple(0, request.cookie), data).await)
    }

    async fn read_chunks(
        &self,
        request: &Request,
        range: Range<u64>,
    ) -> Result<std::io::Result<()>, Failure> {
        let mut at = range.start;
        loop {
            let piece = at..range.end.min(at + PIECE);
            let _buffered = self.buffer(&piece).await?;
            let data = self.content(piece.clone()).await?;
            let flags = if piece.end == range.end { CHUNK_DONE } else { 0 };
            let header = if data.is_empty() {
                chunk(flags, CHUNK_NONE, request.cookie, 0)
            } else {
                let mut header = chunk(flags, CHUNK_DATA, request.cookie, 8 + data.len());
                header.extend(piece.start.to_be_bytes());
                header
            };
            at = piece.end;
            match self.write(&header, data).await {
                Ok(()) if at < range.end => {}
                written => return Ok(written),
            }
        }
    }

    async fn buffer(
        &self,
        range: &Range<u64>,
    ) -> Result<tokio::sync::SemaphorePermit<'_>, Failure> {
        let bytes = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        let permit = self.exports.0.buffer.acquire_many(bytes).await;
        permit.map_err(|_| Failure(EIO, "shut down".into()))
    }

    async fn content(&self, range: Range<u64>) -> Result<Bytes, Failure> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let wanted = range.end - range.start;
        let data = self.session.export.read(range).await?;
        if data.len() as u64 == wanted {
            return Ok(data);
        }
        Err(Failure(EIO, format!("internal error: {} bytes of {wanted}", data.len())))
    }

    async fn status(
        &self,
        request: &Request,
        range: Range<u64>,
    ) -> Result<std::io::Result<()>, Failure> {
        let extents = self.session.export.status(range.clone()).await?;
        let most = if request.flags & CMD_FLAG_REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
        let extents = normalize(extents, &range, most)
            .ok_or_else(|| Failure(EIO, "internal error: no extents".into()))?;
        let mut body = ALLOCATION_ID.to_be_bytes().to_vec();
        for extent in extents {
            #[expect(clippy::cast_possible_truncation, reason = "within the range of a request")]
            let length = (extent.end - extent.start) as u32;
            body.extend([length.to_be_bytes(), extent.flags.to_be_bytes()].concat());
        }
        let header = chunk(CHUNK_DONE, CHUNK_STATUS, request.cookie, body.len());
        Ok(self.write(&header, body.into()).await)
    }

    async fn fail(&self, request: &Request, failure: Failure) -> std::io::Result<()> {
        let Failure(errno, message) = failure;
        tracing::debug!(?request, errno, message, "an NBD request fails");
        if !self.session.structured {
            return self.write(&simple(errno, request.cookie), Bytes::new()).await;
        }
        let most = message.len().min(MAX_MESSAGE);
        let is_whole = |end: &usize| message.is_char_boundary(*end);
        let end = (0..=most).rev().find(is_whole).unwrap_or_default();
        let text = &message.as_bytes()[..end];
        let mut body = errno.to_be_bytes().to_vec();
        body.extend(u16::try_from(end).unwrap_or_default().to_be_bytes());
        body.extend(text);
        let header = chunk(CHUNK_DONE, CHUNK_ERROR, request.cookie, body.len());
        self.write(&header, body.into()).await
    }

    async fn write(&self, header: &[u8], data: Bytes) -> std::io::Result<()> {
        let mut write = self.write.lock().await;
        write.write_all_buf(&mut Buf::chain(header, data)).await?;
        write.flush().await
    }
}

fn simple(errno: u32, cookie: u64) -> Vec<u8> {
    let mut reply = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(errno.to_be_bytes());
    reply.extend(cookie.to_be_bytes());
    reply
}

#[expect(clippy::cast_possible_truncation, reason = "a piece, or extents or a text, all bounded")]
fn chunk(flags: u16, kind: u16, cookie: u64, length: usize) -> Vec<u8> {
    let mut header = CHUNK_MAGIC.to_be_bytes().to_vec();
    header.extend(flags.to_be_bytes());
    header.extend(kind.to_be_bytes());
    header.extend(cookie.to_be_bytes());
    header.extend((length as u32).to_be_bytes());
    header
}

/// Merged, clipped to the range, at most `most`. None if they do not begin where the range does or
/// have a gap.
fn normalize(extents: Vec<Extent>, range: &Range<u64>, most: usize) -> Option<Vec<Extent>> {
    let mut merged = ContextExtents { context: String::new(), extents: Vec::new() };
    let mut next = range.start;
    for extent in extents {
        if extent.start != next || extent.end <= extent.start {
            return None;
        }
        next = extent.end;
        merged.push(extent);
        if merged.extents.len() > most || next >= range.end {
            break;
        }
    }
    merged.truncate(range.end);
    merged.extents.truncate(most);
    (!merged.extents.is_empty()).then_some(merged.extents)
}
