//! Where a restored VM is not what its checkpoint says.

use checkpoint_format::as_index;
use serde_json::{Value, json};
use std::ops::Range;

/// Ranges of one space that are kept; more are only counted.
const MAX_RANGES: usize = 64;

/// The differing bytes of one space, in whole pages or blocks.
#[derive(Clone, Debug)]
pub struct Difference {
    /// `ram:pc.ram`, `disk:sp-data`, `layer:<digest>` or `state:device/<section>`.
    pub space: String,
    /// Offsets in the space, in bytes, ascending; the first ones if there are many.
    pub ranges: Vec<Range<u64>>,
    /// Bytes that differ, those of ranges that are not listed included.
    pub bytes: u64,
    /// What is wrong where it is not the content, as a size; or more about the content.
    pub note: Option<String>,
}

impl Difference {
    pub(super) fn new(space: impl Into<String>) -> Self {
        Self { space: space.into(), ranges: Vec::new(), bytes: 0, note: None }
    }

    /// One that no range describes.
    pub(super) fn noted(space: impl Into<String>, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..Self::new(space) }
    }

    pub(super) fn push(&mut self, range: Range<u64>) {
        self.bytes += range.end - range.start;
        let has_room = self.ranges.len() < MAX_RANGES;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if has_room => self.ranges.push(range),
            _ => {}
        }
    }

    /// None if nothing differs.
    pub(super) fn found(self) -> Option<Self> {
        (self.bytes > 0 || self.note.is_some()).then_some(self)
    }

    /// Without the pages of `excused`, which are returned by their names. More ranges than are kept
    /// stay a difference.
    pub(super) fn without(
        self,
        excused: &[(Range<u64>, &'static str)],
        page: u64,
    ) -> (Self, Vec<(String, &'static str)>) {
        let kept: u64 = self.ranges.iter().map(|range| range.end - range.start).sum();
        let mut left = Self { bytes: self.bytes - kept, ranges: Vec::new(), ..self.clone() };
        let mut names = Vec::new();
        for at in self.ranges.into_iter().flat_map(|range| range.step_by(as_index(page))) {
            match excused.iter().find(|(range, _)| range.start < at + page && at < range.end) {
                Some((_, why)) => {
                    names.push((format!("{} {at:#x}..{:#x}", left.space, at + page), *why))
                }
                None => left.push(at..at + page),
            }
        }
        (left, names)
    }

    pub(super) fn json(&self) -> Value {
        let ranges: Vec<Value> = self
            .ranges
            .iter()
            .map(|range| json!({ "start": range.start, "end": range.end }))
            .collect();
        json!({ "space": self.space, "bytes": self.bytes, "ranges": ranges, "note": self.note })
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.space)?;
        if self.bytes > 0 {
            let ranges: Vec<String> = self
                .ranges
                .iter()
                .take(8)
                .map(|range| format!("{:#x}..{:#x}", range.start, range.end))
                .collect();
            let more = if self.ranges.len() > 8 { ", more" } else { "" };
            write!(f, ": {} bytes differ, at {}{more}", self.bytes, ranges.join(", "))?;
        }
        self.note.iter().try_for_each(|note| write!(f, ": {note}"))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn neighbours_are_one_range_and_excused_pages_go() {
        let mut difference = Difference::new("ram:pc.ram");
        [0..4096, 4096..8192, 40_960..45_056].into_iter().for_each(|range| difference.push(range));
        assert_eq!(
            (difference.ranges.as_slice(), difference.bytes),
            (&[0..8192, 40_960..45_056][..], 12_288)
        );
        let (left, names) = difference.without(&[(5000..5016, "why")], 4096);
        assert_eq!((left.ranges.as_slice(), left.bytes), (&[0..4096, 40_960..45_056][..], 8192));
        assert_eq!(names, [("ram:pc.ram 0x1000..0x2000".to_owned(), "why")]);
    }
}
