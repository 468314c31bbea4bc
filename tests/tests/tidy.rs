//! The tree's own text: the field's words, line width, length of functions and files, and what a
//! search can judge of the code.
//!
//! `tests/tidy.txt` holds what is still allowed of each. A number there may only fall: a test is red when the tree has more, and also
//! when it has less, so that the number is lowered in the same change. `STILLPOINT_TIDY=list` prints every place.

use regex::Regex;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const ALLOWED: &str = include_str!("../tidy.txt");
const WIDTH: usize = 100;
const FUNCTION_LINES: usize = 60;
const FILE_LINES: usize = 500;
/// Places that a failure shows of one kind.
const SHOWN: usize = 12;

/// What stands for the words of another field, or is QEMU's own name of a thing: taken out before the words are looked for.
const KEPT: &str = r#"(?xi)
    machine[\ -](type|types|id|option|options|help) | -machine | /machine | machine[=."`\]]
  | ["`\[]machine | query-machines | ["`]machines["`] | --?scratch-dir | "scratch-dir" | fsfreeze | guest-fsfreeze[-a-z]*
  | \.drain\( | seq\ cst | seq\ access | (visit|deserialize)\ seq | ["`<]seq[">`] | ["`]rounds["`]
  | announce[\ -]rounds | ["`]unprepared["`] | \.freeze\(\)
  | runas\ nobody | user=nobody | "nobody" | lease\ expired | dhcp\ leases | page\ region | "scratch" | "seq" | \.seq\b | "seq\ is | machine\ {3,} | vm\ \(machine
"#;

/// Words that have a better one in this field, and the better one.
const WORDS: &[(&str, &str)] = &[
    (r"machines?", "VM, or host"),
    (r"unprepared|nobody's|strangers?", "external VM"),
    (r"whoever|nobody|somebody|anybody|everybody", "name the actor"),
    (r"anew", "again"),
    (r"patience", "timeout"),
    (r"glances?|standstill|steady", "poll interval, timeout, stable, retry"),
    (r"go(es)? on|went on|going on", "continue"),
    (r"(is|are|be|was) told", "name the actor: QEMU reports, the helper parses"),
    (r"owes?|owed|lends?|lent|mend(s|ed|ing)?|loans?", "claim, restore, hand over, fix"),
    (r"leases?", "claim"),
    (r"settles?|settled", "acknowledge"),
    (r"(take|takes|taken|give|gives|given|gave) back", "restore, return"),
    (r"stands? still|stood still", "is paused, is stopped"),
    (r"micro-pauses?", "brief stop"),
    (r"handover", "local migration"),
    (r"scratch", "fleecing overlay, temporary"),
    (r"freeze|freezes|frozen", "pause, captured"),
    (r"drain|drains", "upload phase"),
    (r"rounds", "pre-copy passes"),
    (r"regions?", "RAM block"),
    (r"seqs?", "checkpoint ID"),
    (r"sort(ed)? out|was cut off", "reconcile, internal error"),
    (r"house|rooms", "component, module"),
];

/// Crates whose code meets files, processes and stores that others made; not the tests, nor what
/// runs in a guest.
const CRATES: &[&str] = &[
    "checkpoint-format",
    "checkpoint-store",
    "dirty-tracker",
    "engine",
    "error-class",
    "helper",
    "plugin-protocol",
    "qemu-cmdline",
    "qmp-bridge",
    "stillpoint",
    "vm",
];
/// The one file that reads whole files for the binary.
const READER: &str = "vm/src/files.rs";

/// The one file that lists all error types.
const CLASSES: &str = "vm/src/error.rs";

/// What reads QEMU's replies without types still.
const UNTYPED: &[&str] = &[
    // The status in an event.
    "qmp-bridge/src/migration/watch.rs",
];

/// One place: file, line and the line's text.
type Places = Vec<String>;

#[test]
fn tidy_the_tree_uses_the_words_of_the_field() {
    let kept = Regex::new(KEPT).expect("a pattern");
    let mut found = BTreeMap::<String, Places>::new();
    let mut lines = Vec::new();
    for (path, text) in judged(&[".rs", ".md", ".sh"]) {
        lines.extend(text.lines().enumerate().map(|(index, line)| {
            let words = kept.replace_all(&words_of(line), "\u{1}").into_owned();
            (format!("{}:{}", path.display(), index + 1), words)
        }));
    }
    for (pattern, better) in WORDS {
        let word = Regex::new(&format!(r"(?i)\b({pattern})\b")).expect("a pattern");
        let places = found.entry(format!("word {}", pattern.replace(' ', "_"))).or_default();
        for (place, words) in &lines {
            let hits = word.find_iter(words).map(|hit| hit.as_str());
            places.extend(hits.map(|hit| format!("{place}: `{hit}`; better: {better}")));
        }
    }
    assert_allowed(&found);
}

#[test]
fn tidy_lines_functions_and_files_are_short() {
    let mut found = BTreeMap::from(
        ["wide-lines", "long-functions", "long-files"].map(|name| (name.to_owned(), Places::new())),
    );
    for (path, text) in judged(&[".rs", ".sh"]) {
        let wide = text.lines().enumerate().filter(|(_, line)| line.chars().count() > WIDTH);
        found
            .get_mut("wide-lines")
            .expect("made above")
            .extend(wide.map(|(index, _)| format!("{}:{}", path.display(), index + 1)));
        if path.extension().is_none_or(|end| end != "rs") || is_test(&path) {
            continue;
        }
        let lines: Vec<&str> = text.lines().take_while(|line| *line != "#[cfg(test)]").collect();
        found.get_mut("long-functions").expect("made above").extend(long_functions(&path, &lines));
        if lines.len() > FILE_LINES {
            found.get_mut("long-files").expect("made above").push(format!(
                "{}: {} lines",
                path.display(),
                lines.len()
            ));
        }
    }
    assert_allowed(&found);
}

#[test]
fn tidy_no_line_ends_with_a_space() {
    let all = texts(&[".rs", ".md", ".toml", ".cfg", ".service", "Makefile"]);
    assert!(all.len() > 300, "{} files", all.len());
    assert_eq!(wrong(&all, |line| line.ends_with([' ', '\t'])), [""; 0]);
}

#[test]
fn tidy_each_allowed_lint_has_a_reason() {
    let all = texts(&[".rs"]);
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
fn tidy_no_file_is_read_without_a_limit() {
    let mut all = texts(&[".rs"]);
    all.retain(|(path, _)| {
        let is_judged = CRATES.iter().any(|name| path.starts_with(Path::new(name).join("src")));
        is_judged
            && path != Path::new(READER)
            && !path.ends_with("test.rs")
            && !path.ends_with("hostile.rs")
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

/// An error type that is missing in the list would have no class below a context.
#[test]
fn tidy_each_error_type_is_classified() {
    let derived =
        Regex::new(r"derive\([^)]*\bError\b[^)]*\)\](?s:.{0,200}?)\npub (?:enum|struct) (\w+)")
            .expect("a pattern");
    let all = texts(&[".rs"]);
    let (_, list) = all.iter().find(|(path, _)| path.ends_with(CLASSES)).expect("the list");
    let (_, list) = list.split_once("\nclass_of_cause! {").expect("the list");
    let (list, _) = list.split_once('}').expect("its end");
    let listed: Vec<&str> = list.split([',', '\n']).map(str::trim).collect();
    let types: Vec<&str> = all
        .iter()
        .filter(|(path, _)| CRATES.iter().any(|name| path.starts_with(Path::new(name).join("src"))))
        .flat_map(|(_, text)| derived.captures_iter(text))
        .map(|found| found.extract::<1>().1[0])
        .collect();
    assert!(types.len() > 25, "{types:?}");
    let missing: Vec<&&str> = types.iter().filter(|name| !listed.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?} are missing in the list of {CLASSES}");
}

/// What QEMU says is read into the types of `qmp_bridge::qmp::replies`: a missing field is an error
/// there, and no default.
#[test]
fn tidy_no_reply_of_qemu_is_read_without_a_type() {
    let field = Regex::new(r#"\["[a-z_-]+"\]"#).expect("a pattern");
    let value = Regex::new(
        r"\.as_(u64|i64|f64|bool|array|object)\(|\.as_str\(\)(\?|\.(unwrap|is_some|map|and_then))",
    )
    .expect("a pattern");
    let mut all = texts(&[".rs"]);
    all.retain(|(path, _)| {
        let is_judged = ["qmp-bridge/src", "vm/src"].iter().any(|folder| path.starts_with(folder));
        is_judged && !is_test(path) && !UNTYPED.iter().any(|place| path.starts_with(place))
    });
    all.iter_mut()
        .for_each(|(_, text)| text.truncate(text.find("#[cfg(test)]").unwrap_or(text.len())));
    // What is sent is built of fields too.
    let is_built = |line: &str| line.contains("\"] = ") || line.contains("&[\"");
    let reads = |line: &str| value.is_match(line) || field.is_match(line) && !is_built(line);
    assert_eq!(
        wrong(&all, |line| !line.trim_start().starts_with("//") && reads(line)),
        [""; 0],
        "give the reply a type"
    );
}

/// `path:line: text` of the lines that are wrong.
fn wrong(texts: &[(PathBuf, String)], is_wrong: impl Fn(&str) -> bool) -> Vec<String> {
    let lines = texts.iter().flat_map(|(path, text)| {
        text.lines().enumerate().map(move |(number, line)| (path, number + 1, line))
    });
    lines
        .filter(|(_, _, line)| is_wrong(line))
        .map(|(path, number, line)| format!("{}:{number}: {line}", path.display()))
        .collect()
}

/// Identifiers as words: `claimDirty` and `claim_dirty` are "claim dirty".
fn words_of(line: &str) -> String {
    let mut words = String::with_capacity(line.len());
    let mut before = ' ';
    for letter in line.chars() {
        if letter.is_uppercase() && (before.is_lowercase() || before.is_ascii_digit()) {
            words.push(' ');
        }
        words.push(if letter == '_' { ' ' } else { letter });
        before = letter;
    }
    words
}

/// Functions that are longer than they may be: from their first line to the brace at the same indent.
fn long_functions(path: &Path, lines: &[&str]) -> Places {
    let begins =
        Regex::new(r#"^(\s*)(pub(\([a-z]+\))? )?(const )?(async )?(unsafe )?(extern "C" )?fn \w+"#)
            .expect("a pattern");
    let mut long = Places::new();
    for (index, line) in lines.iter().enumerate() {
        let Some(found) = begins.captures(line) else { continue };
        let end = format!("{}}}", &found[1]);
        let length =
            lines[index..].iter().position(|line| *line == end).map_or(0, |length| length + 1);
        if length > FUNCTION_LINES && !line.ends_with('}') && !line.ends_with(';') {
            long.push(format!("{}:{}: {length} lines", path.display(), index + 1));
        }
    }
    long
}

fn assert_allowed(found: &BTreeMap<String, Places>) {
    let mut wrong = String::new();
    for (name, places) in found {
        let allowed = ALLOWED
            .lines()
            .find_map(|line| line.strip_prefix(name.as_str())?.strip_prefix(": ")?.parse().ok())
            .unwrap_or(0);
        if places.len() == allowed && std::env::var_os("STILLPOINT_TIDY").is_none() {
            continue;
        }
        let shown =
            if std::env::var_os("STILLPOINT_TIDY").is_some() { places.len() } else { SHOWN };
        let order = if places.len() > allowed {
            "remove the new ones, of these"
        } else {
            "lower the number in tests/tidy.txt"
        };
        let _ = writeln!(wrong, "{name}: {} (tests/tidy.txt has {allowed}): {order}", places.len());
        places.iter().take(shown).for_each(|place| wrong.push_str(&format!("    {place}\n")));
    }
    assert!(wrong.is_empty(), "{wrong}");
}

fn is_test(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.starts_with("tests/")
        || name.contains("/tests/")
        || name.ends_with("test.rs")
        || name.contains("/examples/")
}

/// Without this file and its numbers, which have to hold the words.
fn judged(endings: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = texts(endings);
    found.retain(|(path, _)| path.file_stem().is_none_or(|stem| stem != "tidy"));
    found
}

/// The text files whose names end so, and for `.sh` scripts without an ending too; paths are
/// relative to the top of the tree.
fn texts(endings: &[&str]) -> Vec<(PathBuf, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    let (mut found, mut folders) = (Vec::new(), vec![top.to_owned()]);
    while let Some(folder) = folders.pop() {
        let is_script = folder.ends_with("scripts") && endings.contains(&".sh");
        for entry in std::fs::read_dir(&folder).expect("a folder of the tree") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
            let is_wanted = endings.iter().any(|end| name.ends_with(end))
                || is_script && path.extension().is_none();
            if name.starts_with('.') || name == "target" || path.is_symlink() {
                continue;
            } else if path.is_dir() {
                folders.push(path);
            } else if is_wanted {
                let text = std::fs::read_to_string(&path).expect("a text");
                found.push((path.strip_prefix(top).expect("below the top").to_owned(), text));
            }
        }
    }
    found.sort();
    assert!(found.len() > 300, "only {} files: is this the tree?", found.len());
    found
}
