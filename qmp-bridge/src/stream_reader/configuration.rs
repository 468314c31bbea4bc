//! The configuration section: the machine type, and the capabilities that change the form of the
//! stream.

use std::io::Read;

use super::error::StreamReadError;
use super::source::Source;
use crate::stream_format::{STREAM_HEADER, STREAM_PAGE, configuration, mark};

/// Longest machine type; the longest real ones have some 25 bytes.
pub const MAX_MACHINE_TYPE: u32 = 255;
/// Most capabilities listed; QEMU 10.0 has 23 in all and lists two of them.
pub const MAX_CAPABILITIES: u32 = 64;

pub(super) struct Configuration {
    pub(super) machine_type: String,
    pub(super) capabilities: Vec<String>,
}

impl Configuration {
    /// Reads the header of the stream and its configuration.
    pub(super) fn read<R: Read>(source: &mut Source<R>) -> Result<Self, StreamReadError> {
        let header: [u8; STREAM_HEADER.len()] = source.array()?;
        if header != STREAM_HEADER {
            return Err(StreamReadError::NotUnderstood {
                found: format!("`{}`", header.escape_ascii()),
                expected: "`QEVM` and version 3",
                advice: "only QEMU's uncompressed, unencrypted main channel can be read",
            });
        }
        source.enter("the configuration");
        let kind = source.u8()?;
        if kind != mark::CONFIGURATION {
            return Err(StreamReadError::NotUnderstood {
                found: format!("the mark {kind:#04x} after its header"),
                expected: "a configuration section",
                advice: "machine types before 2.4 write none; choose a newer one",
            });
        }
        let machine_type = machine_type(source)?;
        let capabilities = subsections(source)?;
        Ok(Self { machine_type, capabilities })
    }

    pub(super) fn ignores_shared(&self) -> bool {
        self.capabilities.iter().any(|name| name == configuration::IGNORE_SHARED)
    }
}

fn machine_type<R: Read>(source: &mut Source<R>) -> Result<String, StreamReadError> {
    let at = source.at();
    let length = source.u32()?;
    if length > MAX_MACHINE_TYPE {
        let (found, limit) = (length.into(), MAX_MACHINE_TYPE.into());
        return Err(StreamReadError::TooLarge { at, what: "the machine type", found, limit });
    }
    source.text(at, length as usize)
}

/// Reads what follows the machine type and gives the capabilities in it.
fn subsections<R: Read>(source: &mut Source<R>) -> Result<Vec<String>, StreamReadError> {
    let mut seen: Vec<String> = Vec::new();
    let mut listed = Vec::new();
    while source.peek()? == mark::SUBSECTION {
        let at = source.at();
        source.u8()?;
        let name = source.name()?;
        if seen.contains(&name) {
            return Err(StreamReadError::malformed(at, format!("a second `{name}`"), "one"));
        }
        let version = source.u32()?;
        if version != configuration::VERSION {
            let found = format!("`{name}` in version {version}");
            return Err(StreamReadError::malformed(
                at,
                found,
                format!("version {}", configuration::VERSION),
            ));
        }
        match name.as_str() {
            configuration::CAPABILITIES => listed = capabilities(source)?,
            configuration::PAGE_BITS => page_bits(source)?,
            configuration::UUID => drop(source.array::<16>()?),
            _ => {
                let advice = "it is of a newer QEMU, or of a capability to turn off";
                return Err(StreamReadError::unsupported(
                    at,
                    format!("the configuration `{}`", name.escape_debug()),
                    advice,
                ));
            }
        }
        seen.push(name);
    }
    Ok(listed)
}

fn capabilities<R: Read>(source: &mut Source<R>) -> Result<Vec<String>, StreamReadError> {
    let at = source.at();
    let count = source.u32()?;
    if count > MAX_CAPABILITIES {
        let (found, limit) = (count.into(), MAX_CAPABILITIES.into());
        return Err(StreamReadError::TooLarge {
            at,
            what: "the list of capabilities",
            found,
            limit,
        });
    }
    let mut names = Vec::new();
    for _ in 0..count {
        let at = source.at();
        let name = source.name()?;
        if name != configuration::IGNORE_SHARED {
            let what = format!("the migration capability `{}`", name.escape_debug());
            return Err(StreamReadError::unsupported(
                at,
                what,
                "turn it off with `migrate-set-capabilities`",
            ));
        }
        if names.contains(&name) {
            return Err(StreamReadError::malformed(at, format!("a second `{name}`"), "one"));
        }
        names.push(name);
    }
    Ok(names)
}

fn page_bits<R: Read>(source: &mut Source<R>) -> Result<(), StreamReadError> {
    let at = source.at();
    let bits = source.u32()?;
    if bits == STREAM_PAGE.trailing_zeros() {
        return Ok(());
    }
    Err(StreamReadError::unsupported(
        at,
        format!("a page size of 2^{bits} bytes"),
        format!("only {STREAM_PAGE} is"),
    ))
}
