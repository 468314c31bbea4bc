//! The project's own files, as far as tests hold them against each other.

use crate::built::project;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Directories of built and stored things, which are none of the project's text.
const NOT_READ: &[&str] = &["target", ".git"];

/// Names of all tests of the project, wherever they are.
pub fn test_names() -> HashSet<String> {
    sources(project())
        .iter()
        .flat_map(|file| tests_in(&std::fs::read_to_string(file).unwrap_or_default()))
        .collect()
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries
        .map(|entry| entry.path())
        .filter(|path| !NOT_READ.iter().any(|name| path.ends_with(name)));
    let (directories, files): (Vec<PathBuf>, Vec<PathBuf>) = paths.partition(|path| path.is_dir());
    let files =
        files.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "rs"));
    files.chain(directories.iter().flat_map(|directory| sources(directory))).collect()
}

/// The first function behind each attribute that makes it a test (`proptest!` and `tokio::test`
/// too).
fn tests_in(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim_start) {
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        let function =
            line.trim_start_matches("pub ").trim_start_matches("async ").strip_prefix("fn ");
        if let Some(name) =
            function.filter(|_| is_test).and_then(|rest| rest.split(['(', '<']).next())
        {
            names.push(name.to_owned());
            is_test = false;
        }
    }
    names
}

/// The first cell of each row of the tables below a heading of a page of docs/, up to the next
/// heading.
pub fn first_cells(page: &str, heading: &str) -> Vec<String> {
    rows(page, heading).into_iter().filter_map(|cells| cells.into_iter().next()).collect()
}

/// The cells of each row of those tables.
pub fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(project().join("docs").join(page))
        .unwrap_or_else(|error| panic!("docs/{page}: {error}"));
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines
        .iter()
        .position(|line| line.starts_with('#') && line.trim_start_matches('#').trim() == heading);
    let begin = begin.unwrap_or_else(|| panic!("docs/{page} has no heading '{heading}'"));
    let table = lines[begin + 1..].iter().take_while(|line| !line.starts_with('#'));
    let table: Vec<&&str> = table.filter(|line| line.starts_with('|')).collect();
    // A row of dashes follows each head.
    let is_head = |at: usize| {
        table[at].starts_with("| ---")
            || table.get(at + 1).is_some_and(|next| next.starts_with("| ---"))
    };
    let numbers = (0..table.len()).filter(|at| !is_head(*at));
    numbers
        .map(|at| {
            table[at].trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

/// What a cell lists: parts between commas and semicolons, but not inside parentheses or
/// backquotes.
pub fn items(cell: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut depth, mut is_code) = (0_u32, false);
    for letter in cell.chars() {
        match letter {
            '`' => is_code = !is_code,
            '(' if !is_code => depth += 1,
            ')' if !is_code => depth = depth.saturating_sub(1),
            _ => {}
        }
        match parts.last_mut() {
            Some(part) if !matches!(letter, ',' | ';') || is_code || depth > 0 => part.push(letter),
            _ => parts.push(String::new()),
        }
    }
    parts.iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn tree_items_are_split_outside_of_parentheses_and_code() {
        assert_eq!(items("`a, b`, c (d, e); f"), ["`a, b`", "c (d, e)", "f"]);
    }

    #[test]
    fn tree_tests_are_found_behind_their_attribute() {
        let text = "#[test]\nfn one() {}\nfn two() {}\n    #[tokio::test(flavor = \"x\")]\n    async fn three<T>() {}\n";
        assert_eq!(tests_in(text), ["one", "three"]);
    }
}
