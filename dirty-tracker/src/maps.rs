//! Parses `/proc/PID/maps`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use procfs_core::process::{MMapPath, MemoryMap, MemoryMaps};
use procfs_core::{FromRead, ProcResult};

/// More text than this is not the memory map of a VM (some 500,000 mappings).
const MAX_MAPS_LEN: usize = 64 << 20;
/// The kernel answers with at most a page at a time anyway.
const READ_LEN: usize = 64 << 10;

/// A whole `/proc/PID/maps`, ascending by address.
///
/// # Errors
/// When a line is not of the form that the kernel writes.
pub fn parse_maps(bytes: &[u8]) -> ProcResult<MemoryMaps> {
    // A path in it need not be UTF-8. The crate procfs panics on a file whose name begins as that
    // of System V shared memory does, and is none; no mapping is looked up by such a name.
    let text = String::from_utf8_lossy(bytes).replace(" /SYSV", " /sysv");
    MemoryMaps::from_read(text.as_bytes())
}

/// What the kernel shows as the path of a mapping; empty for anonymous memory.
pub fn shown_path(mapping: &MemoryMap) -> String {
    match &mapping.pathname {
        MMapPath::Path(path) => path.display().to_string(),
        MMapPath::Anonymous => String::new(),
        other => format!("{other:?}"),
    }
}

/// Reads the text through an open `/proc/PID/maps`, which may belong to another process and may be
/// shared: the file's position is not touched.
pub(crate) fn read_maps(maps: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; READ_LEN];
    loop {
        let length = maps.read_at(&mut chunk, bytes.len() as u64)?;
        if length == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&chunk[..length]);
        if bytes.len() > MAX_MAPS_LEN {
            return Err(io::Error::other(format!(
                "the memory map is longer than {MAX_MAPS_LEN} bytes"
            )));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn maps_may_have_files_of_any_name() {
        for name in ["/SYSV", "/SYSV1", "/SYSV00000000 (deleted)", "/SYSVä1234567", "[", "[]", "//"]
        {
            let text = format!("1000-2000 rw-s 00000000 00:01 7 {name}\n");
            let maps = parse_maps(text.as_bytes()).unwrap();
            assert_eq!(maps.len(), 1, "{name}");
        }
    }

    #[test]
    fn maps_that_are_none_are_an_error() {
        for text in ["x", "10-20", "10-20 rw-p 0 00:00 x y", "nonsense here\n"] {
            assert!(parse_maps(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn reads_its_own_map() {
        let text = read_maps(&File::open("/proc/self/maps").unwrap()).unwrap();
        let here = text.as_ptr() as u64;
        let maps = parse_maps(&text).unwrap();
        assert!(maps.iter().any(|mapping| (mapping.address.0..mapping.address.1).contains(&here)));
        assert!(maps.0.is_sorted_by_key(|mapping| mapping.address));
    }
}
