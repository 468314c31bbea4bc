//! The output of a QEMU that failed, as an error quotes it: its last lines, without those that do
//! not concern the failure.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// How many lines are quoted.
const QUOTED_LINES: usize = 5;
/// Bytes at the end of a log that are read.
const MAX_TAIL: u64 = 64 << 10;
/// Printed at every start on some hosts (half-installed modules), or when we end QEMU.
const NOISE: &[&str] = &["failed to open module", "terminating on signal"];
/// Not what ended it, if there is anything else.
const HINTS: &[&str] = &["warning:", "info:"];

/// The lines to quote, joined by `; `; empty if it said nothing.
pub fn quote(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let without = |words: &[&[&str]]| -> Vec<&str> {
        let is_one = |line: &str| {
            words.iter().copied().flatten().any(|word| line.to_ascii_lowercase().contains(word))
        };
        lines.iter().copied().filter(|line| !is_one(line)).collect()
    };
    let choices = [without(&[NOISE, HINTS]), without(&[NOISE]), lines.clone()];
    let said = choices.into_iter().find(|lines| !lines.is_empty()).unwrap_or_default();
    said[said.len().saturating_sub(QUOTED_LINES)..].join("; ")
}

/// The same of the end of a log file.
pub fn quote_log(path: &Path) -> String {
    File::open(path).map(quote_file).unwrap_or_default()
}

/// The same of a log that is open.
pub fn quote_file(file: File) -> String {
    tail(file).map(|text| quote(&text)).unwrap_or_default()
}

fn tail(mut file: File) -> std::io::Result<String> {
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(MAX_TAIL)))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    const MODULE: &str =
        "Failed to open module: /usr/lib/x86_64-linux-gnu/qemu/ui-opengl.so: file too short";
    const WARNING: &str =
        "qemu: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]";

    #[test]
    fn quoted_words_are_about_the_failure() {
        let error = "qemu: -drive file=x: Could not open 'x': No such file or directory";
        assert_eq!(
            quote(&format!(
                "{MODULE}\n{WARNING}\n{error}\nqemu: terminating on signal 15 from pid 1 (x)\n"
            )),
            error
        );
        assert_eq!(quote(&format!("{MODULE}\n{WARNING}\n")), WARNING);
        assert_eq!(quote(MODULE), MODULE, "better than nothing");
        assert_eq!(quote("\n"), "");
        assert_eq!(quote("1\n2\n3\n4\n5\n6"), "2; 3; 4; 5; 6");
    }

    #[test]
    fn quoted_words_stand_after_any_number_of_others() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(
            &mut file,
            format!("{}the cause\n", format!("{MODULE}\n").repeat(200)).as_bytes(),
        )
        .unwrap();
        assert_eq!(quote_file(file), "the cause");
    }

    #[test]
    fn quoted_log_is_read_at_its_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{}\nthe end\n", "x\n".repeat(100_000))).unwrap();
        assert!(quote_log(file.path()).ends_with("x; the end"));
        assert_eq!(quote_log(Path::new("/nonexistent/log")), "");
    }
}
