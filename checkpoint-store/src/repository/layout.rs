//! Names in the store: made here, parsed here, nowhere else.

use std::fmt::Display;

use checkpoint_format::{CheckpointId, Checksum, ContentDigest, Epoch, VmName};

use crate::path::StorePath;

pub(crate) const MANIFEST: &str = "manifest.json";
const PARTIAL: &str = ".partial";
const RELEASED: &str = ".released";

/// A path of parts that can't be invalid: fixed words, numbers, digests, nonces and validated
/// names.
fn path(text: impl Display) -> StorePath {
    StorePath::new(&text.to_string())
        .expect("parts of the layout are valid components by their types")
}

pub(crate) fn identity() -> StorePath {
    path("store.json")
}

pub(crate) fn vms() -> StorePath {
    path("vms")
}

pub(crate) fn vm(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}"))
}

pub(crate) fn layers() -> StorePath {
    path("layers")
}

pub(crate) fn layer(digest: &ContentDigest) -> StorePath {
    path(format_args!("layers/{digest}"))
}

pub(crate) fn partial_layer(digest: &ContentDigest, nonce: &str) -> StorePath {
    path(format_args!("layers/{digest}.{nonce}{PARTIAL}"))
}

/// The layer that a partial directory is to become.
pub(crate) fn parse_partial_layer(name: &str) -> Option<ContentDigest> {
    name.strip_suffix(PARTIAL)?.split_once('.')?.0.parse().ok()
}

pub(crate) fn writers(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}/writers"))
}

pub(crate) fn writer(vm: &VmName, epoch: Epoch) -> StorePath {
    path(format_args!("vms/{vm}/writers/{}", epoch.0))
}

pub(crate) fn released(vm: &VmName, epoch: Epoch) -> StorePath {
    path(format_args!("vms/{vm}/writers/{}{RELEASED}", epoch.0))
}

pub(crate) fn checkpoints(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}/checkpoints"))
}

pub(crate) fn checkpoint(vm: &VmName, id: CheckpointId) -> StorePath {
    path(format_args!("vms/{vm}/checkpoints/{}", id.0))
}

pub(crate) fn readers(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}/readers"))
}

pub(crate) fn reader(vm: &VmName, name: &ReaderName) -> StorePath {
    let ReaderName { id, key, number } = name;
    path(format_args!("vms/{vm}/readers/{}.{key}-{number}", id.0))
}

/// One file of one reader of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReaderName {
    pub id: CheckpointId,
    /// Tells readers apart.
    pub key: Checksum,
    /// Counts renewals.
    pub number: u64,
}

impl ReaderName {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (id, rest) = name.split_once('.')?;
        let (key, count) = rest.split_once('-')?;
        Some(ReaderName {
            id: CheckpointId(number(id)?),
            key: key.parse().ok()?,
            number: number(count)?,
        })
    }
}

pub(crate) fn working_set(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}/working-set"))
}

pub(crate) fn proofs(vm: &VmName) -> StorePath {
    path(format_args!("vms/{vm}/proofs"))
}

pub(crate) fn proof(vm: &VmName, id: CheckpointId, key: &Checksum) -> StorePath {
    path(format_args!("vms/{vm}/proofs/{}.{key}.json", id.0))
}

/// The checkpoint that a proof's file is of.
pub(crate) fn proof_of(name: &str) -> Option<CheckpointId> {
    let (id, _) = name.strip_suffix(".json")?.split_once('.')?;
    number(id).map(CheckpointId)
}

/// Where a checkpoint grows. The try is part of the name because a request that timed out may still
/// be carried out by the store later: a late rename of an earlier try must not find a later one
/// under its name.
pub(crate) fn partial_checkpoint(vm: &VmName, partial: &PartialName) -> StorePath {
    let PartialName { id, epoch, attempt } = partial;
    path(format_args!("vms/{vm}/checkpoints/{}.{}-{attempt}{PARTIAL}", id.0, epoch.0))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PartialName {
    pub id: CheckpointId,
    pub epoch: Epoch,
    pub attempt: u64,
}

impl PartialName {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (id, rest) = name.strip_suffix(PARTIAL)?.split_once('.')?;
        let (epoch, attempt) = rest.split_once('-')?;
        Some(PartialName {
            id: CheckpointId(number(id)?),
            epoch: Epoch(number(epoch)?),
            attempt: number(attempt)?,
        })
    }
}

/// A number as we write it: no sign, no leading zeros, so that two names never mean the same.
pub(crate) fn number(text: &str) -> Option<u64> {
    let value: u64 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

pub(crate) enum WriterFile {
    Claim(Epoch),
    Released(Epoch),
}

pub(crate) fn parse_writer_file(name: &str) -> Option<WriterFile> {
    match name.strip_suffix(RELEASED) {
        Some(epoch) => number(epoch).map(|epoch| WriterFile::Released(Epoch(epoch))),
        None => number(name).map(|epoch| WriterFile::Claim(Epoch(epoch))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_names_parse_back() {
        let vm: VmName = "vm".parse().expect("valid");
        let name = PartialName { id: CheckpointId(12), epoch: Epoch(3), attempt: 4 };
        let path = partial_checkpoint(&vm, &name);
        assert_eq!(path.as_str(), "vms/vm/checkpoints/12.3-4.partial");
        assert_eq!(PartialName::parse(path.name()), Some(name));
    }

    #[test]
    fn other_names_are_not_partials() {
        for name in [
            "12",
            "12.partial",
            "12.3.partial",
            "12.03-1.partial",
            "12.3-1",
            "a.3-1.partial",
            "1.2-+3.partial",
        ] {
            assert_eq!(PartialName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn partial_layers_name_their_layer() {
        let digest = ContentDigest::of(b"x");
        assert_eq!(parse_partial_layer(partial_layer(&digest, "n-1").name()), Some(digest));
        for name in [
            digest.to_string(),
            format!("{digest}.partial"),
            "x.1.partial".to_owned(),
            format!("{digest}.1"),
        ] {
            assert_eq!(parse_partial_layer(&name), None, "{name}");
        }
    }

    #[test]
    fn proofs_name_their_checkpoint() {
        let vm: VmName = "vm".parse().expect("valid");
        let path = proof(&vm, CheckpointId(12), &Checksum([0x1b; 16]));
        assert_eq!(path.as_str(), format!("vms/vm/proofs/12.{}.json", "1b".repeat(16)));
        assert_eq!(proof_of(path.name()), Some(CheckpointId(12)));
        assert_eq!([proof_of("12.json"), proof_of("012.a.json"), proof_of("x.a.json")], [None; 3]);
    }

    #[test]
    fn reader_names_parse_back() {
        let vm: VmName = "vm".parse().expect("valid");
        let name = ReaderName { id: CheckpointId(12), key: Checksum([0x1b; 16]), number: 7 };
        let path = reader(&vm, &name);
        assert_eq!(path.as_str(), format!("vms/vm/readers/12.{}-7", "1b".repeat(16)));
        assert_eq!(ReaderName::parse(path.name()), Some(name));
        for name in ["now.1-2", "12", "12.1b-7", "12.7", "012.1b-7"] {
            assert_eq!(ReaderName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn every_number_has_one_name() {
        assert_eq!(number("0"), Some(0));
        assert_eq!(number("18446744073709551615"), Some(u64::MAX));
        for text in ["", "00", "01", "+1", "-1", "1 ", "18446744073709551616"] {
            assert_eq!(number(text), None, "{text:?}");
        }
    }
}
