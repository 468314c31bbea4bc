//! The marks of QEMU's migration stream, for the writer ([`crate::stream`]) and the reader
//! ([`crate::stream_reader`]). All numbers of a stream are big-endian. The marks are the same from
//! QEMU 7.2 to 10.0.

/// Bytes of a page record on x86.
pub const STREAM_PAGE: usize = 4096;
/// `QEVM`, then the stream version.
pub(crate) const STREAM_HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";

/// The bytes that begin the parts of a stream.
pub(crate) mod mark {
    /// Last byte of a stream, but for the description.
    pub(crate) const END_OF_STREAM: u8 = 0;
    /// First section of something that comes in passes: its name and what there is of it.
    pub(crate) const SECTION_START: u8 = 1;
    /// One pass.
    pub(crate) const SECTION_PART: u8 = 2;
    /// The last pass.
    pub(crate) const SECTION_END: u8 = 3;
    /// A section with everything in it: the state of a device.
    pub(crate) const SECTION_FULL: u8 = 4;
    /// A named addition to what stands before it.
    pub(crate) const SUBSECTION: u8 = 5;
    /// What the device sections before it are made of, as JSON.
    pub(crate) const DESCRIPTION: u8 = 6;
    pub(crate) const CONFIGURATION: u8 = 7;
    pub(crate) const COMMAND: u8 = 8;
    /// Ends every section, followed by its number.
    pub(crate) const SECTION_FOOTER: u8 = 0x7e;
}

/// Subsections of the configuration.
pub(crate) mod configuration {
    pub(crate) const CAPABILITIES: &str = "configuration/capabilities";
    pub(crate) const PAGE_BITS: &str = "configuration/target-page-bits";
    pub(crate) const UUID: &str = "configuration/uuid";
    pub(crate) const VERSION: u32 = 1;
    /// The only capability that changes the stream and is supported here.
    pub(crate) const IGNORE_SHARED: &str = "x-ignore-shared";
}

/// The section of memory.
pub(crate) mod ram {
    pub(crate) const NAME: &str = "ram";
    pub(crate) const INSTANCE: u32 = 0;
    pub(crate) const VERSION: u32 = 4;

    /// A record is an offset within a block, with flags in the bits below a page.
    pub(crate) const FLAGS: u64 = 0xfff;
    pub(crate) const ZERO: u64 = 0x02;
    pub(crate) const MEM_SIZE: u64 = 0x04;
    pub(crate) const PAGE: u64 = 0x08;
    pub(crate) const END: u64 = 0x10;
    /// The block of the record before, so no name follows.
    pub(crate) const CONTINUE: u64 = 0x20;
}
