//! Numbers of the NBD protocol and the limits we keep.

/// Longest read or write; also QEMU's own limit.
pub const MAX_REQUEST: u32 = 32 << 20;
/// Most requests in flight on one connection; QEMU serves 16 at a time.
pub const MAX_IN_FLIGHT: usize = 16;
/// Longest string, and with it option replies and error texts.
pub(super) const MAX_STRING: u32 = 4096;
/// Longest option reply accepted.
pub(super) const MAX_OPTION_REPLY: u32 = 16 << 10;
/// Most bytes of one block status chunk; QEMU sends up to 128 Ki extents of 8 bytes.
pub(super) const MAX_STATUS_CHUNK: u32 = 4 << 20;
/// Longest range of one block status request.
pub(super) const MAX_STATUS_RANGE: u64 = 1 << 31;

pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUPPORTED: u32 = REP_ERROR | 1;
pub(super) const REP_ERR_INVALID: u32 = REP_ERROR | 3;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const EXPORT_HAS_FLAGS: u16 = 1;
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_SEND_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_SEND_DF: u16 = 1 << 7;
pub(super) const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISCONNECT: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Do not fragment: the data of a read in one chunk.
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;
/// One extent is enough.
pub(super) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const EOVERFLOW: u32 = 75;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR_BIT: u16 = 1 << 15;
pub(super) const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT | 1;
pub(super) const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR_BIT | 2;

/// Reads big-endian numbers from the front of a slice.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

/// One request header.
pub(super) fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}
