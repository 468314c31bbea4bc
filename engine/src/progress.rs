//! How far long work is. The engine reports it; who started the work decides how it is shown.

use serde::{Deserialize, Serialize};

/// How far a phase of a checkpoint or of an adoption is, as it is sent to the client of a helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The phase's name, as results have it.
    pub phase: String,
    /// How much of `total` is done: bytes, or passes of the pre-copy.
    pub done: u64,
    /// All of it, in the same unit; 0 where the phase has no measure.
    pub total: u64,
}

/// Shows the work of a command to its user.
pub trait Progress: Send + Sync {
    /// Work on `total` bytes begins, and ends when what is returned is dropped.
    fn begin(&self, what: &str, total: u64) -> Box<dyn Advance>;

    /// What the user should know though nothing failed.
    fn note(&self, text: &str);
}

/// Work under way.
pub trait Advance: Send + Sync {
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _what: &str, _total: u64) -> Box<dyn Advance> {
        Box::new(Silent)
    }

    fn note(&self, _text: &str) {}
}

impl Advance for Silent {
    fn advance(&self, _bytes: u64) {}
}

/// A count of bytes for people: `1.50 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn bytes_are_shown_in_binary_units() {
        let shown = [0, 1023, 1024, 1536, 3 << 20, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "3.00 MiB", "16.00 EiB"]);
    }
}
