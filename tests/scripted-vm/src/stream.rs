//! The bytes of a migration stream, as small as one can be: header, configuration, memory, two
//! devices, description.

use crate::Ram;
use crate::ram::PAGE;

pub(crate) const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";
const RAM_SECTION: u32 = 2;
const RAM_VERSION: u32 = 4;
/// The device whose section has the run state.
pub(crate) const RUN_STATE: &str = "globalstate";
/// All devices, and the bytes of each one's section.
pub(crate) const DEVICES: [(&str, usize); 2] = [("timer", 9), (RUN_STATE, 104)];

pub(crate) mod mark {
    pub(crate) const END: u8 = 0;
    pub(crate) const START: u8 = 1;
    pub(crate) const PART: u8 = 2;
    pub(crate) const LAST: u8 = 3;
    pub(crate) const FULL: u8 = 4;
    pub(crate) const SUBSECTION: u8 = 5;
    pub(crate) const DESCRIPTION: u8 = 6;
    pub(crate) const CONFIGURATION: u8 = 7;
    pub(crate) const FOOTER: u8 = 0x7e;
}

pub(crate) mod flag {
    pub(crate) const ZERO: u64 = 0x02;
    pub(crate) const SIZES: u64 = 0x04;
    pub(crate) const PAGE: u64 = 0x08;
    pub(crate) const END: u64 = 0x10;
    /// Of the same block as the record before.
    pub(crate) const CONTINUES: u64 = 0x20;
}

fn name(bytes: &mut Vec<u8>, name: &str) {
    bytes.push(u8::try_from(name.len()).expect("a short name"));
    bytes.extend(name.as_bytes());
}

fn number(bytes: &mut Vec<u8>, number: u32) {
    bytes.extend(number.to_be_bytes());
}

fn footer(bytes: &mut Vec<u8>, section: u32) {
    bytes.push(mark::FOOTER);
    number(bytes, section);
}

/// What comes before the first page.
pub(crate) fn head(machine_type: &str, ram: &Ram) -> Vec<u8> {
    let mut bytes = HEADER.to_vec();
    bytes.push(mark::CONFIGURATION);
    number(&mut bytes, u32::try_from(machine_type.len()).expect("a short name"));
    bytes.extend(machine_type.as_bytes());
    bytes.push(mark::START);
    number(&mut bytes, RAM_SECTION);
    name(&mut bytes, "ram");
    number(&mut bytes, 0);
    number(&mut bytes, RAM_VERSION);
    let total: u64 = ram.parts.iter().map(|part| part.bytes).sum();
    bytes.extend((total | flag::SIZES).to_be_bytes());
    for part in &ram.parts {
        name(&mut bytes, &part.name);
        bytes.extend(part.bytes.to_be_bytes());
    }
    bytes.extend(flag::END.to_be_bytes());
    footer(&mut bytes, RAM_SECTION);
    bytes
}

/// One pass over memory: these pages as they are now. `is_last`: of the stream.
pub(crate) fn pass(ram: &Ram, pages: &[(usize, usize)], is_last: bool) -> Vec<u8> {
    let mut bytes = vec![if is_last { mark::LAST } else { mark::PART }];
    number(&mut bytes, RAM_SECTION);
    for (part, page) in pages {
        let content = ram.page(*part, *page);
        let is_zero = content.iter().all(|byte| *byte == 0);
        let kind = if is_zero { flag::ZERO } else { flag::PAGE };
        bytes.extend(((page * PAGE) as u64 | kind).to_be_bytes());
        name(&mut bytes, &ram.parts[*part].name);
        if is_zero { bytes.push(0) } else { bytes.extend(content) }
    }
    bytes.extend(flag::END.to_be_bytes());
    footer(&mut bytes, RAM_SECTION);
    bytes
}

/// `timer` and the section that holds the run state.
fn sections(run_state: &str) -> Vec<u8> {
    let mut state = vec![0; 104];
    let length = u32::try_from(run_state.len() + 1).expect("a short name");
    state[..4].copy_from_slice(&length.to_be_bytes());
    state[4..4 + run_state.len()].copy_from_slice(run_state.as_bytes());
    let mut bytes = Vec::new();
    for (id, device, content) in [(0, "timer", &[7; 9][..]), (3, RUN_STATE, &state)] {
        bytes.push(mark::FULL);
        number(&mut bytes, id);
        name(&mut bytes, device);
        number(&mut bytes, 0);
        number(&mut bytes, 1);
        bytes.extend(content);
        footer(&mut bytes, id);
    }
    bytes
}

/// What comes after the last page.
pub(crate) fn tail(run_state: &str) -> Vec<u8> {
    let description = r#"{"configuration":{},"page_size":4096,"devices":[
        {"name":"timer","instance_id":0,"fields":[{"name":"t","size":9}]},
        {"name":"globalstate","instance_id":0,
         "fields":[{"name":"size","size":4},{"name":"runstate","size":100}]}]}"#;
    let mut bytes = sections(run_state);
    bytes.extend([mark::END, mark::DESCRIPTION]);
    number(&mut bytes, u32::try_from(description.len()).expect("short"));
    bytes.extend(description.as_bytes());
    bytes
}

/// What `xen-save-devices-state` writes.
pub fn device_state(run_state: &str) -> Vec<u8> {
    [&HEADER[..], &sections(run_state), &[mark::END]].concat()
}
