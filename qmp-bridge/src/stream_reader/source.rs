//! Bytes of the stream, from one buffer that never grows: numbers, names, and pages borrowed where
//! they lie.

use std::io::{ErrorKind, Read};
use std::ops::Range;

use super::error::StreamReadError;

pub(super) struct Source<R> {
    inner: R,
    buffer: Box<[u8]>,
    /// What of the buffer is read and not yet taken.
    filled: Range<usize>,
    /// Bytes of the stream that lie before the buffer.
    before: u64,
    /// What is being read, for errors.
    inside: &'static str,
}

impl<R: Read> Source<R> {
    pub(super) fn new(inner: R, buffer: usize) -> Self {
        Self {
            inner,
            buffer: vec![0; buffer].into(),
            filled: 0..0,
            before: 0,
            inside: "the header",
        }
    }

    /// Says what is read from here on.
    pub(super) fn enter(&mut self, inside: &'static str) {
        self.inside = inside;
    }

    /// Offset in the stream of the next byte.
    pub(super) fn at(&self) -> u64 {
        self.before + self.filled.start as u64
    }

    /// Takes `length` bytes, at most the buffer's. Where they lie is good for [`Self::view`] until
    /// the next taking.
    pub(super) fn take(&mut self, length: usize) -> Result<Range<usize>, StreamReadError> {
        self.need(length)?;
        let taken = self.filled.start..self.filled.start + length;
        self.filled.start = taken.end;
        Ok(taken)
    }

    pub(super) fn view(&self, taken: Range<usize>) -> &[u8] {
        &self.buffer[taken]
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamReadError> {
        let taken = self.take(N)?;
        Ok(self.buffer[taken].try_into().expect("as long as asked for"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, StreamReadError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, StreamReadError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, StreamReadError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, StreamReadError> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next byte, left where it is.
    pub(super) fn peek(&mut self) -> Result<u8, StreamReadError> {
        self.need(1)?;
        Ok(self.buffer[self.filled.start])
    }

    /// A name of 1 to 255 bytes after its length in one byte.
    pub(super) fn name(&mut self) -> Result<String, StreamReadError> {
        let at = self.at();
        let length = usize::from(self.u8()?);
        self.text(at, length)
    }

    pub(super) fn text(&mut self, at: u64, length: usize) -> Result<String, StreamReadError> {
        let taken = self.take(length)?;
        match std::str::from_utf8(self.view(taken)) {
            Ok(text) if !text.is_empty() && !text.contains('\0') => Ok(text.to_owned()),
            Ok(text) => Err(StreamReadError::malformed(at, format!("the name {text:?}"), "a name")),
            Err(_) => Err(StreamReadError::malformed(at, "a name that is not UTF-8", "a name")),
        }
    }

    /// Appends all that is left of the stream, if it is not more than `limit`.
    pub(super) fn rest(
        &mut self,
        into: &mut Vec<u8>,
        what: &'static str,
        limit: u64,
    ) -> Result<(), StreamReadError> {
        let at = self.at();
        let mut found = 0;
        loop {
            found += self.filled.len() as u64;
            if found > limit {
                return Err(StreamReadError::TooLarge { at, what, found, limit });
            }
            into.extend_from_slice(&self.buffer[self.filled.clone()]);
            self.filled.start = self.filled.end;
            if !self.read_more()? {
                return Ok(());
            }
        }
    }

    /// Makes `length` bytes lie in one piece.
    fn need(&mut self, length: usize) -> Result<(), StreamReadError> {
        while self.filled.len() < length {
            if !self.read_more()? {
                return Err(StreamReadError::CutOff {
                    at: self.before + self.filled.end as u64,
                    inside: self.inside,
                });
            }
        }
        Ok(())
    }

    /// Moves what is left to the front, so that one read can fill all the rest. False at the end of
    /// the stream.
    fn read_more(&mut self) -> Result<bool, StreamReadError> {
        self.buffer.copy_within(self.filled.clone(), 0);
        self.before += self.filled.start as u64;
        self.filled = 0..self.filled.len();
        loop {
            match self.inner.read(&mut self.buffer[self.filled.end..]) {
                Ok(read) => {
                    self.filled.end += read;
                    return Ok(read > 0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // How a socket ends whose other side was closed with something unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                Err(source) => {
                    return Err(StreamReadError::Io {
                        at: self.before + self.filled.end as u64,
                        inside: self.inside,
                        source,
                    });
                }
            }
        }
    }
}
