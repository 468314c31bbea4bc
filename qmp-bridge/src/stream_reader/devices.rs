//! The device part, all that follows memory: gathered to the end of the stream, then cut by the
//! description behind it.

use std::ops::Range;

use super::description::{Description, Device};
use super::error::StreamReadError;
use super::section::misplaced;
use crate::device_state::DeviceState;
use crate::stream_format::{STREAM_HEADER, STREAM_PAGE, mark};

/// Longest description; an ordinary VM has 40 to 200 KiB.
pub const MAX_DESCRIPTION: u64 = 16 << 20;
/// Mark and length before a description.
pub(super) const DESCRIPTION_HEAD: usize = 1 + 4;
/// Mark and number of a footer.
const FOOTER: usize = 1 + 4;

/// One section of a [`DeviceState`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// QEMU's number of it.
    pub id: u32,
    /// E.g. `cpu`, `0000:00:02.0/vga`.
    pub name: String,
    /// QEMU's instance ID of the device.
    pub instance: u32,
    /// Version of the device's state.
    pub version: u32,
    /// Where it is in [`DeviceState::as_bytes`], head and footer included.
    pub bytes: Range<usize>,
}

impl DeviceSection {
    /// As people write it: the name, and the instance where it is not the first.
    pub fn label(&self) -> String {
        if self.instance == 0 {
            self.name.clone()
        } else {
            format!("{}#{}", self.name, self.instance)
        }
    }

    /// What the device itself wrote, of the section's bytes: without head, whose number depends on
    /// the order of devices, and footer.
    pub fn body<'a>(&self, section: &'a [u8]) -> &'a [u8] {
        let head = 1 + 4 + 1 + self.name.len() + 4 + 4;
        section.get(head..section.len().saturating_sub(FOOTER)).unwrap_or_default()
    }
}

/// A parsed device part.
pub(super) struct Cut {
    pub(super) state: DeviceState,
    pub(super) sections: Vec<DeviceSection>,
    /// JSON.
    pub(super) description: Vec<u8>,
}

/// The stream from its first device section to its end, with a stream header put before.
pub(super) struct DevicePart {
    bytes: Vec<u8>,
    /// Offset in the stream of what follows the header put before.
    at: u64,
}

impl DevicePart {
    pub(super) fn new(bytes: Vec<u8>, at: u64) -> Self {
        Self { bytes, at }
    }

    /// Checks all of it. `limits`: largest device state and description.
    pub(super) fn cut(mut self, limits: (u64, u64)) -> Result<Cut, StreamReadError> {
        let end = self.end_mark(limits.1)?;
        self.limit("the device part", self.at, end as u64 + 1, limits.0)?;
        let sections = {
            let json = &self.bytes[end + 1 + DESCRIPTION_HEAD..];
            let at = self.offset(end + 1 + DESCRIPTION_HEAD);
            let description: Description = serde_json::from_slice(json)
                .map_err(|source| StreamReadError::Description { at, source })?;
            if description.page_size != STREAM_PAGE as u64 {
                let found = format!("a page size of {}", description.page_size);
                return Err(StreamReadError::malformed(at, found, STREAM_PAGE.to_string()));
            }
            self.sections(&description.devices, end)?
        };
        let description = self.bytes.split_off(end + 1 + DESCRIPTION_HEAD);
        self.bytes.truncate(end + 1);
        let at = self.at;
        let state = DeviceState::from_bytes(self.bytes).map_err(|error| {
            StreamReadError::malformed(at, error.to_string(), "at least one device section")
        })?;
        Ok(Cut { state, sections, description })
    }

    /// Where the end mark is before the description. The description is text, which has no byte
    /// like a mark in it, so the one whose length reaches to the end of the stream is it.
    fn end_mark(&self, limit: u64) -> Result<usize, StreamReadError> {
        let head = 1 + DESCRIPTION_HEAD;
        let bytes = &self.bytes;
        let last = bytes.len().checked_sub(head).ok_or_else(|| self.cut_off())?;
        let fits = |at: &usize| {
            let [end, kind, a, b, c, d] = bytes[*at..*at + head] else { return false };
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            (end, kind) == (mark::END_OF_STREAM, mark::DESCRIPTION)
                && length == bytes.len() - at - head
        };
        let found = (STREAM_HEADER.len()..=last).rev().find(fits).ok_or_else(|| self.cut_off())?;
        self.limit(
            "the description",
            self.offset(found + head),
            (bytes.len() - found - head) as u64,
            limit,
        )?;
        Ok(found)
    }

    /// Without a description: on purpose, or is the end missing?
    fn cut_off(&self) -> StreamReadError {
        let at = self.offset(self.bytes.len());
        let last = self.bytes.len().saturating_sub(FOOTER + 1);
        match self.bytes[last..] {
            [mark::SECTION_FOOTER, .., mark::END_OF_STREAM] => {
                StreamReadError::NoDescription { at }
            }
            _ => StreamReadError::CutOff { at, inside: "the device part" },
        }
    }

    /// Walks over the sections up to `end`.
    fn sections(
        &self,
        devices: &[Device],
        end: usize,
    ) -> Result<Vec<DeviceSection>, StreamReadError> {
        let mut walk = Walk { bytes: &self.bytes[..end], next: STREAM_HEADER.len(), part: self };
        let mut sections = Vec::new();
        for device in devices {
            sections.push(walk.section(device)?);
        }
        if walk.next == end {
            return Ok(sections);
        }
        let found =
            format!("{} more bytes after the last described device section", end - walk.next);
        Err(StreamReadError::malformed(self.offset(walk.next), found, "the end mark"))
    }

    fn limit(
        &self,
        what: &'static str,
        at: u64,
        found: u64,
        limit: u64,
    ) -> Result<(), StreamReadError> {
        if found <= limit {
            Ok(())
        } else {
            Err(StreamReadError::TooLarge { at, what, found, limit })
        }
    }

    /// From an index of `bytes`, which is not before the end of the header, to one in the stream.
    fn offset(&self, index: usize) -> u64 {
        self.at + (index - STREAM_HEADER.len()) as u64
    }
}

/// Steps from section to section; running out of bytes means that a size in the description is
/// wrong.
struct Walk<'a> {
    bytes: &'a [u8],
    next: usize,
    part: &'a DevicePart,
}

impl<'a> Walk<'a> {
    fn section(&mut self, device: &Device) -> Result<DeviceSection, StreamReadError> {
        let start = self.next;
        let [kind] = self.array(device)?;
        if kind != mark::SECTION_FULL {
            return Err(misplaced(self.part.offset(start), kind, "a device section"));
        }
        let id = u32::from_be_bytes(self.array(device)?);
        let [length] = self.array(device)?;
        let name = self.take(length.into(), device)?;
        let instance = u32::from_be_bytes(self.array(device)?);
        let version = u32::from_be_bytes(self.array(device)?);
        if (name, instance) != (device.name.as_bytes(), device.instance_id) {
            let found = format!("section `{}` of instance {instance}", name.escape_ascii());
            return Err(self.wrong(start, found, device));
        }
        let length = device.length().and_then(|length| usize::try_from(length).ok());
        self.take(length.unwrap_or(usize::MAX), device)?;
        let footer = self.next;
        let ([kind], number) = (self.array(device)?, u32::from_be_bytes(self.array(device)?));
        if (kind, number) != (mark::SECTION_FOOTER, id) {
            return Err(self.wrong(
                footer,
                format!("{kind:#04x} and {number} in place of the footer"),
                device,
            ));
        }
        Ok(DeviceSection {
            id,
            name: device.name.clone().into(),
            instance,
            version,
            bytes: start..self.next,
        })
    }

    fn take(&mut self, length: usize, device: &Device) -> Result<&'a [u8], StreamReadError> {
        let taken = self.next.checked_add(length).and_then(|end| self.bytes.get(self.next..end));
        let taken = taken
            .ok_or_else(|| self.wrong(self.next, format!("fewer than {length} bytes"), device))?;
        self.next += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, device: &Device) -> Result<[u8; N], StreamReadError> {
        Ok(self.take(N, device)?.try_into().expect("as long as asked for"))
    }

    fn wrong(&self, index: usize, found: String, device: &Device) -> StreamReadError {
        let length = device.length().unwrap_or(u64::MAX);
        let expected = format!(
            "the section `{}` of instance {} with {length} bytes, as the description says",
            device.name.escape_debug(),
            device.instance_id
        );
        StreamReadError::malformed(self.part.offset(index), found, expected)
    }
}
