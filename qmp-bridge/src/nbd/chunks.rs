//! Replies: one request collects its chunks until the one that says done.

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::oneshot;

use super::NbdError;
use super::coverage::Coverage;
use super::wire::*;

/// Most contexts in the reply to one request; no client of ours asks for as many.
const MAX_CONTEXTS: usize = 8;

/// What a finished request yields.
#[derive(Debug)]
pub(super) enum Outcome {
    Done,
    Data(Vec<u8>),
    /// Per context id: lengths and flags from the request's offset on.
    Status(Vec<(u32, Vec<(u32, u32)>)>),
}

#[derive(Debug)]
pub(super) enum Kind {
    Plain,
    Read { buffer: Vec<u8>, coverage: Coverage },
    Status(Vec<(u32, Vec<(u32, u32)>)>),
}

/// A request that waits for (more of) its reply.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) command: &'static str,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) kind: Kind,
    pub(super) error: Option<NbdError>,
    pub(super) sender: oneshot::Sender<Result<Outcome, NbdError>>,
}

fn violation<T>(what: impl Into<String>) -> Result<T, NbdError> {
    Err(NbdError::Protocol(what.into()))
}

pub(super) fn io_error(error: std::io::Error) -> NbdError {
    NbdError::Closed(error.to_string())
}

impl Pending {
    /// Takes the body of one chunk.
    pub(super) async fn chunk<R>(
        &mut self,
        reader: &mut R,
        kind: u16,
        length: u32,
    ) -> Result<(), NbdError>
    where
        R: AsyncRead + Unpin,
    {
        match kind {
            CHUNK_NONE if length == 0 => Ok(()),
            CHUNK_DATA => self.data(reader, length).await,
            CHUNK_HOLE if length == 12 => self.hole(reader).await,
            CHUNK_STATUS => self.status(reader, length).await,
            _ if kind & CHUNK_ERROR_BIT != 0 => self.failure(reader, kind, length).await,
            _ => violation(format!("a chunk of type {kind} with {length} bytes")),
        }
    }

    async fn data<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut R,
        length: u32,
    ) -> Result<(), NbdError> {
        let Some(length) = length.checked_sub(8) else {
            return violation("a data chunk without an offset");
        };
        let at = reader.read_u64().await.map_err(io_error)?;
        let target = self.place(at, u64::from(length))?;
        reader.read_exact(target).await.map(drop).map_err(io_error)
    }

    async fn hole<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> Result<(), NbdError> {
        let at = reader.read_u64().await.map_err(io_error)?;
        let length = reader.read_u32().await.map_err(io_error)?;
        // The buffer began as zeroes, and no other chunk has written here.
        self.place(at, u64::from(length)).map(drop)
    }

    fn place(&mut self, at: u64, length: u64) -> Result<&mut [u8], NbdError> {
        let Kind::Read { buffer, coverage } = &mut self.kind else {
            return violation(format!("data in reply to {}", self.command));
        };
        let start = at.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(usize::try_from(length).ok()?));
        match (start, end) {
            (Some(start), Some(end)) if end <= buffer.len() && coverage.add(start..end) => {
                Ok(&mut buffer[start..end])
            }
            _ => violation(format!("{length} bytes for {at}, outside of what was asked or twice")),
        }
    }

    async fn status<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut R,
        length: u32,
    ) -> Result<(), NbdError> {
        let Kind::Status(contexts) = &mut self.kind else {
            return violation(format!("a block status in reply to {}", self.command));
        };
        if length < 12 || length % 8 != 4 || length > MAX_STATUS_CHUNK {
            return violation(format!("a block status of {length} bytes"));
        }
        let mut body = vec![0; length as usize];
        reader.read_exact(&mut body).await.map_err(io_error)?;
        let mut fields = Fields(&body);
        let id = fields.u32().unwrap_or_default();
        if contexts.iter().any(|(known, _)| *known == id) || contexts.len() == MAX_CONTEXTS {
            return violation(format!("a second block state of context {id}, or one too many"));
        }
        let mut extents = Vec::with_capacity(body.len() / 8);
        while let (Some(length), Some(flags)) = (fields.u32(), fields.u32()) {
            extents.push((length, flags));
        }
        contexts.push((id, extents));
        Ok(())
    }

    async fn failure<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut R,
        kind: u16,
        length: u32,
    ) -> Result<(), NbdError> {
        if length > MAX_STRING + 16 {
            return violation(format!("an error of {length} bytes"));
        }
        let mut body = vec![0; length as usize];
        reader.read_exact(&mut body).await.map_err(io_error)?;
        let mut fields = Fields(&body);
        let (Some(errno), Some(text)) = (fields.u32(), fields.u16()) else {
            return violation("a short error chunk");
        };
        let message = String::from_utf8_lossy(fields.take(usize::from(text)).unwrap_or_default())
            .into_owned();
        let at = if kind == CHUNK_ERROR_OFFSET { fields.u64() } else { None };
        let offset = at.unwrap_or(self.offset);
        self.error = Some(self.failed(offset, errno, message));
        Ok(())
    }

    fn failed(&self, offset: u64, errno: u32, message: String) -> NbdError {
        NbdError::Failed { command: self.command, offset, length: self.length, errno, message }
    }

    /// Takes the number of a simple reply.
    pub(super) fn simple(&mut self, errno: u32) -> Result<(), NbdError> {
        match (errno, &self.kind) {
            (0, Kind::Plain) => Ok(()),
            (0, _) => violation(format!("a simple reply to {}", self.command)),
            _ => {
                self.error = Some(self.failed(self.offset, errno, "no message".into()));
                Ok(())
            }
        }
    }

    /// Hands the result to the caller, who may have given up.
    pub(super) fn finish(self) {
        let result = match (self.error, self.kind) {
            (Some(error), _) => Err(error),
            (None, Kind::Plain) => Ok(Outcome::Done),
            (None, Kind::Read { buffer, coverage }) if coverage.is_exactly(buffer.len()) => {
                Ok(Outcome::Data(buffer))
            }
            (None, Kind::Read { .. }) => violation("a read was done with bytes missing"),
            (None, Kind::Status(contexts)) => Ok(Outcome::Status(contexts)),
        };
        let _ = self.sender.send(result);
    }
}

/// Skips a chunk of a request whose caller no longer waits.
pub(super) async fn skip<R: AsyncRead + Unpin>(
    reader: &mut R,
    length: u32,
) -> Result<(), NbdError> {
    if length > MAX_REQUEST + MAX_STRING {
        return violation(format!("a chunk of {length} bytes"));
    }
    let copied = tokio::io::copy(&mut reader.take(u64::from(length)), &mut tokio::io::sink()).await;
    match copied.map_err(io_error)? {
        skipped if skipped == u64::from(length) => Ok(()),
        _ => Err(NbdError::Closed("in the middle of a chunk".into())),
    }
}
