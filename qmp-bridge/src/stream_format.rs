//! The marks of QEMU's migration stream, for the writer ([`crate::stream`]) and the reader
//! ([`crate::stream_reader`]). All numbers of a stream are big-endian. The marks are the same from
//! QEMU 7.2 to 10.0.

/// Bytes of a page record on x86.
pub const STREAM_PAGE: usize = 4096;
/// `QEVM`, then the stream version.
pub(crate) const STREAM_HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";

/// What the next byte of a stream says.
pub(crate) mod mark {
    /// Last byte of a stream, but for the description.
    pub const END_OF_STREAM: u8 = 0;
    /// First section of something that comes in passes: its name and what there is of it.
    pub const SECTION_START: u8 = 1;
    /// One round.
    pub const SECTION_PART: u8 = 2;
    /// The last pass.
    pub const SECTION_END: u8 = 3;
    /// A section with everything in it: the state of a device.
    pub const SECTION_FULL: u8 = 4;
    /// A named addition to what stands before it.
    pub const SUBSECTION: u8 = 5;
    /// What the device sections before it are made of, as JSON.
    pub const DESCRIPTION: u8 = 6;
    pub const CONFIGURATION: u8 = 7;
    pub const COMMAND: u8 = 8;
    /// Ends every section, followed by its number.
    pub const SECTION_FOOTER: u8 = 0x7e;
}

/// Subsections of the configuration.
pub(crate) mod configuration {
    pub const CAPABILITIES: &str = "configuration/capabilities";
    pub const PAGE_BITS: &str = "configuration/target-page-bits";
    pub const UUID: &str = "configuration/uuid";
    pub const VERSION: u32 = 1;
    /// The only capability that changes the stream and is understood here.
    pub const IGNORE_SHARED: &str = "x-ignore-shared";
}

/// The section of memory.
pub(crate) mod ram {
    pub const NAME: &str = "ram";
    pub const INSTANCE: u32 = 0;
    pub const VERSION: u32 = 4;

    /// A record is an offset within a block, with flags in the bits below a page.
    pub const FLAGS: u64 = 0xfff;
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const END: u64 = 0x10;
    /// The block of the record before, so no name follows.
    pub const CONTINUE: u64 = 0x20;
}
