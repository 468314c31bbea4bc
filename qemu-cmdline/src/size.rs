//! Memory sizes as `-m` takes them.

use thiserror::Error;

/// QEMU passes a VM's RAM up to this.
const RAM_ALIGNMENT: u64 = 8192;

/// A size that QEMU would not take; the message says why.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{text}' is no memory size: {why}")]
pub struct SizeError {
    text: String,
    why: &'static str,
}

error_class::classes! { SizeError = Usage; }

/// The bytes of RAM that QEMU gives a VM for `-m TEXT`: a plain number counts MiB, a fraction is
/// cut to whole bytes, and the whole is rounded up to 8 KiB.
///
/// # Errors
/// When QEMU would not take the text, or the size is above 2^64 bytes.
pub fn ram_bytes(text: &str) -> Result<u64, SizeError> {
    let bytes = parse(text)?;
    bytes.checked_next_multiple_of(RAM_ALIGNMENT).ok_or_else(|| error(text, "it is too large"))
}

fn error(text: &str, why: &'static str) -> SizeError {
    SizeError { text: text.to_owned(), why }
}

/// As QEMU's `qemu_strtosz_MiB`: decimal with a fraction or hexadecimal, and one letter as a
/// suffix.
fn parse(text: &str) -> Result<u64, SizeError> {
    const SYNTAX: &str =
        "give MiB as a plain number, or a suffix of B, K, M, G, T, as in 4G or 1.5G";
    let bad = || error(text, SYNTAX);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let number = u64::from_str_radix(digits, 16).map_err(|_| bad())?;
        return number.checked_mul(1 << 20).ok_or_else(|| error(text, "it is too large"));
    }
    let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit: u64 = match text[number.len()..].to_ascii_uppercase().as_str() {
        "B" => 1,
        "K" => 1 << 10,
        "" | "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        "P" => 1 << 50,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    // Without a suffix QEMU counts bytes first, and of those there are no parts.
    let has_suffix = number.len() < text.len();
    if !fraction.is_empty() && !has_suffix
        || !is_digits(whole)
        || !is_digits(fraction)
        || whole.is_empty() && fraction.is_empty()
    {
        return Err(bad());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
    let fraction: f64 = format!("0.{fraction}0").parse().map_err(|_| bad())?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at least 0 and at most a unit; QEMU truncates, too"
    )]
    let fraction = (fraction * unit as f64) as u64;
    let bytes = whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(fraction));
    bytes.ok_or_else(|| error(text, "it is too large"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ram_sizes_are_those_that_qemu_gives() {
        // Seen by query-memory-size-summary of QEMU 7.2 and 10.0.
        for (text, bytes) in [
            ("512", 512 << 20),
            ("1.5G", 3 << 29),
            ("1.3G", 1_395_867_648),
            ("1.1M", 1_155_072),
            ("0.3G", 322_125_824),
            ("0x10", 16 << 20),
            (".5G", 1 << 29),
            ("20000K", 20_480_000),
            ("1073741825B", (1 << 30) + 8192),
            ("2g", 2 << 30),
        ] {
            assert_eq!(ram_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "16.5", "4X", "-4", "4GB", "G", "1e3", "1.2.3G", "99999999T"] {
            assert!(ram_bytes(text).is_err(), "{text}");
        }
    }
}
