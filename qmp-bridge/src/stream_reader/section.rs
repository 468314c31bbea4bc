//! Heads and footers of sections, and the commands between them: what a plain migration sends, and
//! no more.

use std::io::Read;

use super::error::StreamReadError;
use super::source::Source;
use crate::stream_format::{mark, ram};

/// Tells the receiver that the source has stopped its guest; carries nothing. QEMU sends it since
/// 10.0.
const SWITCHOVER_START: u16 = 11;

/// QEMU's numbers of commands that a plain migration does not send, and the capabilities that make
/// it send them.
const REFUSED_COMMANDS: [(u16, &str, &str); 10] = [
    (1, "OPEN_RETURN_PATH", "`return-path` and `postcopy-ram`"),
    (2, "PING", "`return-path` and `postcopy-ram`"),
    (3, "POSTCOPY_ADVISE", "`postcopy-ram` and `dirty-bitmaps`"),
    (4, "POSTCOPY_LISTEN", "`postcopy-ram`"),
    (5, "POSTCOPY_RUN", "`postcopy-ram`"),
    (6, "POSTCOPY_RAM_DISCARD", "`postcopy-ram`"),
    (7, "PACKAGED", "`postcopy-ram`"),
    (8, "ENABLE_COLO", "`x-colo`"),
    (9, "POSTCOPY_RESUME", "`postcopy-ram`"),
    (10, "RECV_BITMAP", "`postcopy-ram`"),
];

/// Sections in passes that are not memory, and what makes QEMU send them.
const REFUSED_SECTIONS: [(&str, &str); 3] = [
    ("block", "turn off the migration capability `block` (`migrate -b`)"),
    ("dirty-bitmap", "turn off the migration capability `dirty-bitmaps`"),
    ("cpr", "turn off the migration mode `cpr`"),
];

/// What stands after the mark of a section that begins something.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) version: u32,
}

impl Head {
    pub(super) fn read<R: Read>(source: &mut Source<R>) -> Result<Self, StreamReadError> {
        let id = source.u32()?;
        let name = source.name()?;
        Ok(Self { id, name, instance: source.u32()?, version: source.u32()? })
    }

    /// `at` is where the section began.
    pub(super) fn must_be_ram(&self, at: u64) -> Result<(), StreamReadError> {
        if self.name != ram::NAME {
            let known = REFUSED_SECTIONS.iter().find(|(name, _)| self.name == *name);
            let advice = known.map_or("remove the device that sends it", |(_, advice)| advice);
            return Err(StreamReadError::unsupported(
                at,
                format!("passes of `{}`", self.name.escape_debug()),
                advice,
            ));
        }
        if (self.instance, self.version) != (ram::INSTANCE, ram::VERSION) {
            let found =
                format!("memory of instance {} and version {}", self.instance, self.version);
            return Err(StreamReadError::malformed(
                at,
                found,
                format!("{} and {}", ram::INSTANCE, ram::VERSION),
            ));
        }
        Ok(())
    }
}

/// Reads the end of section `id`.
pub(super) fn footer<R: Read>(source: &mut Source<R>, id: u32) -> Result<(), StreamReadError> {
    let at = source.at();
    let found = (source.u8()?, source.u32()?);
    if found == (mark::SECTION_FOOTER, id) {
        return Ok(());
    }
    let found = format!("{:#04x} and {}", found.0, found.1);
    let expected = format!(
        "the footer {:#04x} of section {id} (machine types before 2.4 write none)",
        mark::SECTION_FOOTER
    );
    Err(StreamReadError::malformed(at, found, expected))
}

/// Reads a command after its mark, which was at `at`.
pub(super) fn command<R: Read>(source: &mut Source<R>, at: u64) -> Result<(), StreamReadError> {
    let (command, length) = (source.u16()?, source.u16()?);
    match (command, length) {
        (SWITCHOVER_START, 0) => Ok(()),
        (SWITCHOVER_START, _) => Err(StreamReadError::malformed(
            at,
            format!("SWITCHOVER_START with {length} bytes"),
            "one without any",
        )),
        _ => {
            let known = REFUSED_COMMANDS.iter().find(|(number, _, _)| *number == command);
            let (what, advice) = known.map_or_else(
                || {
                    (
                        format!("the command {command}"),
                        "it is of a newer QEMU, or of a capability to turn off".into(),
                    )
                },
                |(_, name, capability)| {
                    (
                        format!("the command {name}"),
                        format!("turn off the migration capability {capability}"),
                    )
                },
            );
            Err(StreamReadError::unsupported(at, what, advice))
        }
    }
}

/// The error for a mark that cannot stand where it does.
pub(super) fn misplaced(at: u64, kind: u8, expected: &str) -> StreamReadError {
    let name = match kind {
        mark::END_OF_STREAM => "the end mark",
        mark::SECTION_START => "a START section",
        mark::SECTION_PART => "a PART section",
        mark::SECTION_END => "an END section",
        mark::SECTION_FULL => "a FULL section",
        mark::SUBSECTION => "a subsection",
        mark::DESCRIPTION => "the description",
        mark::CONFIGURATION => "a configuration section",
        mark::COMMAND => "a command",
        _ => return StreamReadError::malformed(at, format!("the mark {kind:#04x}"), expected),
    };
    StreamReadError::malformed(at, name, expected)
}
