//! Checksums and lengths put right, so that what stands behind them is reached. A fuzzer does not
//! find a digest.

use checkpoint_format::ContentDigest;

/// A text file of this kind and version around `body`.
pub(crate) fn envelope(kind: &str, version: u32, body: &[u8]) -> Vec<u8> {
    let line = format!("{kind} {version} {} {}\n", ContentDigest::of(body), body.len());
    [line.as_bytes(), body].concat()
}

/// The text file with digest and length as its body has them; what is no such file stays.
pub(crate) fn sealed(file: &[u8]) -> Vec<u8> {
    let Some(end) = file.iter().position(|byte| *byte == b'\n') else { return file.to_vec() };
    let (line, body) = (String::from_utf8_lossy(&file[..end]), &file[end + 1..]);
    match line.split_once(' ').map(|(kind, rest)| (kind, rest.split(' ').next())) {
        Some((kind, Some(version))) if let Ok(version) = version.parse() => {
            envelope(kind, version, body)
        }
        _ => file.to_vec(),
    }
}

/// Compressed as the product's own tables are.
pub(crate) fn compressed(raw: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(raw, 1).expect("memory is compressed")
}
