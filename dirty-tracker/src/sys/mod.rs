//! Everything that talks to the kernel in pointers: the only unsafe code of this library.
#![allow(unsafe_code, reason = "the one place for it, see above")]

pub(crate) mod missing;
pub(crate) mod pagemap;
pub(crate) mod read_mapping;
pub(crate) mod receive;
pub(crate) mod trial;
pub(crate) mod watch_mapping;
pub(crate) mod write_protect;

use std::io;
use std::ops::Range;

/// What one call to the kernel protects or scans at most.
///
/// Such a call holds the memory map lock of QEMU's process from its beginning to its end. QEMU's
/// own `mmap` and `munmap` wait for it, and page faults behind them: 66 to 120 ms while
/// `UFFDIO_WRITEPROTECT` protects 4 GiB in one call, 1.1 to 1.6 ms in pieces of this size (Linux
/// 6.18, 2 cores; `what_mmap_waits_for_while_memory_is_protected` measures it). A scan of 4 GiB
/// that finds nothing takes 1.8 ms in pieces and 1.5 ms in one call.
const MAX_PIECE: u64 = 16 << 20;

/// How often a call is repeated that the kernel broke off because the process was changing its
/// memory map.
const MAX_TRIES: u32 = 64;

/// The pieces of a range, in order. They end at multiples of their size, so that no huge page is
/// cut in two.
fn pieces(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = *range;
    let rest = move |from: u64| {
        (from < end).then(|| from..end.min((from / MAX_PIECE + 1).saturating_mul(MAX_PIECE)))
    };
    std::iter::successors(rest(start), move |piece| rest(piece.end))
}

/// The result of an ioctl as a `Result`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod test {
    #![allow(clippy::single_range_in_vec_init, reason = "a list of one range is what is meant")]

    use super::*;

    #[test]
    fn pieces_cover_a_range_and_end_at_multiples() {
        let piece = MAX_PIECE;
        let cut = |range: Range<u64>| pieces(&range).collect::<Vec<_>>();
        assert_eq!(cut(7..7), []);
        assert_eq!(cut(4096..8192), [4096..8192]);
        assert_eq!(cut(piece..2 * piece), [piece..2 * piece]);
        assert_eq!(
            cut(piece - 4096..2 * piece + 1),
            [piece - 4096..piece, piece..2 * piece, 2 * piece..2 * piece + 1]
        );
        assert_eq!(cut(u64::MAX - 1..u64::MAX), [u64::MAX - 1..u64::MAX]);
    }
}
