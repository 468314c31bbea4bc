//! Overlays in a backing chain that hold nothing of their own: what they show is what is below
//! them.
//!
//! A restore puts such overlays between layers where a chain is too long for one image's header,
//! and above a read-only image that has a chain. They are not stored, or chains would grow with
//! each restore.

use super::open_files::OpenFiles;
use qmp_bridge::disks::{BackingImage, ImageFormat};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Of version 3, as far as it is looked at.
const HEADER_BYTES: usize = 80;
/// The table of an image of 8 TiB in clusters of 64 KiB.
const MAX_TABLE: usize = 128 << 10;

/// The images without overlays that hold nothing.
pub(super) fn without(images: Vec<BackingImage>, open: &OpenFiles) -> Vec<BackingImage> {
    let sizes: Vec<u64> = images.iter().map(|image| image.virtual_size).collect();
    let is_needed = |number: usize, image: &BackingImage| {
        // Of another size, an overlay cuts off or adds zeros.
        let below = sizes.get(number + 1).is_some_and(|below| *below == image.virtual_size);
        !(below
            && image.format == ImageFormat::Qcow2
            && open.readable(&image.file).is_ok_and(|path| holds_nothing(&path)))
    };
    images
        .into_iter()
        .enumerate()
        .filter(|(number, image)| is_needed(*number, image))
        .map(|(_, image)| image)
        .collect()
}

fn holds_nothing(path: &Path) -> bool {
    read(path).unwrap_or(false)
}

fn read(path: &Path) -> std::io::Result<bool> {
    let file = File::open(path)?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap_or_default());
    let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    let (version, encryption, snapshots) = (word(4), word(32), word(60));
    let features = if version == 2 { 0 } else { long(72) };
    let is_plain = header.starts_with(MAGIC)
        && matches!(version, 2 | 3)
        && encryption == 0
        && snapshots == 0
        && features == 0;
    let table_bytes = word(36) as usize * 8;
    if !is_plain || table_bytes > MAX_TABLE {
        return Ok(false);
    }
    let mut table = vec![0; table_bytes];
    file.read_exact_at(&mut table, long(40))?;
    Ok(table.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod test {
    use super::*;

    fn image(folder: &Path, name: &str, features: u64, table: &[u8]) -> std::path::PathBuf {
        let mut bytes = vec![0; 4096 + table.len()];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[36..40].copy_from_slice(&(table.len() as u32 / 8).to_be_bytes());
        bytes[40..48].copy_from_slice(&4096_u64.to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes[4096..].copy_from_slice(table);
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn only_an_overlay_without_clusters_of_its_own_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let cases = [
            ("empty", 0, [0; 64], true),
            ("full", 0, std::array::from_fn(|at| (at % 2) as u8), false),
            ("data-file", 4, [0; 64], false),
        ];
        for (name, features, table, left_out) in cases {
            let path = image(&folder, name, features, &table);
            let _open = File::open(&path).unwrap();
            let open = OpenFiles::of(std::process::id()).unwrap();
            let layer = |virtual_size, format| BackingImage {
                file: path.clone(),
                format,
                node: name.into(),
                virtual_size,
                is_device: false,
            };
            let kept = |top: u64, format| {
                without(vec![layer(top, format), layer(8, ImageFormat::Raw)], &open).len()
            };
            assert_eq!(kept(8, ImageFormat::Qcow2), if left_out { 1 } else { 2 }, "{name}");
            assert_eq!((kept(16, ImageFormat::Qcow2), kept(8, ImageFormat::Raw)), (2, 2), "{name}");
            assert_eq!(
                without(vec![layer(8, ImageFormat::Qcow2)], &open).len(),
                1,
                "with nothing below, it shows zeros"
            );
        }
        assert!(!holds_nothing(&folder.join("missing")));
    }
}
