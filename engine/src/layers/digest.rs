//! The digest of a read-only file, found once: a base image has gigabytes, and every VM on it asks.

use super::image::{self, Blocks, DataExtents};
use anyhow::{Context, Result, bail};
use checkpoint_format::{
    BLOCK_SIZE, BlocksHasher, ByteLen, ContentDigest, ContentHasher, DigestForm, MAX_LAYER_BLOCKS,
    MAX_STORED_BLOCKS, is_zero,
};
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};
use vm::cache;
use vm::error::{EngineError, InPhase, Phase, refused};

/// A file that changed so lately may change again within the same tick of its time stamp.
const READY_AGE: Duration = Duration::from_secs(2);
/// With so many blocks of zeros (1 GiB) a file has the digest of its blocks. Digesting fewer zeros
/// takes a second at most.
const MANY_ZERO_BLOCKS: u64 = (1 << 30) / BLOCK_SIZE as u64;

/// What a file contains, as the name of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Of its bytes, or of its blocks.
    pub digest: ContentDigest,
    /// Its length, holes included.
    pub len: ByteLen,
    /// Which of the two the digest is.
    #[serde(default)]
    pub form: DigestForm,
}

/// What a file's content is known by: device, inode, size, modification and change times.
pub(crate) fn identity(facts: &Metadata) -> String {
    let times = [facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec()];
    format!("{:?} {times:?}", [facts.dev(), facts.ino(), facts.size()])
}

/// The digest of a read-only file, in the form that its content gives it: of its blocks where it
/// has many blocks of zeros, else of its bytes. From the cache when the file is the same as when it
/// was read last; else reads it all.
///
/// # Errors
/// When the file cannot be read or changes meanwhile; refused when it is larger than a layer can
/// be.
pub fn of_file(path: &Path) -> Result<FileDigest, EngineError> {
    known_or(path, None).in_phase(Phase::Layers)
}

/// In the form asked for, to compare with a digest of that form.
pub(crate) fn of_file_as(path: &Path, form: DigestForm) -> Result<FileDigest> {
    known_or(path, Some(form))
}

fn known_or(path: &Path, form: Option<DigestForm>) -> Result<FileDigest> {
    let about = || format!("reading the layer {}", path.display());
    let file = File::open(path).with_context(about)?;
    let before = file.metadata().with_context(about)?;
    let key = identity(&before);
    let known = cache::load::<FileDigest>("digests", &key);
    if let Some(known) = known.filter(|known| form.is_none_or(|form| known.form == form)) {
        return Ok(known);
    }
    let found = read(&file, before.size(), form).with_context(about)?;
    let after = file.metadata().with_context(about)?;
    if identity(&after) != key {
        bail!("{} changed while it was read; a layer must be read-only", path.display());
    }
    if form.is_none() && acknowledged(&after) {
        cache::save("digests", &key, &found);
    }
    Ok(found)
}

fn acknowledged(facts: &Metadata) -> bool {
    let changed = SystemTime::UNIX_EPOCH
        + Duration::from_secs(facts.ctime().max(facts.mtime()).max(0).unsigned_abs());
    SystemTime::now().duration_since(changed).is_ok_and(|age| age > READY_AGE)
}

/// Limits are checked before anything is read.
fn read(file: &File, len: u64, form: Option<DigestForm>) -> Result<FileDigest> {
    let blocks = len.div_ceil(BLOCK_SIZE as u64);
    let data: std::io::Result<u64> = DataExtents::of(file, len)
        .map(|extent| extent.map(|extent| (extent.end - extent.start).div_ceil(BLOCK_SIZE as u64)))
        .sum();
    let data = data?;
    if blocks > MAX_LAYER_BLOCKS || data > MAX_STORED_BLOCKS {
        return Err(refused(format!(
            "its {len} bytes, {} of them no holes, are more than a layer can have (16 TiB, 1 TiB of data); attach it writable, split \
             it, or make its zeros holes with 'fallocate --dig-holes'",
            data * BLOCK_SIZE as u64
        )));
    }
    let digest = |digest, form| FileDigest { digest, len: ByteLen(len), form };
    let is_sparse = blocks - data >= MANY_ZERO_BLOCKS;
    if form != Some(DigestForm::Blocks) && !(form.is_none() && is_sparse) {
        let most_zeros = if form.is_none() { MANY_ZERO_BLOCKS } else { u64::MAX };
        if let Some(found) = of_content(file, len, most_zeros)? {
            return Ok(digest(found, DigestForm::Content));
        }
    }
    Ok(digest(of_blocks(file, len)?, DigestForm::Blocks))
}

/// None when so many blocks are zero; it stops there.
fn of_content(file: &File, len: u64, most_zeros: u64) -> Result<Option<ContentDigest>> {
    enum End {
        Sparse,
        Failed(std::io::Error),
    }
    impl From<std::io::Error> for End {
        fn from(error: std::io::Error) -> Self {
            Self::Failed(error)
        }
    }
    let mut hasher = ContentHasher::new();
    let mut zeros = 0;
    let visited = image::each_block::<End>(file, len, Blocks::All, |_, block| {
        zeros += u64::from(is_zero(block));
        if zeros >= most_zeros {
            return Err(End::Sparse);
        }
        hasher.update(block);
        Ok(())
    });
    match visited {
        Ok(()) => Ok(Some(hasher.finish())),
        Err(End::Sparse) => Ok(None),
        Err(End::Failed(error)) => Err(error.into()),
    }
}

fn of_blocks(file: &File, len: u64) -> Result<ContentDigest> {
    let mut hasher = BlocksHasher::new(ByteLen(len));
    image::each_block::<std::io::Error>(file, len, Blocks::NoHoles, |number, block| {
        if !is_zero(block) {
            hasher.block(number, &ContentDigest::of(&image::padded(block)));
        }
        Ok(())
    })?;
    Ok(hasher.finish())
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn another_content_under_the_same_name_is_another_digest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.img");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let first = of_file(&path).unwrap();
        let expected = FileDigest {
            digest: ContentDigest::of(&vec![7; 3 << 20]),
            len: ByteLen(3 << 20),
            form: DigestForm::Content,
        };
        assert_eq!(first, expected);
        std::fs::write(&path, vec![8; 3 << 20]).unwrap();
        assert_ne!(of_file(&path).unwrap().digest, first.digest);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = of_file(Path::new("/nonexistent/base.img")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/base.img"));
    }

    fn file(len: u64, data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        data.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        file
    }

    /// 2 TiB of holes would take a quarter of an hour.
    #[test]
    fn sparse_file_has_a_digest_at_once() {
        let begun = std::time::Instant::now();
        let file = file(2 << 40, &[(1 << 40, b"data"), (3 << 30, &[0; 100_000])]);
        let found = read(&file, 2 << 40, None).unwrap();
        assert_eq!(found.form, DigestForm::Blocks);
        let mut expected = BlocksHasher::new(ByteLen(2 << 40));
        let mut block = vec![0; BLOCK_SIZE];
        block[..4].copy_from_slice(b"data");
        expected.block((1 << 40) / BLOCK_SIZE as u64, &ContentDigest::of(&block));
        assert_eq!(found.digest, expected.finish());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    /// Where the holes are must not matter: a copy may have others.
    #[test]
    fn sparse_file_digest_is_of_the_content() {
        let len = (1 << 30) + 5 * BLOCK_SIZE as u64 + 9;
        let sparse = file(len, &[(0, b"a"), (len - 1, b"b")]);
        let zeros = vec![0; 1 << 20];
        let written: Vec<(u64, &[u8])> =
            (0..200).map(|number| (number << 20, zeros.as_slice())).collect();
        let denser = file(len, &[written.as_slice(), &[(0, b"a"), (len - 1, b"b")]].concat());
        let digests = [&sparse, &denser].map(|file| read(file, len, None).unwrap());
        assert_eq!(digests[0], digests[1]);
        assert_eq!(digests[0].form, DigestForm::Blocks);
        let content =
            [&sparse, &denser].map(|file| read(file, len, Some(DigestForm::Content)).unwrap());
        assert_eq!(content[0], content[1]);
        assert_eq!(content[0].form, DigestForm::Content);
    }

    #[test]
    fn too_large_files_are_refused_before_they_are_read() {
        let len = MAX_LAYER_BLOCKS * BLOCK_SIZE as u64;
        let Ok(()) = tempfile::tempfile().unwrap().set_len(len + 1) else {
            // A file system whose files end below the limit.
            return;
        };
        let error = read(&file(len + 1, &[]), len + 1, None).unwrap_err();
        assert_eq!(vm::error::class_of(&error), vm::error::Class::Refused);
    }
}
