//! The blocks of an image file, without reading its holes.

use checkpoint_format::{BLOCK_SIZE, PAGE_SIZE, as_index};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Read at once.
const BUFFER_BYTES: usize = 16 * BLOCK_SIZE;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// The file's extents of data, each grown to whole blocks, in order: what lies between them is
/// zero. A file system that knows no holes has one extent. Not a list: a file may have millions.
pub(crate) struct DataExtents<'a> {
    file: &'a File,
    len: u64,
    at: u64,
    /// Found, but what follows may touch it.
    open: Option<Range<u64>>,
}

impl<'a> DataExtents<'a> {
    pub(crate) fn of(file: &'a File, len: u64) -> Self {
        Self { file, len, at: 0, open: None }
    }

    fn find(&mut self) -> io::Result<Option<Range<u64>>> {
        while let Some(start) = seek(self.file, self.at, self.len, Whence::SeekData)? {
            let end = seek(self.file, start, self.len, Whence::SeekHole)?
                .unwrap_or(self.len)
                .max(start + 1);
            self.at = end;
            let grown = start - start % BLOCK..end.next_multiple_of(BLOCK).min(self.len);
            match &mut self.open {
                Some(open) if open.end >= grown.start => open.end = grown.end,
                open => {
                    if let Some(whole) = open.replace(grown) {
                        return Ok(Some(whole));
                    }
                }
            }
        }
        Ok(self.open.take())
    }
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.find().transpose()
    }
}

/// The blocks of a file that have to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blocks {
    All,
    NoHoles,
}

/// None: there is nothing of the kind before the end.
fn seek(file: &File, from: u64, len: u64, whence: Whence) -> io::Result<Option<u64>> {
    if from >= len {
        return Ok(None);
    }
    let is_data = matches!(whence, Whence::SeekData);
    match lseek(file, from.cast_signed(), whence) {
        Ok(found) => Ok(Some(found.cast_unsigned()).filter(|found| *found < len)),
        Err(Errno::ENXIO) => Ok(None),
        // It knows no holes: all is data.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(is_data.then_some(from)),
        Err(error) => Err(error.into()),
    }
}

/// Calls `visit` with number and content of each block, in order. The last block of the file may be
/// short.
pub(crate) fn each_block<E: From<io::Error>>(
    file: &File,
    len: u64,
    which: Blocks,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; BUFFER_BYTES];
    if which == Blocks::All {
        return each_of(file, 0..len, &mut buffer, &mut visit);
    }
    DataExtents::of(file, len)
        .try_for_each(|extent| each_of(file, extent?, &mut buffer, &mut visit))
}

fn each_of<E: From<io::Error>>(
    file: &File,
    extent: Range<u64>,
    buffer: &mut [u8],
    visit: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = extent.start;
    while at < extent.end {
        let wanted = as_index((extent.end - at).min(BUFFER_BYTES as u64));
        file.read_exact_at(&mut buffer[..wanted], at)?;
        for (number, block) in (at / BLOCK..).zip(buffer[..wanted].chunks(BLOCK_SIZE)) {
            visit(number, block)?;
        }
        at += wanted as u64;
    }
    Ok(())
}

/// A block as its digest is taken: padded with zeros to whole pages.
pub(crate) fn padded(block: &[u8]) -> Vec<u8> {
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
        let mut seen = Vec::new();
        each_block::<io::Error>(&file, len, Blocks::NoHoles, |number, block| {
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
        for which in [Blocks::All, Blocks::NoHoles] {
            let mut read = Vec::new();
            each_block::<io::Error>(&file, content.len() as u64, which, |_, block| {
                read.extend_from_slice(block);
                Ok(())
            })
            .unwrap();
            assert_eq!(read, content);
        }
        assert_eq!(DataExtents::of(&file, 0).count(), 0);
    }

    #[test]
    fn image_extents_that_touch_are_one() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 * BLOCK).unwrap();
        // Two pages of one block, one of the next; then a block by itself.
        for at in [3 * BLOCK, 3 * BLOCK + 32768, 4 * BLOCK + 4096, 50 * BLOCK + 8192] {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        file.sync_all().unwrap();
        let extents: Vec<_> = DataExtents::of(&file, 100 * BLOCK).map(Result::unwrap).collect();
        let holds = |at: u64| extents.iter().filter(|extent| extent.contains(&at)).count() == 1;
        assert!(holds(3 * BLOCK) && holds(4 * BLOCK + 4096) && holds(50 * BLOCK));
        assert!(extents.iter().all(|extent| extent.start % BLOCK == 0 && extent.end % BLOCK == 0));
        assert!(extents.windows(2).all(|pair| pair[0].end < pair[1].start), "{extents:?}");
    }
}
