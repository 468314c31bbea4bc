//! How content is compressed: zstd, or not at all when that gains too little.

use std::cell::RefCell;
use std::io;

use zstd::bulk::{Compressor, Decompressor};

use super::error::{EncodeError, PackError, PackPart};

/// The zstd level for frames: the fastest of the ordinary ones. On guest memory the higher ones
/// gain a few percent and cost several times the CPU, while the guest wants that CPU too.
pub const ZSTD_LEVEL: i32 = 1;

/// Compression that saves less than one part in this many is not worth the time that decompression
/// takes at a restore.
const WORTHWHILE_PART: usize = 32;

/// How the content of a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    None,
    /// As one zstd frame.
    Zstd,
}

impl Codec {
    pub(crate) const fn to_wire(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) const fn from_wire(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::None),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A zstd context is about a megabyte and is made and torn down slower than a frame is compressed,
/// so every thread keeps one.
struct FrameCompressor {
    level: i32,
    context: Compressor<'static>,
    output: Vec<u8>,
}

thread_local! {
    static COMPRESSOR: RefCell<Option<FrameCompressor>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Calls `store` with the content of a frame as it should be stored.
pub(super) fn compress_frame<T>(
    raw: &[u8],
    level: i32,
    store: impl FnOnce(Codec, &[u8]) -> T,
) -> Result<T, EncodeError> {
    let failed = |source| EncodeError::Compress { what: "a frame", source };
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = at_level(slot, level).map_err(failed)?;
        let stored = compressor.run(raw).map_err(failed)?;
        Ok(if stored.len() < raw.len() - raw.len() / WORTHWHILE_PART {
            store(Codec::Zstd, stored)
        } else {
            store(Codec::None, raw)
        })
    })
}

fn at_level(slot: &mut Option<FrameCompressor>, level: i32) -> io::Result<&mut FrameCompressor> {
    if slot.as_ref().is_some_and(|known| known.level != level) {
        *slot = None;
    }
    match slot {
        Some(compressor) => Ok(compressor),
        None => Ok(slot.insert(FrameCompressor {
            level,
            context: Compressor::new(level)?,
            output: Vec::new(),
        })),
    }
}

impl FrameCompressor {
    fn run(&mut self, raw: &[u8]) -> io::Result<&[u8]> {
        self.output.clear();
        self.output.reserve(zstd::zstd_safe::compress_bound(raw.len()));
        self.context.compress_to_buffer(raw, &mut self.output)?;
        Ok(&self.output)
    }
}

/// Undoes [`compress_frame`]. `raw_len` is bounded by the caller and is all that a hostile frame
/// can make us allocate.
pub(super) fn decompress_frame(
    part: PackPart,
    codec: Codec,
    stored: &[u8],
    raw_len: usize,
) -> Result<Vec<u8>, PackError> {
    let raw = match codec {
        Codec::None => stored.to_vec(),
        Codec::Zstd => DECOMPRESSOR
            .with_borrow_mut(|slot| match slot {
                Some(context) => context.decompress(stored, raw_len),
                None => slot.insert(Decompressor::new()?).decompress(stored, raw_len),
            })
            .map_err(|source| PackError::Decompress { part, source })?,
    };
    super::error::equal(part, "decompressed length", raw.len() as u64, raw_len as u64)?;
    Ok(raw)
}

/// For the parts of a file that are compressed once, in one piece, and read often: a higher level
/// pays.
pub(crate) fn compress_whole(raw: &[u8]) -> io::Result<Vec<u8>> {
    const LEVEL: i32 = 3;
    zstd::bulk::compress(raw, LEVEL)
}

/// Undoes [`compress_whole`] into `raw_len` bytes. What the compressed part itself says of its
/// length is compared first, so a false length in the input allocates nothing.
pub(crate) fn decompress_whole(stored: &[u8], raw_len: usize) -> io::Result<Vec<u8>> {
    let said = zstd::zstd_safe::get_frame_content_size(stored).ok().flatten();
    if said.is_some_and(|said| said != raw_len as u64) {
        let problem =
            format!("it says that it holds {} bytes, expected {raw_len}", said.unwrap_or_default());
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    zstd::bulk::decompress(stored, raw_len)
}
