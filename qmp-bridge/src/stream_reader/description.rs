//! The description that QEMU puts at the very end: which device sections there are and how long
//! each is.
//!
//! ```text
//! { "page_size": 4096, "devices": [ { "name": "timer", "instance_id": 0, "fields": [ FIELD.. ], "subsections": [ SUB.. ] } ] }
//! FIELD = { "name", "type", "size", "array_len"? .. }   array_len: that many of this size, one after another
//! SUB   = { "vmsd_name", "version", "fields", "subsections"? }   in the stream: mark, name, version, then its content
//! ```
//!
//! Only the sizes of fields are added up; what is inside structures is already in them.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Bytes of a subsection before its content, without its name: mark, length of the name, version.
const SUBSECTION_HEAD: u64 = 1 + 1 + 4;

#[derive(Deserialize)]
pub(super) struct Description<'a> {
    pub(super) page_size: u64,
    #[serde(borrow)]
    pub(super) devices: Vec<Device<'a>>,
}

/// A device section as it ought to be.
#[derive(Deserialize)]
pub(super) struct Device<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    pub(super) instance_id: u32,
    #[serde(default)]
    fields: Length<Field>,
    #[serde(default, borrow)]
    subsections: Length<Subsection<'a>>,
}

impl Device<'_> {
    /// Bytes between the head of its section and the footer, if they can be counted in 64 bits.
    pub(super) fn length(&self) -> Option<u64> {
        self.fields.bytes.checked_add(self.subsections.bytes)
    }
}

#[derive(Deserialize)]
struct Field {
    size: u64,
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct Subsection<'a> {
    #[serde(borrow)]
    vmsd_name: Cow<'a, str>,
    #[serde(default)]
    fields: Length<Field>,
    #[serde(default, borrow)]
    subsections: Length<Subsection<'a>>,
}

/// How many bytes something takes in the stream.
trait Sized64 {
    fn length(&self) -> Option<u64>;
}

impl Sized64 for Field {
    fn length(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Sized64 for Subsection<'_> {
    fn length(&self) -> Option<u64> {
        let head = SUBSECTION_HEAD + self.vmsd_name.len() as u64;
        head.checked_add(self.fields.bytes)?.checked_add(self.subsections.bytes)
    }
}

/// The length of all items of a list together; the items are not kept, since there may be a
/// million.
struct Length<T> {
    bytes: u64,
    items: std::marker::PhantomData<T>,
}

impl<T> Default for Length<T> {
    fn default() -> Self {
        Self { bytes: 0, items: std::marker::PhantomData }
    }
}

impl<'de, T: Deserialize<'de> + Sized64> Deserialize<'de> for Length<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Self::default())
    }
}

impl<'de, T: Deserialize<'de> + Sized64> Visitor<'de> for Length<T> {
    type Value = Self;

    fn expecting(&self, text: &mut fmt::Formatter) -> fmt::Result {
        text.write_str("a list of fields")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Self, A::Error> {
        while let Some(item) = items.next_element::<T>()? {
            let sum = item.length().and_then(|length| self.bytes.checked_add(length));
            self.bytes = sum.ok_or_else(|| A::Error::custom("the sizes overflow 64 bits"))?;
        }
        Ok(self)
    }
}
