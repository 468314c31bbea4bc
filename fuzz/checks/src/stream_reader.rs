//! QEMU's migration stream. Also the tests of `qmp-bridge` read streams through this.

use std::io::Read;

use qmp_bridge::stream::STREAM_PAGE;
use qmp_bridge::stream_reader::{Item, ReaderLimits, StreamReadError, StreamReader};

/// Whether it is an error does not matter; that nothing is given that the reader promises not to
/// give is asserted.
pub(crate) fn check(input: &[u8]) -> bool {
    Pieces::of_fuzzer(input).is_some_and(|pieces| read_all(pieces, limits()).is_ok())
}

/// What a stream held.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub machine_type: String,
    pub capabilities: Vec<String>,
    /// Names and sizes.
    pub blocks: Vec<(String, u64)>,
    pub pages: usize,
    pub zeros: usize,
    pub passes: usize,
    /// Names and instances of device sections.
    pub devices: Vec<(String, u32)>,
    /// The device state.
    pub state: Vec<u8>,
}

/// Small enough for a fuzzer that looks at its memory.
pub(crate) fn limits() -> ReaderLimits {
    ReaderLimits { read_buffer: 0, blocks: 64, devices: 256 << 10, description: 256 << 10 }
}

/// A source that gives its bytes in pieces of a certain size.
pub(crate) struct Pieces<'a> {
    pub bytes: &'a [u8],
    pub size: usize,
}

impl<'a> Pieces<'a> {
    /// What the fuzzer makes: the first byte says in how small pieces the rest comes.
    pub(crate) fn of_fuzzer(input: &'a [u8]) -> Option<Self> {
        let (first, bytes) = input.split_first()?;
        let size = match first {
            0..=63 => 1 + usize::from(*first),
            64..=127 => 4096 + usize::from(*first),
            _ => usize::MAX,
        };
        Some(Self { bytes, size })
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.bytes.len().min(buffer.len()).min(self.size);
        let (now, later) = self.bytes.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.bytes = later;
        Ok(length)
    }
}

/// Reads all of a stream and panics if the reader gives anything that it promises not to give.
pub(crate) fn read_all<R: Read>(source: R, limits: ReaderLimits) -> Result<Facts, StreamReadError> {
    let mut reader = StreamReader::new(source, limits);
    let outcome = items(&mut reader);
    match &outcome {
        Ok(_) => assert!(matches!(reader.next(), Ok(None)), "the end is the end"),
        Err(_) => assert!(
            matches!(reader.next(), Err(StreamReadError::GivenUp)),
            "nothing comes after an error"
        ),
    }
    outcome
}

fn items<R: Read>(reader: &mut StreamReader<R>) -> Result<Facts, StreamReadError> {
    let mut facts = Facts::default();
    let (mut listed, mut ended) = (false, false);
    loop {
        let before = reader.position();
        let Some(item) = reader.next()? else { break };
        match item {
            Item::Configuration { machine_type, capabilities } => {
                assert_eq!(before, 0);
                (facts.machine_type, facts.capabilities) = (machine_type, capabilities);
            }
            Item::Blocks(blocks) => {
                assert!(!facts.machine_type.is_empty() && !listed);
                listed = true;
                facts.blocks =
                    blocks.iter().map(|block| (block.name.clone(), block.used)).collect();
            }
            Item::Page { block, offset, bytes } => {
                assert!(!ended && bytes.len() == STREAM_PAGE);
                inside(&facts, block, offset);
                facts.pages += 1;
            }
            Item::Zero { block, offset } => {
                assert!(!ended);
                inside(&facts, block, offset);
                facts.zeros += 1;
            }
            Item::PassEnd => facts.passes += 1,
            Item::RamEnd => {
                assert!(listed && !ended);
                ended = true;
            }
            Item::Devices(state) => {
                assert!(ended);
                facts.state = state.into_bytes();
            }
        }
    }
    let mut next = 8;
    for section in reader.device_sections() {
        assert_eq!(section.bytes.start, next, "one after another");
        next = section.bytes.end;
        facts.devices.push((section.name.clone(), section.instance));
    }
    assert_eq!(facts.state.len(), next + 1, "nothing but an end mark is left");
    assert!(reader.position() >= facts.state.len() as u64);
    Ok(facts)
}

fn inside(facts: &Facts, block: usize, offset: u64) {
    let (_, used) = &facts.blocks[block];
    let page = STREAM_PAGE as u64;
    assert!(offset.is_multiple_of(page) && offset < *used && used.is_multiple_of(page));
}
