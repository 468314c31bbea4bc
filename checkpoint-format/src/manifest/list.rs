//! Lists of a manifest. Reading stops when a list is far too long, because an empty text takes
//! three bytes in a file and twenty-four in memory. The validation refuses a list that is a little
//! too long, with its length.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

use super::index::MAX_SEGMENTS;
use super::validate::{
    MAX_ARGUMENTS, MAX_BACKING_DEPTH, MAX_BOOT_FILES, MAX_DISKS, MAX_PACKS, MAX_RAM_BLOCKS,
    MAX_SPACES,
};

struct AtMost<T, const N: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for AtMost<T, N> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {N} entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == 2 * N {
                return Err(A::Error::custom(format_args!(
                    "a list has more than twice the {N} entries that are its limit"
                )));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}

pub(crate) fn at_most<'de, D: Deserializer<'de>, T: Deserialize<'de>, const N: usize>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    from.deserialize_seq(AtMost::<T, N>(PhantomData))
}

macro_rules! lists {
    ($($name:ident $limit:ident;)*) => {$(
        pub(crate) fn $name<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
            at_most::<D, T, $limit>(from)
        }
    )*};
}

lists! {
    space_list MAX_SPACES;
    ram_block_list MAX_RAM_BLOCKS;
    disk_list MAX_DISKS;
    pack_list MAX_PACKS;
    arguments_list MAX_ARGUMENTS;
    boot_file_list MAX_BOOT_FILES;
    backing_list MAX_BACKING_DEPTH;
    segment_list MAX_SEGMENTS;
}
