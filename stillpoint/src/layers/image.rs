//! The blocks of an image file, without reading its holes.

use checkpoint_format::{BLOCK_SIZE, PAGE_SIZE};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Read at once.
const BUFFER_BYTES: usize = 16 * BLOCK_SIZE;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// The file's extents of data, each grown to whole blocks: what lies between them is zero. A file system that knows no holes has
/// one extent.
pub fn data_extents(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(file, at, len, Whence::SeekData)? {
        let end = seek(file, start, len, Whence::SeekHole)?.unwrap_or(len).max(start + 1);
        let grown = start - start % BLOCK..end.next_multiple_of(BLOCK).min(len);
        match extents.last_mut() {
            Some(last) if last.end >= grown.start => last.end = grown.end,
            _ => extents.push(grown),
        }
        at = end;
    }
    Ok(extents)
}

/// None: there is nothing of the kind before the end.
fn seek(file: &File, from: u64, len: u64, whence: Whence) -> io::Result<Option<u64>> {
    if from >= len {
        return Ok(None);
    }
    let is_data = matches!(whence, Whence::SeekData);
    match lseek(file, from as i64, whence) {
        Ok(found) => Ok(Some(found as u64).filter(|found| *found < len)),
        Err(Errno::ENXIO) => Ok(None),
        // It knows no holes: all is data.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(is_data.then_some(from)),
        Err(error) => Err(error.into()),
    }
}

/// Calls `visit` with number and content of each block of the extents, in order. The last block of the file may be short.
pub fn each_block<E: From<io::Error>>(
    file: &File,
    extents: &[Range<u64>],
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; BUFFER_BYTES];
    for extent in extents {
        let mut at = extent.start;
        while at < extent.end {
            let wanted = (extent.end - at).min(BUFFER_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..wanted], at)?;
            for (number, block) in (at / BLOCK..).zip(buffer[..wanted].chunks(BLOCK_SIZE)) {
                visit(number, block)?;
            }
            at += wanted as u64;
        }
    }
    Ok(())
}

/// A block as its digest is taken: padded with zeros to whole pages.
pub fn padded(block: &[u8]) -> Vec<u8> {
    let mut block = block.to_vec();
    block.resize(block.len().next_multiple_of(PAGE_SIZE), 0);
    block
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn image_holes_are_not_read() {
        let file = tempfile::tempfile().unwrap();
        let len = (1_u64 << 40) + 100;
        file.set_len(len).unwrap();
        file.write_all_at(b"x", 5 * BLOCK + 7).unwrap();
        file.write_all_at(b"y", len - 1).unwrap();
        let extents = data_extents(&file, len).unwrap();
        let mut seen = Vec::new();
        each_block::<io::Error>(&file, &extents, |number, block| {
            seen.push((number, block.len(), block.iter().filter(|byte| **byte != 0).count()));
            Ok(())
        })
        .unwrap();
        let data: Vec<_> = seen.iter().copied().filter(|(_, _, bytes)| *bytes > 0).collect();
        assert_eq!(data, [(5, BLOCK_SIZE, 1), (len / BLOCK, 100, 1)]);
        assert!(seen.len() < 100, "{} blocks were read", seen.len());
    }

    #[test]
    fn image_without_holes_is_read_whole() {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3 * BLOCK_SIZE + 5).map(|at| at as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let extents = data_extents(&file, content.len() as u64).unwrap();
        let mut read = Vec::new();
        each_block::<io::Error>(&file, &extents, |_, block| {
            read.extend_from_slice(block);
            Ok(())
        })
        .unwrap();
        assert_eq!(read, content);
        assert_eq!(data_extents(&file, 0).unwrap(), []);
    }
}
