//! A qcow2 file that holds nothing but an internal snapshot with a VM state.
//!
//! QEMU loads a VM state in place only from such a snapshot (`snapshot-load`), and makes one only
//! of the state that the VM has. So the file is written here:
//!
//! ```text
//! header | refcount table | refcount block | L1 table | L1 table of the snapshot | snapshot table
//!        | L2 tables of the VM state | VM state
//! ```
//! The disk of the image is one cluster that was never written. QEMU keeps a VM state behind the
//! disk, from the end of the part that the disk's L2 tables map; the disk has one, so the state
//! begins at the second. The layout is that of QEMU's `docs/interop/qcow2.txt`, version 3.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The snapshot's name.
pub(super) const SNAPSHOT: &str = "state";
/// The longest VM state that one refcount block counts, with room for the tables: 2 GiB of clusters
/// less 32 MiB.
pub(super) const MAX_STATE: u64 = (2 << 30) - (32 << 20);

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Clusters that one L2 table maps.
const L2_ENTRIES: u64 = CLUSTER / 8;
const HEADER_LENGTH: u32 = 104;
/// 16 bits for each cluster.
const REFCOUNT_ORDER: u32 = 4;
/// The entry's cluster has a refcount of exactly one.
const COPIED: u64 = 1 << 63;

const REFCOUNT_TABLE: u64 = 1;
const REFCOUNT_BLOCK: u64 = 2;
const L1: u64 = 3;
const SNAPSHOT_L1: u64 = 4;
const SNAPSHOT_TABLE: u64 = 5;
const FIRST_L2: u64 = 6;

/// Writes the file, which is empty, around `state`.
pub(super) fn write(file: &File, state: &[u8]) -> io::Result<()> {
    let length = state.len() as u64;
    if length > MAX_STATE {
        return Err(io::Error::other(format!("a VM state of {length} bytes; at most {MAX_STATE}")));
    }
    let clusters = length.div_ceil(CLUSTER);
    let tables = clusters.div_ceil(L2_ENTRIES);
    let data = FIRST_L2 + tables;
    let end = data + clusters;
    let at = |cluster: u64, bytes: &[u8]| file.write_all_at(bytes, cluster * CLUSTER);
    let entries = |first: u64, count: u64| -> Vec<u8> {
        (first..first + count)
            .flat_map(|cluster| (COPIED | (cluster * CLUSTER)).to_be_bytes())
            .collect()
    };
    file.set_len(end * CLUSTER)?;
    at(0, &header())?;
    at(REFCOUNT_TABLE, &(REFCOUNT_BLOCK * CLUSTER).to_be_bytes())?;
    at(REFCOUNT_BLOCK, &(0..end).flat_map(|_| 1u16.to_be_bytes()).collect::<Vec<u8>>())?;
    // The disk's own entry stays empty.
    at(SNAPSHOT_L1, &[vec![0; 8], entries(FIRST_L2, tables)].concat())?;
    at(SNAPSHOT_TABLE, &snapshot(1 + tables, length))?;
    at(FIRST_L2, &entries(data, clusters))?;
    at(data, state)
}

fn header() -> Vec<u8> {
    let mut header = b"QFI\xfb".to_vec();
    header.extend(3u32.to_be_bytes());
    // No backing file.
    header.extend([0; 8 + 4]);
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(CLUSTER.to_be_bytes());
    // Not encrypted.
    header.extend([0; 4]);
    header.extend(1u32.to_be_bytes());
    header.extend((L1 * CLUSTER).to_be_bytes());
    header.extend((REFCOUNT_TABLE * CLUSTER).to_be_bytes());
    header.extend(1u32.to_be_bytes());
    header.extend(1u32.to_be_bytes());
    header.extend((SNAPSHOT_TABLE * CLUSTER).to_be_bytes());
    // No features.
    header.extend([0; 3 * 8]);
    header.extend(REFCOUNT_ORDER.to_be_bytes());
    header.extend(HEADER_LENGTH.to_be_bytes());
    header
}

/// Entry of the snapshot table; it has no date.
fn snapshot(l1_entries: u64, state_bytes: u64) -> Vec<u8> {
    const ID: &str = "1";
    let extra = [state_bytes.to_be_bytes(), CLUSTER.to_be_bytes()].concat();
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let short = |text: &str| u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut entry = (SNAPSHOT_L1 * CLUSTER).to_be_bytes().to_vec();
    entry.extend(u32::try_from(l1_entries).unwrap_or(u32::MAX).to_be_bytes());
    entry.extend([short(ID), short(SNAPSHOT)].concat());
    entry.extend([0; 4 + 4 + 8]);
    entry.extend(u32::try_from(state_bytes).unwrap_or(u32::MAX).to_be_bytes());
    entry.extend(length(extra.len()).to_be_bytes());
    entry.extend(extra);
    entry.extend([ID, SNAPSHOT].concat().as_bytes());
    entry
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn state_image_has_its_parts_where_its_tables_say() {
        let file = tempfile::tempfile().unwrap();
        let state: Vec<u8> = (0..CLUSTER as usize * 2 + 5).map(|at| (at / 7) as u8).collect();
        write(&file, &state).unwrap();
        let long = |offset: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, offset).unwrap();
            u64::from_be_bytes(bytes)
        };
        let entry = long(64);
        let table = long(long(entry) + 8) & !COPIED;
        let mut found = vec![0; state.len()];
        for (number, piece) in found.chunks_mut(CLUSTER as usize).enumerate() {
            file.read_exact_at(piece, long(table + 8 * number as u64) & !COPIED).unwrap();
        }
        assert!(found == state);
        // After the entry's fixed part: the state's length.
        assert_eq!(long(entry + 40), state.len() as u64);
    }
}
