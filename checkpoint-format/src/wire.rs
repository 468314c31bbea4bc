//! Reading and writing of little-endian numbers, with the bounds checked.

/// The bytes end before the value that should follow at byte `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Short {
    pub at: usize,
    pub wanted: usize,
}

/// Walks over bytes from the front.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn rest(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Short> {
        let short = Short { at: self.at, wanted: len };
        let end = self.at.checked_add(len).ok_or(short)?;
        let taken = self.bytes.get(self.at..end).ok_or(short)?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("take gave the N bytes asked for"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Short> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Short> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of [`put_varint`]. What does not fit into 64 bits, or has no end within ten bytes,
    /// is as if the bytes had ended.
    pub(crate) fn varint(&mut self) -> Result<u64, Short> {
        let short = Short { at: self.at, wanted: MAX_VARINT + 1 };
        let mut value = 0;
        for nth in 0..MAX_VARINT {
            let byte = u64::from(self.u8()?);
            let bits = byte & 0x7f;
            if nth == MAX_VARINT - 1 && byte > 1 {
                return Err(short);
            }
            value |= bits << (7 * nth);
            if byte == bits {
                return Ok(value);
            }
        }
        Err(short)
    }
}

/// Bytes of the longest varint.
const MAX_VARINT: usize = 10;

/// Appends a number in as few bytes as it needs (LEB128): seven bits a byte, the lowest first, the
/// top bit set in all bytes but the last.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn numbers_are_little_endian_and_bounds_are_kept() {
        let mut reader = Reader::new(&[1, 2, 0, 3, 0, 0, 0, 9]);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.u16(), Ok(2));
        assert_eq!(reader.u32(), Ok(3));
        assert_eq!(reader.u64(), Err(Short { at: 7, wanted: 8 }));
        assert_eq!(reader.take(usize::MAX), Err(Short { at: 7, wanted: usize::MAX }));
        assert_eq!((reader.rest(), reader.u8()), (1, Ok(9)));
    }

    #[test]
    fn varints_come_back_and_what_is_too_long_is_refused() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut reader = Reader::new(&bytes);
            assert_eq!((reader.varint(), reader.rest()), (Ok(value), 0), "{value}");
        }
        let mut two = [0xff; 10];
        two[9] = 2;
        for bytes in [&[][..], &[0x80], &[0xff; 11], &two] {
            assert!(Reader::new(bytes).varint().is_err(), "{bytes:x?}");
        }
    }
}
