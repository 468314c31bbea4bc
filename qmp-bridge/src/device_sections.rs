//! The sections of a device state that came without a description, and the fields of one that came
//! with it.

use std::collections::HashSet;
use std::ops::Range;

use serde::Deserialize;

use crate::device_state::DeviceState;
use crate::stream_format::{STREAM_HEADER, mark};
use crate::stream_reader::{DeviceSection, StreamReadError};

/// Mark and number of a section's footer.
const FOOTER: usize = 5;

/// Cuts a device state that came without a description, by the lengths of the sections of a QEMU
/// that has the same devices. A section of another length ends where its footer and the head of
/// another section, or the end, follow each other.
///
/// # Errors
/// When a section is like none of `like`, or the state is damaged.
pub fn sections_like(
    state: &DeviceState,
    like: &[DeviceSection],
) -> Result<Vec<DeviceSection>, StreamReadError> {
    let bytes = state.as_bytes();
    let end = bytes.len() - 1;
    let mut at = STREAM_HEADER.len();
    let mut sections = Vec::new();
    while at < end {
        let section = section_at(bytes, at, end, like).ok_or_else(|| {
            StreamReadError::malformed(
                at as u64,
                "no whole device section",
                "a section like those of the restored QEMU",
            )
        })?;
        at = section.bytes.end;
        sections.push(section);
    }
    Ok(sections)
}

/// A section that is there twice. QEMU loads both into the first of two such devices, so what the
/// second had is lost and the first has what it never had: no QEMU can restore that VM. (7.2 writes
/// both IDE controllers of an `isapc` like that.)
pub fn repeated_section(state: &DeviceState) -> Option<String> {
    let sections = sections_like(state, &[]).ok()?;
    let mut seen = HashSet::new();
    sections
        .into_iter()
        .find(|section| !seen.insert((section.name.clone(), section.instance)))
        .map(|section| section.name)
}

fn section_at(
    bytes: &[u8],
    at: usize,
    end: usize,
    like: &[DeviceSection],
) -> Option<DeviceSection> {
    let head = head(bytes, at)?;
    let length = like
        .iter()
        .find(|other| (other.name.as_str(), other.instance) == (head.name.as_str(), head.instance));
    let known = length.map(|other| at + (other.bytes.end - other.bytes.start));
    let is_end = |ends: &usize| {
        let footer = ends.checked_sub(FOOTER).and_then(|from| bytes.get(from..*ends));
        let is_footer = footer.is_some_and(|footer| {
            footer[0] == mark::SECTION_FOOTER && footer[1..] == head.id.to_be_bytes()
        });
        is_footer && (*ends == end || self::head(bytes, *ends).is_some())
    };
    let ends = known.filter(is_end).or_else(|| (head.bytes.end + FOOTER..=end).find(is_end))?;
    Some(DeviceSection { bytes: at..ends, ..head })
}

/// The head of a section, which is all of `bytes` that the result has.
fn head(bytes: &[u8], at: usize) -> Option<DeviceSection> {
    let number = |at: usize| {
        bytes.get(at..at + 4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
    };
    if *bytes.get(at)? != mark::SECTION_FULL {
        return None;
    }
    let length = usize::from(*bytes.get(at + 5)?);
    let name = std::str::from_utf8(bytes.get(at + 6..at + 6 + length)?).ok()?;
    let is_name = length > 0 && name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let rest = at + 6 + length;
    let section = DeviceSection {
        id: number(at + 1)?,
        name: name.to_owned(),
        instance: number(rest)?,
        version: number(rest + 4)?,
        bytes: at..rest + 8,
    };
    is_name.then_some(section)
}

/// Which field of which section a byte belongs to, by QEMU's own description of its stream.
#[derive(Debug, Clone, Deserialize)]
pub struct Layout {
    devices: Vec<Device>,
}

#[derive(Debug, Clone, Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    #[serde(flatten)]
    body: Structure,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Structure {
    /// Of a subsection.
    vmsd_name: String,
    fields: Vec<Field>,
    subsections: Vec<Structure>,
}

#[derive(Debug, Clone, Deserialize)]
struct Field {
    name: String,
    /// Bytes, of each of `array_len`.
    size: u64,
    array_len: Option<u64>,
    #[serde(rename = "struct")]
    below: Option<Structure>,
}

impl Layout {
    /// `description` as [`crate::stream_reader::StreamReader::description`] gives it.
    ///
    /// # Errors
    /// When it is no JSON of the form that QEMU writes.
    pub fn parse(description: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(description)
    }

    /// Where in the section's body the field `name` of its first level is.
    pub fn range(&self, section: &DeviceSection, name: &str) -> Option<Range<usize>> {
        let mut at = 0;
        for field in &self.device(section)?.fields {
            let end = usize::try_from(field.length()?).ok()?.checked_add(at)?;
            if field.name == name {
                return Some(at..end);
            }
            at = end;
        }
        None
    }

    fn device(&self, section: &DeviceSection) -> Option<&Structure> {
        let is_it = |device: &&Device| {
            (&device.name, device.instance_id) == (&section.name, section.instance)
        };
        self.devices.iter().find(is_it).map(|device| &device.body)
    }

    /// The field at `offset` of the section's body and the offset in it: `bmdma.cmd` and 0.
    /// Elements of a list have no numbers of their own. `None` beyond what is described.
    pub fn field(&self, section: &DeviceSection, offset: u64) -> Option<(String, u64)> {
        self.device(section)?.field(offset)
    }
}

impl Field {
    fn length(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

impl Structure {
    fn field(&self, offset: u64) -> Option<(String, u64)> {
        let mut at = 0;
        for field in &self.fields {
            let end = field.length()?.checked_add(at)?;
            if offset < end && field.size > 0 {
                let inside = (offset - at) % field.size;
                let below = field.below.as_ref().and_then(|below| below.field(inside));
                // Of a list of single bytes the place in the list is what a reader wants.
                let place = if field.size == 1 { offset - at } else { inside };
                return Some(below.map_or_else(
                    || (field.name.clone(), place),
                    |(path, rest)| (format!("{}.{path}", field.name), rest),
                ));
            }
            at = end;
        }
        self.subsection(offset.checked_sub(at)?)
    }

    fn subsection(&self, offset: u64) -> Option<(String, u64)> {
        let mut at = 0;
        for part in &self.subsections {
            let end = part.length()?.checked_add(part.head())?.checked_add(at)?;
            if offset < end {
                let inside = (offset - at).checked_sub(part.head());
                let field = inside.and_then(|inside| part.field(inside));
                return Some(field.map_or_else(
                    || (part.vmsd_name.clone(), offset - at),
                    |(path, rest)| (format!("{}.{path}", part.vmsd_name), rest),
                ));
            }
            at = end;
        }
        None
    }

    /// Bytes of a subsection before its fields: mark, length of the name, name, version.
    fn head(&self) -> u64 {
        1 + 1 + self.vmsd_name.len() as u64 + 4
    }

    /// Bytes of the fields and subsections.
    fn length(&self) -> Option<u64> {
        let fields = self.fields.iter().map(Field::length);
        let parts = self.subsections.iter().map(|part| part.length()?.checked_add(part.head()));
        fields.chain(parts).try_fold(0u64, |sum, one| sum.checked_add(one?))
    }
}

#[cfg(test)]
mod test {
    use serde_json::json;

    use super::*;

    fn section(id: u32, name: &str, body: &[u8]) -> Vec<u8> {
        let head =
            [&[mark::SECTION_FULL][..], &id.to_be_bytes(), &[name.len() as u8], name.as_bytes()]
                .concat();
        [&head[..], &[0; 7], &[1], body, &[mark::SECTION_FOOTER], &id.to_be_bytes()].concat()
    }

    fn state(sections: &[Vec<u8>]) -> DeviceState {
        let bytes = [&STREAM_HEADER[..], &sections.concat(), &[mark::END_OF_STREAM]].concat();
        DeviceState::from_bytes(bytes).expect("a device state")
    }

    #[test]
    fn sections_of_another_length_are_cut_at_their_footers() {
        let like = sections_like(
            &state(&[section(1, "timer", &[1, 2, 3]), section(2, "cpu", &[9; 40])]),
            &[],
        )
        .expect("cut");
        let longer = state(&[
            section(7, "timer", &[0x7e, 0, 0, 0, 7, 5, 6]),
            section(8, "cpu", &[9; 40]),
            section(9, "new", &[]),
        ]);
        let found = sections_like(&longer, &like).expect("cut");
        let body = |number: usize| {
            found[number].body(&longer.as_bytes()[found[number].bytes.clone()]).to_vec()
        };
        assert_eq!(
            (found.len(), body(0), body(1), body(2)),
            (3, vec![0x7e, 0, 0, 0, 7, 5, 6], vec![9; 40], vec![])
        );
        let mut bytes = longer.into_bytes();
        bytes[STREAM_HEADER.len() + 3] = 1;
        assert!(
            sections_like(&DeviceState::from_bytes(bytes).expect("its frame is right"), &like)
                .is_err()
        );
    }

    #[test]
    fn repeated_section_is_found_by_name_and_instance() {
        let mut second = section(2, "isa-ide", &[2]);
        assert_eq!(
            repeated_section(&state(&[section(1, "isa-ide", &[1; 9]), second.clone()])).as_deref(),
            Some("isa-ide")
        );
        let instance = second.len() - 5 - 1 - 4 - 1;
        second[instance] = 1;
        assert_eq!(
            repeated_section(&state(&[
                section(1, "isa-ide", &[1; 9]),
                second,
                section(3, "fdc", &[])
            ])),
            None
        );
    }

    #[test]
    fn a_byte_is_named_by_its_field() {
        let inner = json!({ "vmsd_name": "one", "fields": [{ "name": "cmd", "size": 1 }, { "name": "retry", "size": 8 }] });
        let device = json!({
            "name": "ide", "instance_id": 0,
            "fields": [{ "name": "head", "size": 4 }, { "name": "bmdma", "size": 9, "array_len": 2, "struct": inner },
                       { "name": "bytes", "size": 1, "array_len": 5 }],
            "subsections": [{ "vmsd_name": "ide/more", "fields": [{ "name": "last", "size": 2 }] }],
        });
        let description = json!({ "devices": [device] }).to_string();
        let layout = Layout::parse(description.as_bytes()).expect("a description");
        let section =
            DeviceSection { id: 0, name: "ide".into(), instance: 0, version: 1, bytes: 0..0 };
        let field = |offset: u64| layout.field(&section, offset);
        assert_eq!(field(2), Some(("head".into(), 2)));
        assert_eq!(field(4 + 9), Some(("bmdma.cmd".into(), 0)));
        assert_eq!(field(4 + 9 + 3), Some(("bmdma.retry".into(), 2)));
        assert_eq!(field(4 + 18 + 3), Some(("bytes".into(), 3)));
        assert_eq!(field(4 + 18 + 5 + 14 + 1), Some(("ide/more.last".into(), 1)));
        assert_eq!(field(4 + 18 + 5 + 14 + 2), None);
        assert_eq!(
            (layout.range(&section, "bytes"), layout.range(&section, "cmd")),
            (Some(22..27), None)
        );
    }
}
