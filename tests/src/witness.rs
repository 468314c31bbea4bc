//! What the guest says on its serial port (`tests/witness/src/report.rs` has the format).

use std::path::Path;

/// One `WITNESS step=…` line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub step: u64,
    pub contradictions: u64,
    pub uptime: f64,
    pub passes: u64,
    /// The last step that each journal took.
    pub disks: Vec<u64>,
    /// `table=`, `journal=` and `base=` all say ok.
    pub is_ok: bool,
}

/// All whole progress lines. Panics when the guest refused to run.
pub fn lines(serial: &Path) -> Vec<Line> {
    let text = text(serial);
    if let Some(refused) = text
        .lines()
        .find(|line| line.starts_with("WITNESS REFUSED") || line.starts_with("WITNESS EXIT"))
    {
        panic!("{}: {refused}", serial.display());
    }
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(parse).collect()
}

/// What the guest found wrong, in its own words.
pub(crate) fn contradictions(serial: &Path) -> Vec<String> {
    text(serial)
        .lines()
        .filter(|line| line.starts_with("WITNESS CONTRADICTION"))
        .map(str::to_owned)
        .collect()
}

fn text(serial: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned()
}

fn parse(line: &str) -> Option<Line> {
    // The serial port's first line after a restore may begin in the middle of the guest's.
    let words: Vec<(&str, &str)> = line
        .trim()
        .strip_prefix("WITNESS ")?
        .split(' ')
        .filter_map(|word| word.split_once('='))
        .collect();
    let find = |key: &str| words.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
    let number = |key: &str| find(key)?.parse().ok();
    Some(Line {
        step: number("step")?,
        contradictions: number("contradictions")?,
        uptime: find("uptime")?.parse().ok()?,
        passes: number("passes")?,
        disks: find("disks")?.split(',').filter_map(|step| step.parse().ok()).collect(),
        is_ok: ["table", "journal", "base"].iter().all(|part| find(part) == Some("ok")),
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_progress_line_is_read() {
        let text = "WITNESS step=45 table=ok journal=ok contradictions=0 uptime=7.67 base=ok disks=45,44 passes=2 late=0";
        let line = parse(text).expect("well formed");
        assert_eq!(
            (line.step, line.passes, line.disks.as_slice(), line.is_ok),
            (45, 2, &[45, 44][..], true)
        );
        assert!(!parse(&text.replace("journal=ok", "journal=BAD")).expect("well formed").is_ok);
        assert_eq!(parse("WITNESS start run=1 table_mib=3"), None);
        assert_eq!(parse("[    1.2] random: crng init done"), None);
    }
}
