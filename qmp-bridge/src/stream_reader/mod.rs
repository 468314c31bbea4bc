//! Reads the migration stream that QEMU writes: a strict reader, which knows what a plain migration
//! sends and names everything else.
//!
//! ```text
//! "QEVM" 3 | configuration: machine type, subsections (capabilities, page bits, uuid)
//!          | section START "ram": total size, list of blocks, end mark, footer  -> Blocks
//!          | section PART: records of pages, end mark, footer; repeated
//!                                                              -> Page, Zero .. PassEnd
//!          | [command SWITCHOVER_START]          pre-copy of machine types since 10.0
//!          | [section END: as PART]              pre-copy only  -> Page, Zero .. RamEnd
//!          | device sections FULL .. | end mark | description: 0x06, be32 length, JSON  -> Devices
//! ```
//!
//! All numbers are big-endian. A section is mark, be32 number (START and FULL: name, instance,
//! version too), content, then the footer 0x7e and the number again. A *record* of memory is be64:
//! offset in the block, with flags in the low 12 bits; unless the flag CONTINUE says "the same
//! block as before", a name follows; then 4096 bytes (PAGE) or one (ZERO, the byte that fills the
//! page). CONTINUE reaches over the end of a section. The form is that of `savevm.c` and `ram.c`,
//! seen in streams of QEMU 7.2 and 10.0; `tests/streams/` has some of them.
//!
//! What the two ways to migrate differ in: **pre-copy** stops the guest at the end, so a page may
//! come several times and the last one counts. A **background snapshot** stops it at the beginning,
//! when QEMU puts the device sections into a buffer; each page comes once, with its content at that
//! instant. It has no END section: the first device section says that all memory is there. Both
//! send every page of every block in the list, with two exceptions that the stream does not mark:
//! blocks in shared files under `x-ignore-shared`, and pages that the guest has freed (balloon
//! hints) or that are not plugged in (virtio-mem). The content of a page that did not come is
//! unknown; it need not be zero.
//!
//! Device sections carry no length. What comes after memory is gathered up to the end of the source
//! and cut by the sizes in the description behind it; a head or footer that is not where it should
//! be is an error. A device that saves a section *before* memory (virtio-mem since 8.0) cannot be
//! cut that way, and is refused.
//!
//! Nothing is trusted. Memory used is the buffer, the list of blocks, and the device part, each
//! with a limit ([`ReaderLimits`]); pages are borrowed from the buffer.

mod configuration;
mod description;
mod devices;
mod error;
mod ram;
mod section;
mod source;

use std::io::Read;
use std::ops::Range;

use self::configuration::Configuration;
use self::devices::{Cut, DESCRIPTION_HEAD, DevicePart};
use self::ram::{Ram, Record};
use self::section::Head;
use self::source::Source;
use crate::device_state::{DeviceState, MAX_DEVICE_STATE};
use crate::ramblock::MAX_RAM_BLOCKS;
use crate::stream_format::{STREAM_HEADER, STREAM_PAGE, mark};

pub use self::configuration::{MAX_CAPABILITIES, MAX_MACHINE_TYPE};
pub use self::devices::{DeviceSection, MAX_DESCRIPTION};
pub use self::error::StreamReadError;
pub use self::ram::StreamRamBlock;

/// Bytes of the stream held at once: few reads, and small enough to stay in a processor's cache.
pub const READ_BUFFER: usize = 256 << 10;
/// A buffer must hold a page, and is more than any name.
const MIN_READ_BUFFER: usize = 2 * STREAM_PAGE;

/// How much a stream may make the reader hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderLimits {
    /// Size of the buffer, at least two pages.
    pub read_buffer: usize,
    /// Most RAM blocks, at most [`MAX_RAM_BLOCKS`].
    pub blocks: usize,
    /// Largest device part.
    pub devices: u64,
    /// Longest description.
    pub description: u64,
}

impl Default for ReaderLimits {
    fn default() -> Self {
        Self {
            read_buffer: READ_BUFFER,
            blocks: MAX_RAM_BLOCKS,
            devices: MAX_DEVICE_STATE,
            description: MAX_DESCRIPTION,
        }
    }
}

/// What the stream has next, in the order in which it can come.
#[derive(Debug)]
pub enum Item<'a> {
    /// What VM the stream is of.
    Configuration {
        /// The versioned name.
        machine_type: String,
        /// Those that change the form of the stream: none, or `x-ignore-shared`.
        capabilities: Vec<String>,
    },
    /// All RAM blocks, in QEMU's order. Pages name them by index.
    Blocks(&'a [StreamRamBlock]),
    /// [`STREAM_PAGE`] bytes at `offset` of a block, a multiple of that and inside the block.
    Page {
        /// Index of the block.
        block: usize,
        /// Bytes from the block's beginning.
        offset: u64,
        /// The page.
        bytes: &'a [u8],
    },
    /// A page of zeros.
    Zero {
        /// Index of the block.
        block: usize,
        /// Bytes from the block's beginning.
        offset: u64,
    },
    /// The end of one pass (a PART section): QEMU has sent what it wanted to send at once, not all
    /// that is dirty.
    PassEnd,
    /// All memory is here.
    RamEnd,
    /// All device sections, as `xen-save-devices-state` gives them.
    /// [`StreamReader::device_sections`] says which.
    Devices(DeviceState),
}

/// Reads a stream item by item. It blocks as its source does, so it wants a thread of its own.
pub struct StreamReader<R: Read> {
    source: Source<R>,
    limits: ReaderLimits,
    state: State,
    /// Since its START section.
    ram: Option<Ram>,
    /// Each block in the list has an address.
    addresses: bool,
    /// The one command that is supported is once in a stream.
    had_command: bool,
    device_sections: Vec<DeviceSection>,
    description: Vec<u8>,
    /// A page that the stream did not carry byte by byte.
    filled: Box<[u8; STREAM_PAGE]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is read.
    Header,
    BetweenSections,
    /// In a section of memory of this kind.
    Records(u8),
    /// All that is left is the device part.
    Devices,
    Finished,
    GivenUp,
}

/// An item without what it borrows.
enum Event {
    Configuration(Configuration),
    Blocks,
    Page { block: usize, offset: u64, bytes: Range<usize> },
    Filled { block: usize, offset: u64 },
    Zero { block: usize, offset: u64 },
    PassEnd,
    RamEnd,
    Devices(DeviceState),
}

impl<R: Read> StreamReader<R> {
    /// A reader of a stream from its first byte.
    pub fn new(source: R, limits: ReaderLimits) -> Self {
        Self {
            source: Source::new(source, limits.read_buffer.max(MIN_READ_BUFFER)),
            limits,
            state: State::Header,
            ram: None,
            addresses: false,
            had_command: false,
            device_sections: Vec::new(),
            description: Vec::new(),
            filled: Box::new([0; STREAM_PAGE]),
        }
    }

    /// The next item; `None` after [`Item::Devices`], which comes when the source has ended. After
    /// an error only [`StreamReadError::GivenUp`] comes.
    ///
    /// # Errors
    /// When the stream ends early, is damaged, or has something that no supported QEMU writes.
    #[allow(clippy::should_implement_trait, reason = "an item borrows from the reader")]
    pub fn next(&mut self) -> Result<Option<Item<'_>>, StreamReadError> {
        if self.state == State::Finished {
            return Ok(None);
        }
        let event = self.event().inspect_err(|_| self.state = State::GivenUp)?;
        Ok(Some(self.item(event)))
    }

    /// Bytes of the stream taken so far.
    pub fn position(&self) -> u64 {
        self.source.at()
    }

    /// The sections of [`Item::Devices`], in order; none before it.
    pub fn device_sections(&self) -> &[DeviceSection] {
        &self.device_sections
    }

    /// The JSON that QEMU put behind [`Item::Devices`], see [`crate::device_sections::Layout`]; empty before
    /// it.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    fn item(&self, event: Event) -> Item<'_> {
        match event {
            Event::Configuration(Configuration { machine_type, capabilities }) => {
                Item::Configuration { machine_type, capabilities }
            }
            Event::Blocks => Item::Blocks(self.ram.as_ref().map(Ram::blocks).unwrap_or_default()),
            Event::Page { block, offset, bytes } => {
                Item::Page { block, offset, bytes: self.source.view(bytes) }
            }
            Event::Filled { block, offset } => {
                Item::Page { block, offset, bytes: &self.filled[..] }
            }
            Event::Zero { block, offset } => Item::Zero { block, offset },
            Event::PassEnd => Item::PassEnd,
            Event::RamEnd => Item::RamEnd,
            Event::Devices(state) => Item::Devices(state),
        }
    }

    fn event(&mut self) -> Result<Event, StreamReadError> {
        loop {
            let event = match self.state {
                State::Records(kind) => self.record(kind)?,
                State::BetweenSections => self.section()?,
                State::Header => Some(self.configuration()?),
                State::Devices => Some(self.devices()?),
                State::Finished | State::GivenUp => return Err(StreamReadError::GivenUp),
            };
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }

    fn configuration(&mut self) -> Result<Event, StreamReadError> {
        let configuration = Configuration::read(&mut self.source)?;
        self.addresses = configuration.ignores_shared();
        self.between_sections();
        Ok(Event::Configuration(configuration))
    }

    fn between_sections(&mut self) {
        self.state = State::BetweenSections;
        self.source.enter("the memory part, between two sections");
    }

    /// Reads the beginning of a section, or a command.
    fn section(&mut self) -> Result<Option<Event>, StreamReadError> {
        let at = self.source.at();
        let kind = self.source.peek()?;
        match (kind, &self.ram) {
            (mark::SECTION_FULL, Some(ram)) if ram.had_pass => {
                self.state = State::Devices;
                return Ok(Some(Event::RamEnd));
            }
            (mark::SECTION_FULL, _) => return Err(self.early_device(at)),
            _ => self.source.u8()?,
        };
        match (kind, &mut self.ram) {
            (mark::SECTION_START, None) => self.start(at)?,
            (mark::SECTION_START, Some(_)) => {
                Head::read(&mut self.source)?.must_be_ram(at)?;
                let second = "a second START section of memory";
                return Err(StreamReadError::malformed(at, second, "one"));
            }
            (mark::SECTION_PART | mark::SECTION_END, Some(ram)) if ram.is_listed() => {
                let section = self.source.u32()?;
                if section != ram.section {
                    let expected = format!("section {}, which is memory", ram.section);
                    return Err(StreamReadError::malformed(
                        at,
                        format!("section {section}"),
                        expected,
                    ));
                }
                ram.had_pass = true;
                self.records(kind);
            }
            (mark::COMMAND, Some(_)) if !self.had_command => {
                section::command(&mut self.source, at)?;
                self.had_command = true;
            }
            (mark::COMMAND, None) => {
                section::command(&mut self.source, at)?;
                return Err(section::misplaced(at, kind, "the START section of memory"));
            }
            (_, None) => return Err(section::misplaced(at, kind, "the START section of memory")),
            (_, Some(ram)) if !ram.is_listed() => {
                return Err(section::misplaced(
                    at,
                    kind,
                    "a list of RAM blocks in the section before",
                ));
            }
            _ => {
                return Err(section::misplaced(
                    at,
                    kind,
                    "a section of memory or the first device section",
                ));
            }
        }
        Ok(None)
    }

    fn start(&mut self, at: u64) -> Result<(), StreamReadError> {
        let head = Head::read(&mut self.source)?;
        head.must_be_ram(at)?;
        self.ram = Some(Ram::new(head.id, self.addresses, self.limits.blocks));
        self.records(mark::SECTION_START);
        Ok(())
    }

    fn records(&mut self, kind: u8) {
        self.state = State::Records(kind);
        self.source.enter("a section of memory");
    }

    fn early_device(&mut self, at: u64) -> StreamReadError {
        let head = self.source.u8().and_then(|_| Head::read(&mut self.source));
        let advice = "it has no length, so the memory behind it cannot be found; remove the device";
        match head {
            Ok(head) => {
                let what =
                    format!("the device section `{}` before memory", head.name.escape_debug());
                StreamReadError::unsupported(at, what, advice)
            }
            Err(error) => error,
        }
    }

    fn record(&mut self, kind: u8) -> Result<Option<Event>, StreamReadError> {
        let ram = self.ram.as_mut().expect("a section of memory is open");
        let at = self.source.at();
        let event = match ram.record(&mut self.source)? {
            Record::Page { .. } | Record::Filled { .. } if kind == mark::SECTION_START => {
                return Err(StreamReadError::malformed(
                    at,
                    "a page in the START section of memory",
                    "no page before a PART section",
                ));
            }
            Record::Page { block, offset, bytes } => Event::Page { block, offset, bytes },
            Record::Filled { block, offset, byte: 0 } => Event::Zero { block, offset },
            Record::Filled { block, offset, byte } => {
                self.filled.fill(byte);
                Event::Filled { block, offset }
            }
            Record::Blocks => Event::Blocks,
            Record::End => {
                section::footer(&mut self.source, ram.section)?;
                return Ok(self.section_end(kind));
            }
        };
        Ok(Some(event))
    }

    fn section_end(&mut self, kind: u8) -> Option<Event> {
        self.between_sections();
        match kind {
            mark::SECTION_START => None,
            mark::SECTION_PART => Some(Event::PassEnd),
            _ => {
                self.state = State::Devices;
                Some(Event::RamEnd)
            }
        }
    }

    fn devices(&mut self) -> Result<Event, StreamReadError> {
        self.source.enter("the device part");
        let at = self.source.at();
        match self.source.peek()? {
            mark::SECTION_FULL => {}
            kind => return Err(section::misplaced(at, kind, "the first device section")),
        }
        let limits = (self.limits.devices, self.limits.description);
        let most = limits.0.saturating_add(limits.1).saturating_add(DESCRIPTION_HEAD as u64);
        let mut bytes = STREAM_HEADER.to_vec();
        self.source.rest(&mut bytes, "the device part", most)?;
        let Cut { state, sections, description } = DevicePart::new(bytes, at).cut(limits)?;
        self.device_sections = sections;
        self.description = description;
        self.state = State::Finished;
        Ok(Event::Devices(state))
    }
}

#[cfg(test)]
mod test;
