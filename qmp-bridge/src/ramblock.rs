//! QEMU's RAM blocks as its monitor lists them.
//!
//! `info ramblock` exists only as text. QEMU 7.2 prints name, page size, offset, used and total;
//! from 8.x on also the host address and `ro`/`rw`. On the older form [`crate::host_finder`] finds
//! the addresses.

use thiserror::Error;

use crate::qmp::{Qmp, QmpError};

/// Most RAM blocks accepted; a VM with hundreds of devices has a few hundred.
pub const MAX_RAM_BLOCKS: usize = 4096;
/// QEMU keeps names in `char idstr[256]`.
const MAX_NAME: usize = 255;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum RamBlockError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("`info ramblock` has a line of unknown form: `{line}`; this QEMU is not supported")]
    Line { line: String },
    #[error("`info ramblock` lists more than {MAX_RAM_BLOCKS} blocks")]
    TooMany,
    #[error(
        "the VM has no memory (`info ramblock` lists no block), so there is no guest to checkpoint; \
         is it of machine type none?"
    )]
    Empty,
}

/// One block. Blocks that QEMU does not migrate have no name there and are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name in a migration stream, e.g. `pc.ram` or `0000:00:02.0/vga.vram`.
    pub name: String,
    /// Bytes per host page behind it.
    pub page_size: u64,
    /// Start in QEMU's own RAM address space (not a guest address).
    pub offset: u64,
    /// Bytes in use now: what the guest and a stream see.
    pub used: u64,
    /// Bytes reserved.
    pub total: u64,
    /// Where it begins in QEMU's address space, if known.
    pub host: Option<u64>,
    /// Whether the guest cannot write it, if known.
    pub read_only: Option<bool>,
}

/// Lists the blocks in the order in which a migration stream lists them.
///
/// # Errors
/// When QEMU does not answer, or as for [`parse`].
pub async fn ram_blocks(qmp: &Qmp) -> Result<Vec<RamBlock>, RamBlockError> {
    parse(&qmp.hmp("info ramblock").await?)
}

/// Parses the text of `info ramblock`.
///
/// # Errors
/// When a line is not of the form that QEMU prints, or there are too many.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, RamBlockError> {
    let rows = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
    let mut blocks = Vec::new();
    for line in rows.filter(|line| !line.trim_start().starts_with("Block Name")) {
        if blocks.len() == MAX_RAM_BLOCKS {
            return Err(RamBlockError::TooMany);
        }
        let block = parse_line(line).ok_or_else(|| RamBlockError::Line { line: line.into() })?;
        blocks.push(block);
    }
    blocks.retain(|block| !block.name.is_empty());
    if blocks.is_empty() { Err(RamBlockError::Empty) } else { Ok(blocks) }
}

/// Names may hold spaces, so the row is read from where the size, its unit and a hexadecimal number
/// stand.
fn parse_line(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = (0..words.len().checked_sub(4)?).find(|&i| {
        words[i].parse::<u64>().is_ok()
            && unit(words[i + 1]).is_some()
            && hex(words[i + 2]).is_some()
    })?;
    let name = words[..at].join(" ");
    let columns = &words[at + 2..];
    let block = RamBlock {
        name,
        page_size: words[at].parse::<u64>().ok()?.checked_mul(unit(words[at + 1])?)?,
        offset: hex(columns[0])?,
        used: hex(columns.get(1)?)?,
        total: hex(columns.get(2)?)?,
        host: columns.get(3).map(|word| hex(word)).map_or(Some(None), |host| host.map(Some))?,
        read_only: match columns.get(4) {
            None => None,
            Some(&"ro") => Some(true),
            Some(&"rw") => Some(false),
            Some(_) => return None,
        },
    };
    let sound = block.name.len() <= MAX_NAME && block.page_size > 0 && block.used <= block.total;
    (sound && columns.len() <= 5).then_some(block)
}

fn unit(word: &str) -> Option<u64> {
    match word {
        "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    }
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod test {
    use super::*;

    /// As QEMU 7.2.22 printed it.
    const OLD: &str = include_str!("../tests/fixtures/ramblock-7.2.txt");
    /// As QEMU 10.0.2 printed it for the same command line.
    const NEW: &str = include_str!("../tests/fixtures/ramblock-10.0.txt");

    #[test]
    fn both_forms_give_the_same_blocks() {
        let old = parse(OLD).expect("7.2");
        let new = parse(NEW).expect("10.0");
        assert_eq!(old.len(), 9);
        let bare = |block: &RamBlock| RamBlock { host: None, read_only: None, ..block.clone() };
        assert_eq!(old, new.iter().map(bare).collect::<Vec<_>>());
        assert_eq!(new[2].name, "/rom@etc/acpi/tables");
        assert_eq!((new[2].page_size, new[2].used, new[2].total), (4096, 0x20000, 0x20_0000));
        assert_eq!((new[2].host, new[2].read_only), (Some(0x7f69_bd20_0000), Some(true)));
        assert_eq!(new[0].read_only, Some(false));
    }

    #[test]
    fn names_with_spaces_and_nameless_blocks() {
        let row = "  2 MiB  0x0 0x200000 0x200000";
        let text = format!("my ram 4 KiB name{row}\n{row}\n");
        let blocks = parse(&text).expect("parse");
        assert_eq!(blocks.len(), 1);
        assert_eq!((blocks[0].name.as_str(), blocks[0].page_size), ("my ram 4 KiB name", 2 << 20));
    }

    #[test]
    fn damaged_lines_are_errors() {
        for line in [
            "pc.ram",
            "pc.ram 4 KiB",
            "pc.ram 4 KiB 0x0 0x10",
            "pc.ram 4 KiB 0x0 0x20 0x10",
            "a 4 KiB 0x0 0x1 0x1 0x1 xx",
            "a 4 XiB 0x0 0x1 0x1",
            "a 99999999999999999 GiB 0x0 0x1 0x1",
        ] {
            assert!(matches!(parse(line), Err(RamBlockError::Line { .. })), "{line}");
        }
        assert!(matches!(parse(""), Err(RamBlockError::Empty)));
    }
}
