//! A server that says what is written down, and what of it answers which request.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How often a client that waits and writes nothing is let wait, more often than the runtime runs
/// tasks before it looks at the client again: then nothing else is to come from
/// it.
const WAITS: u32 = 256;

#[derive(Debug, Default)]
struct State {
    parts: VecDeque<Vec<u8>>,
    /// Whether the client has written since the last part began.
    written: bool,
    waits: u32,
}

/// Both ends of the connection to it.
#[derive(Debug)]
pub(super) struct Script(Arc<Mutex<State>>);

/// The client's end for reading.
pub(super) struct Replies(Arc<Mutex<State>>);
/// The client's end for writing.
pub(super) struct Requests(Arc<Mutex<State>>);

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    /// Parts with their lengths in front; the last one may be short.
    pub(super) fn new(mut bytes: &[u8]) -> Self {
        let mut parts = VecDeque::new();
        while let Some((length, rest)) = bytes.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            let (part, rest) = rest.split_at(length.min(rest.len()));
            parts.push_back(part.to_vec());
            bytes = rest;
        }
        // The greeting comes unasked.
        Self(Arc::new(Mutex::new(State { parts, written: true, waits: 0 })))
    }

    pub(super) fn halves(self) -> (Replies, Requests) {
        (Replies(self.0.clone()), Requests(self.0))
    }

    /// What all parts together say in reply to requests.
    pub(super) fn answered(&self) -> Answered {
        Answered::of(&lock(&self.0).parts.iter().flatten().copied().collect::<Vec<u8>>())
    }
}

impl AsyncRead for Replies {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = lock(&self.0);
        if !state.written && state.waits < WAITS {
            state.waits += 1;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(part) = state.parts.front_mut() else { return Poll::Ready(Ok(())) };
        let length = part.len().min(buffer.remaining());
        buffer.put_slice(&part.drain(..length).collect::<Vec<u8>>());
        if part.is_empty() {
            state.parts.pop_front();
            (state.written, state.waits) = (false, 0);
        }
        if length == 0 {
            // An empty part is no end.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Requests {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).written = true;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

const CHUNK_MAGIC: [u8; 4] = 0x668e_33ef_u32.to_be_bytes();
const CHUNK_HEAD: usize = 20;

/// A chunk of a reply: cookie, type, whether it is the last, and its body.
struct Chunk {
    cookie: u64,
    kind: u16,
    is_last: bool,
    body: Vec<u8>,
}

/// Every chunk that the server sends, read without regard to order and limits.
pub(super) struct Answered(Vec<Chunk>);

impl Answered {
    /// Replies begin somewhere behind the handshake: each place that looks like one is taken for
    /// one, so there may be too many here, never too few.
    fn of(bytes: &[u8]) -> Self {
        let heads = bytes.windows(CHUNK_MAGIC.len()).enumerate();
        let chunks = heads.filter(|(_, magic)| **magic == CHUNK_MAGIC);
        Self(chunks.filter_map(|(at, _)| chunk(&bytes[at..])).collect())
    }

    /// Whether a chunk for that request holds this byte at that offset.
    pub(super) fn holds(&self, cookie: u64, offset: u64, byte: u8) -> bool {
        self.0.iter().filter(|chunk| chunk.cookie == cookie).any(|chunk| {
            let Some((start, rest)) = chunk.body.split_first_chunk() else { return false };
            let Some(at) = offset.checked_sub(u64::from_be_bytes(*start)) else { return false };
            match (chunk.kind, rest.first_chunk()) {
                (1, _) => rest.get(at as usize) == Some(&byte),
                (2, Some(length)) => byte == 0 && at < u64::from(u32::from_be_bytes(*length)),
                _ => false,
            }
        })
    }

    pub(super) fn is_done(&self, cookie: u64) -> bool {
        self.0.iter().any(|chunk| chunk.cookie == cookie && chunk.is_last)
    }
}

fn chunk(bytes: &[u8]) -> Option<Chunk> {
    let head = bytes.get(..CHUNK_HEAD)?;
    let length = u32::from_be_bytes(head[16..20].try_into().ok()?) as usize;
    let body = &bytes[CHUNK_HEAD..];
    Some(Chunk {
        cookie: u64::from_be_bytes(head[8..16].try_into().ok()?),
        kind: u16::from_be_bytes(head[6..8].try_into().ok()?),
        is_last: head[5] & 1 != 0,
        body: body[..length.min(body.len())].to_vec(),
    })
}
