//! Lets a QEMU that was just loaded, and has not run, write its state again: what it would send to
//! the next host is what it has.
//!
//! Blocks in shared memory are left out (`x-ignore-shared` is set since the load); all others
//! come with every page, then the devices. Afterwards the run state is `postmigrate` and QEMU has
//! given up its disks; `cont` makes it the VM's QEMU again.

use std::collections::HashSet;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;

use crate::device_state::DeviceState;
use crate::qmp::{Qmp, QmpError};
use crate::stream_format::{STREAM_HEADER, mark};
use crate::stream_reader::{DeviceSection, StreamReadError};

/// QEMU's name for its end until `migrate` takes it.
const FD_NAME: &str = "stillpoint-resave";
/// QEMU's limit for a stream is meant for networks; here its own speed is the limit. In bytes a
/// second.
const BANDWIDTH: u64 = 100 << 30;
/// Mark and number of a section's footer.
const FOOTER: usize = 5;
const POLL: Duration = Duration::from_millis(1);
/// After the stream has ended QEMU has little left to do.
const END_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ResaveError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("cannot make a socket pair: {0}")]
    Socket(std::io::Error),
    #[error("QEMU could not write its state: {why}")]
    Failed { why: String },
    #[error("QEMU's migration is still `{status}` {after:?} after its stream ended")]
    Stuck { status: String, after: Duration },
}

/// Starts it. The stream must be read to its end, blocking, then [`finish`] is called.
///
/// # Errors
/// When QEMU refuses to migrate.
pub async fn start(qmp: &Qmp) -> Result<UnixStream, ResaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(ResaveError::Socket)?;
    qmp.execute_with_fd("getfd", json!({ "fdname": FD_NAME }), theirs.as_fd()).await?;
    qmp.execute_json("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH })).await?;
    qmp.execute_json("migrate", json!({ "uri": format!("fd:{FD_NAME}") })).await?;
    Ok(ours)
}

/// Waits until QEMU says that it has written all.
///
/// # Errors
/// When the migration fails or does not end in time.
pub async fn finish(qmp: &Qmp) -> Result<(), ResaveError> {
    let begun = Instant::now();
    loop {
        let reply = qmp.execute_json("query-migrate", Value::Null).await?;
        let status = reply["status"].as_str().unwrap_or("none").to_owned();
        match status.as_str() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let why = reply["error-desc"].as_str().unwrap_or("it gave no reason").to_owned();
                return Err(ResaveError::Failed { why });
            }
            _ if begun.elapsed() > END_TIMEOUT => {
                return Err(ResaveError::Stuck { status, after: END_TIMEOUT });
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

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
        is_footer && (*ends == end || crate::resave::head(bytes, *ends).is_some())
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
#[derive(Debug, Clone)]
pub struct Layout(Value);

impl Layout {
    /// `description` as [`crate::stream_reader::StreamReader::description`] gives it.
    ///
    /// # Errors
    /// When it is no JSON of the form that QEMU writes.
    pub fn parse(description: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(description).map(Self)
    }

    /// Where in the section's body the field `name` of its first level is.
    pub fn range(&self, section: &DeviceSection, name: &str) -> Option<Range<usize>> {
        let mut at = 0;
        for field in self.device(section)?["fields"].as_array()? {
            let length =
                field["size"].as_u64()?.checked_mul(field["array_len"].as_u64().unwrap_or(1))?;
            let end = usize::try_from(length).ok()?.checked_add(at)?;
            if field["name"] == name {
                return Some(at..end);
            }
            at = end;
        }
        None
    }

    fn device(&self, section: &DeviceSection) -> Option<&Value> {
        let devices = self.0["devices"].as_array()?;
        devices.iter().find(|device| {
            device["name"] == section.name.as_str() && device["instance_id"] == section.instance
        })
    }

    /// The field at `offset` of the section's body and the offset in it: `bmdma.cmd` and 0.
    /// Elements of a list have no numbers of their own. `None` beyond what is described.
    pub fn field(&self, section: &DeviceSection, offset: u64) -> Option<(String, u64)> {
        field_in(self.device(section)?, offset, 0)
    }
}

/// Structures in structures; QEMU has a dozen at most.
const MAX_NESTING: u32 = 64;

fn field_in(device: &Value, offset: u64, depth: u32) -> Option<(String, u64)> {
    let mut at = 0;
    for field in
        device["fields"].as_array().into_iter().flatten().take_while(|_| depth < MAX_NESTING)
    {
        let (size, count) = (field["size"].as_u64()?, field["array_len"].as_u64().unwrap_or(1));
        let end = size.checked_mul(count).and_then(|length| length.checked_add(at))?;
        if offset < end && size > 0 {
            let inside = (offset - at) % size;
            let name = field["name"].as_str().unwrap_or("?");
            let below = field.get("struct").and_then(|below| field_in(below, inside, depth + 1));
            // Of a list of single bytes the place in the list is what a reader wants.
            let place = if size == 1 { offset - at } else { inside };
            return Some(below.map_or_else(
                || (name.to_owned(), place),
                |(path, rest)| (format!("{name}.{path}"), rest),
            ));
        }
        at = end;
    }
    subsection_in(device, offset.checked_sub(at)?, depth)
}

/// Mark, length of the name, name and version stand before a subsection's fields.
fn subsection_in(device: &Value, offset: u64, depth: u32) -> Option<(String, u64)> {
    let mut at = 0;
    for part in
        device["subsections"].as_array().into_iter().flatten().take_while(|_| depth < MAX_NESTING)
    {
        let name = part["vmsd_name"].as_str()?;
        let head = 1 + 1 + name.len() as u64 + 4;
        let end = length(part, depth)?.checked_add(head)?.checked_add(at)?;
        if offset < end {
            let inside = (offset - at).checked_sub(head);
            let field = inside.and_then(|inside| field_in(part, inside, depth + 1));
            return Some(field.map_or_else(
                || (name.to_owned(), offset - at),
                |(path, rest)| (format!("{name}.{path}"), rest),
            ));
        }
        at = end;
    }
    None
}

/// Bytes of the fields and subsections.
fn length(device: &Value, depth: u32) -> Option<u64> {
    if depth >= MAX_NESTING {
        return None;
    }
    let field = |field: &Value| {
        field["size"].as_u64()?.checked_mul(field["array_len"].as_u64().unwrap_or(1))
    };
    let part = |part: &Value| {
        length(part, depth + 1)?.checked_add(6 + part["vmsd_name"].as_str()?.len() as u64)
    };
    let fields = device["fields"].as_array().into_iter().flatten().map(field);
    let parts = device["subsections"].as_array().into_iter().flatten().map(part);
    fields.chain(parts).try_fold(0u64, |sum, one| sum.checked_add(one?))
}

#[cfg(test)]
mod test {
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
        let layout = Layout(json!({ "devices": [device] }));
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
