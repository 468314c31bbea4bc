//! What every source file keeps to, as far as a search can judge it.

use std::path::{Path, PathBuf};

/// Crates whose code meets files, processes and stores that others made; not the tests, nor what
/// runs in a guest.
const CRATES: &[&str] = &[
    "checkpoint-format",
    "checkpoint-store",
    "dirty-tracker",
    "engine",
    "plugin-protocol",
    "qemu-cmdline",
    "qmp-bridge",
    "stillpoint",
    "vm",
];
/// The one file that reads whole files for the binary.
const READER: &str = "vm/src/files.rs";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Every file below `folder` with one of these endings: its path from the workspace's root, and its
/// text.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the workspace") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8").to_owned();
        if path.is_dir() && !path.is_symlink() && name != "target" && !name.starts_with('.') {
            files(&path, endings, found);
        } else if path.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
            let text = std::fs::read_to_string(&path).expect("text");
            found.push((
                path.strip_prefix(root()).expect("below it").to_str().expect("UTF-8").to_owned(),
                text,
            ));
        }
    }
}

/// `path:line: text` of the lines that are wrong.
fn wrong(files: &[(String, String)], is_wrong: impl Fn(&str) -> bool) -> Vec<String> {
    let lines = files.iter().flat_map(|(path, text)| {
        text.lines().enumerate().map(move |(number, line)| (path, number + 1, line))
    });
    lines
        .filter(|(_, _, line)| is_wrong(line))
        .map(|(path, number, line)| format!("{path}:{number}: {line}"))
        .collect()
}

#[test]
fn tree_has_no_space_at_the_end_of_a_line() {
    let mut all = Vec::new();
    files(&root(), &[".rs", ".md", ".toml", ".cfg", ".service", "Makefile"], &mut all);
    assert!(all.len() > 300, "{} files", all.len());
    assert_eq!(wrong(&all, |line| line.ends_with([' ', '\t'])), [""; 0]);
}

#[test]
fn tree_gives_a_reason_for_each_allowed_lint() {
    let mut all = Vec::new();
    files(&root(), &[".rs"], &mut all);
    assert_eq!(
        wrong(&all, |line| line.trim_start().starts_with(&["#", "![allow("].concat())
            && !line.contains("reason")),
        [""; 0]
    );
    assert_eq!(
        wrong(&all, |line| line.trim_start().starts_with(&["#", "[allow("].concat())
            && !line.contains("reason")),
        [""; 0]
    );
}

/// A file of another may be a device, a pipe, or longer than memory.
#[test]
fn tree_reads_no_file_without_a_limit() {
    let mut all = Vec::new();
    CRATES.iter().for_each(|name| files(&root().join(name).join("src"), &[".rs"], &mut all));
    all.retain(|(path, _)| {
        path != READER && !path.ends_with("/test.rs") && !path.ends_with("/hostile.rs")
    });
    // Unit tests stand at the end.
    all.iter_mut()
        .for_each(|(_, text)| text.truncate(text.find("#[cfg(test)]").unwrap_or(text.len())));
    let whole = |line: &str| line.contains("fs::read(") || line.contains("fs::read_to_string(");
    let end = |line: &str| {
        (line.contains(".read_to_end(") || line.contains(".read_to_string("))
            && !line.contains("take(")
    };
    assert_eq!(
        wrong(&all, |line| whole(line) || end(line)),
        [""; 0],
        "use a limit, in the binary by {READER}"
    );
}
