//! `/proc/PID/maps`, read and understood.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::error::TrackerError;

/// More text than this is not the memory map of a VM (some 500,000 mappings).
const MAX_MAPS_LEN: usize = 64 << 20;
/// The kernel answers with at most a page at a time anyway.
const READ_LEN: usize = 64 << 10;

/// One line of the memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// Whether other processes see what is written.
    pub shared: bool,
    /// Whether the process may write.
    pub writable: bool,
    /// Where in its file the mapping starts, in bytes.
    pub offset: u64,
    /// Of the file's device.
    pub major: u32,
    /// Of the file's device.
    pub minor: u32,
    /// 0 for anonymous memory.
    pub inode: u64,
    /// Empty for anonymous memory; ` (deleted)` is part of it, as is whatever else the kernel
    /// writes there.
    pub path: String,
}

impl Mapping {
    /// The addresses of the mapping.
    pub fn addresses(&self) -> Range<u64> {
        self.start..self.end
    }

    /// A line of `/proc/PID/maps` without its end.
    pub fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let (start, end) = hex_pair(field(&mut rest)?, '-')?;
        let perms = field(&mut rest)?.as_bytes();
        let offset = u64::from_str_radix(field(&mut rest)?, 16).ok()?;
        let (major, minor) = hex_pair(field(&mut rest)?, ':')?;
        let inode = field(&mut rest)?.parse().ok()?;
        if perms.len() != 4 || start >= end {
            return None;
        }
        Some(Self {
            start,
            end,
            shared: perms[3] == b's',
            writable: perms[1] == b'w',
            offset,
            major: u32::try_from(major).ok()?,
            minor: u32::try_from(minor).ok()?,
            inode,
            path: rest.trim_start_matches(' ').to_owned(),
        })
    }
}

/// Takes the next word off `rest`.
fn field<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let text = rest.trim_start_matches(' ');
    let (word, after) = text.split_once(' ').unwrap_or((text, ""));
    *rest = after;
    (!word.is_empty()).then_some(word)
}

fn hex_pair(text: &str, separator: char) -> Option<(u64, u64)> {
    let (first, second) = text.split_once(separator)?;
    Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(second, 16).ok()?))
}

/// The whole memory map, ascending by address.
///
/// # Errors
/// When a line is not of the form that the kernel writes.
pub fn parse_maps(text: &str) -> Result<Vec<Mapping>, TrackerError> {
    text.lines()
        .map(|line| {
            Mapping::parse(line).ok_or_else(|| TrackerError::MapsLine { line: line.to_owned() })
        })
        .collect()
}

/// Reads the text through an open `/proc/PID/maps`, which may belong to another process and may be
/// shared: the file's position is not touched.
pub(crate) fn read_maps(maps: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; READ_LEN];
    loop {
        let length = maps.read_at(&mut chunk, bytes.len() as u64)?;
        if length == 0 {
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
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

    const TEXT: &str = "\
55650f463000-55650f86a000 r--p 00000000 fe:00 10166291                   /usr/bin/qemu-system-x86_64
7f0f4be00000-7f0f8be00000 rw-s 00001000 00:01 2051                       /memfd:pc.ram (deleted)
7f0f8c000000-7f0f8c021000 rw-p 00000000 00:00 0 \n\
7ffc8a5f1000-7ffc8a612000 rw-p 00000000 00:00 0                          [stack]
";

    #[test]
    fn understands_every_kind_of_line() {
        let maps = parse_maps(TEXT).unwrap();
        assert_eq!(
            maps[1],
            Mapping {
                start: 0x7f0f_4be0_0000,
                end: 0x7f0f_8be0_0000,
                shared: true,
                writable: true,
                offset: 0x1000,
                major: 0,
                minor: 1,
                inode: 2051,
                path: "/memfd:pc.ram (deleted)".into(),
            }
        );
        assert_eq!((maps[0].major, maps[0].writable, maps[0].shared), (0xfe, false, false));
        assert_eq!((maps[2].inode, maps[2].path.as_str()), (0, ""));
        assert_eq!(maps[3].path, "[stack]");
    }

    #[test]
    fn nonsense_is_an_error_that_shows_the_line() {
        for line in
            ["", "x", "10-20", "20-10 rw-p 0 00:00 0", "10-20 rw 0 00:00 0", "10-20 rw-p 0 00:00 x"]
        {
            assert_eq!(Mapping::parse(line), None, "{line}");
        }
        let error = parse_maps("nonsense here\n").unwrap_err();
        assert!(error.to_string().contains("'nonsense here'"), "{error}");
    }

    #[test]
    fn reads_its_own_map() {
        let text = read_maps(&File::open("/proc/self/maps").unwrap()).unwrap();
        let here = text.as_ptr() as u64;
        let maps = parse_maps(&text).unwrap();
        assert!(maps.iter().any(|mapping| mapping.addresses().contains(&here)));
        assert!(maps.is_sorted_by_key(|mapping| mapping.start));
    }
}
