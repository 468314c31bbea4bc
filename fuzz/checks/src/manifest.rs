//! The manifest of a checkpoint.

use crate::sealing::sealed;
use checkpoint_format::Manifest;

/// Reads `input` as it is, and with its digest put right; whether that is a manifest.
pub(crate) fn check(input: &[u8]) -> bool {
    read(input);
    read(&sealed(input))
}

fn read(file: &[u8]) -> bool {
    let Ok(manifest) = Manifest::parse(file) else { return false };
    let written = manifest.encode().expect("what was read can be written");
    assert_eq!(Manifest::parse(&written).expect("what was written can be read"), manifest);
    true
}
