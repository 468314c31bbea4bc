//! The import rules of ARCHITECTURE.md: between crates, checked against what Cargo says; and
//! between the modules of a crate, checked against its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Who may import which of our own crates, outside of tests.
const ALLOWED: &[(&str, &[&str])] = &[
    ("checkpoint-format", &["error-class"]),
    ("checkpoint-store", &["checkpoint-format", "error-class"]),
    ("dirty-tracker", &["checkpoint-format", "error-class", "plugin-protocol"]),
    (
        "engine",
        &[
            "checkpoint-format",
            "checkpoint-store",
            "dirty-tracker",
            "qemu-cmdline",
            "qmp-bridge",
            "vm",
        ],
    ),
    ("error-class", &[]),
    (
        "fuzz-checks",
        &["checkpoint-format", "helper", "plugin-protocol", "qemu-cmdline", "qmp-bridge", "vm"],
    ),
    ("helper", &["checkpoint-format", "engine", "qmp-bridge", "vm"]),
    ("plugin-protocol", &[]),
    ("qemu-cmdline", &["error-class"]),
    ("qmp-bridge", &["checkpoint-format", "error-class"]),
    ("scripted-vm", &[]),
    ("stillpoint", &["checkpoint-format", "checkpoint-store", "engine", "helper", "vm"]),
    ("stillpoint-documents", &["stillpoint"]),
    ("stillpoint-plugin", &["plugin-protocol"]),
    (
        "stillpoint-tests",
        &[
            "checkpoint-format",
            "checkpoint-store",
            "dirty-tracker",
            "engine",
            "qemu-cmdline",
            "qmp-bridge",
        ],
    ),
    (
        "vm",
        &[
            "checkpoint-format",
            "checkpoint-store",
            "dirty-tracker",
            "error-class",
            "qemu-cmdline",
            "qmp-bridge",
        ],
    ),
    ("witness", &[]),
];

/// Modules at the top of a crate that import each other. It may only become shorter.
const CIRCLES: &[(&str, &[&str])] =
    &[("checkpoint-store", &["error", "path"]), ("stillpoint-tests", &["lab", "vm"])];

fn packages() -> Vec<Package> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    metadata.packages
}

fn imports(package: &Package) -> BTreeSet<String> {
    let normal =
        package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
    normal.map(|dependency| dependency.name.clone()).collect()
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let ours: BTreeSet<String> =
        packages().iter().map(|package| package.name.to_string()).collect();
    assert_eq!(
        ours,
        allowed.keys().map(ToString::to_string).collect(),
        "a crate came or went: say in ALLOWED what it may import"
    );
    for package in packages() {
        let own: Vec<String> = imports(&package).intersection(&ours).cloned().collect();
        let wrong: Vec<&String> = own
            .iter()
            .filter(|name| !allowed[package.name.as_str()].contains(&name.as_str()))
            .collect();
        assert!(
            wrong.is_empty(),
            "{} imports {wrong:?}, which ARCHITECTURE.md does not allow",
            package.name
        );
    }
}

#[test]
fn hdfs_appears_only_in_the_store() {
    let users = packages().into_iter().filter(|package| imports(package).contains("hdfs-native"));
    assert_eq!(
        users.map(|package| package.name.to_string()).collect::<Vec<_>>(),
        ["checkpoint-store"]
    );
}

#[test]
fn modules_of_a_crate_import_each_other_in_no_circle() {
    let mut found = Vec::new();
    for package in packages()
        .iter()
        .filter(|package| ALLOWED.iter().any(|(name, _)| package.name.as_str() == *name))
    {
        let folder = package.manifest_path.parent().expect("a folder").join("src");
        found.extend(
            Modules::read(folder.as_std_path())
                .circles()
                .into_iter()
                .map(|circle| (package.name.to_string(), circle)),
        );
    }
    let known = CIRCLES.iter().map(|(name, circle)| {
        ((*name).to_owned(), circle.iter().map(ToString::to_string).collect())
    });
    assert_eq!(
        found,
        known.collect::<Vec<(String, Vec<String>)>>(),
        "a circle that is new, or that is gone: shorten CIRCLES"
    );
}

#[test]
fn circles_are_found_through_paths_lists_and_re_exports() {
    let texts = [
        ("lib.rs", "mod a;\nmod b;\npub use b::{Other, Thing};"),
        ("a.rs", "use crate::{Thing, c};"),
        ("b/mod.rs", "// crate::c"),
    ];
    let more = [
        (
            "b/inner.rs",
            "fn f() { super::super::a::g() }\n#[cfg(test)]\nmod test {\n    use crate::c;",
        ),
        ("c.rs", ""),
    ];
    let modules = Modules::of(
        texts.into_iter().chain(more).map(|(path, text)| (Path::new(path), text.to_owned())),
    );
    assert_eq!(modules.circles(), [["a", "b"]]);
}

/// The modules at the top of a crate, each with those that it names outside of its tests.
struct Modules(BTreeMap<String, BTreeSet<String>>);

impl Modules {
    fn read(folder: &Path) -> Self {
        let mut files = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(&next)
                .expect("sources")
                .map(|entry| entry.expect("an entry").path())
            {
                if entry.is_dir() {
                    folders.push(entry);
                } else if entry.extension().is_some_and(|extension| extension == "rs") {
                    files.push(entry);
                }
            }
        }
        let text = |file: &Path| std::fs::read_to_string(file).expect("a source");
        Self::of(files.iter().map(|file| (file.strip_prefix(folder).expect("below"), text(file))))
    }

    /// Files by their path below `src`.
    fn of<'a>(files: impl Iterator<Item = (&'a Path, String)>) -> Self {
        let mut named: Vec<(String, BTreeSet<String>)> = Vec::new();
        let mut root = String::new();
        for (path, text) in files {
            let mut parts: Vec<String> = path
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            let code = without_tests(&text);
            match parts.last().map(String::as_str) {
                Some("lib" | "main") if parts.len() == 1 => root = code,
                Some("test") => {}
                last => {
                    if last == Some("mod") {
                        parts.pop();
                    }
                    named.push((parts[0].clone(), names_at_top(&code, parts.len())));
                }
            }
        }
        let tops: BTreeSet<String> = named.iter().map(|(top, _)| top.clone()).collect();
        let exported = re_exports(&root);
        let mut modules: BTreeMap<String, BTreeSet<String>> =
            tops.iter().map(|top| (top.clone(), BTreeSet::new())).collect();
        for (top, names) in named {
            let resolved = names.into_iter().filter_map(|name| {
                if tops.contains(&name) { Some(name) } else { exported.get(&name).cloned() }
            });
            modules.entry(top.clone()).or_default().extend(resolved.filter(|name| *name != top));
        }
        Self(modules)
    }

    fn reached<'a>(&'a self, from: &'a str) -> BTreeSet<&'a str> {
        let mut seen = BTreeSet::new();
        let mut next = vec![from];
        while let Some(module) = next.pop() {
            next.extend(
                self.0
                    .get(module)
                    .into_iter()
                    .flatten()
                    .map(String::as_str)
                    .filter(|name| seen.insert(*name)),
            );
        }
        seen
    }

    fn circles(&self) -> Vec<Vec<String>> {
        let mutual = |from: &String| -> Vec<String> {
            let reached = self.reached(from);
            let back = reached.iter().filter(|name| self.reached(name).contains(from.as_str()));
            back.map(ToString::to_string).collect()
        };
        let all: BTreeSet<Vec<String>> =
            self.0.keys().map(mutual).filter(|circle| circle.len() > 1).collect();
        all.into_iter().collect()
    }
}

/// Without comments, and without the module of tests, which ends a file.
fn without_tests(text: &str) -> String {
    let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// What comes after `crate::`, and after as many `super::` as lead to the top from `depth` folders
/// and files below it.
fn names_at_top(code: &str, depth: usize) -> BTreeSet<String> {
    let up = "super::".repeat(depth);
    let mut names = BTreeSet::new();
    for (at, found) in code.match_indices("crate::").chain(code.match_indices(&up)) {
        let is_part =
            code[..at].ends_with(|letter: char| letter.is_alphanumeric() || "_:$".contains(letter));
        if !is_part {
            names.extend(heads(&code[at + found.len()..]));
        }
    }
    names
}

/// The first name of a path, or of each path in braces.
fn heads(text: &str) -> Vec<String> {
    let name = |text: &str| {
        text.trim_start()
            .chars()
            .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
            .collect::<String>()
    };
    let Some(list) = text.strip_prefix('{') else { return vec![name(text)] };
    let (mut names, mut depth, mut begin) = (Vec::new(), 0, 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(name(&list[begin..at]));
                begin = at + 1;
                if letter == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names
}

/// Names that a crate's root has from its modules.
fn re_exports(root: &str) -> BTreeMap<String, String> {
    let mut exported = BTreeMap::new();
    for part in root.split("pub use ").skip(1) {
        let Some((path, _)) = part.split_once(';') else { continue };
        let Some((module, rest)) = path.trim_start_matches("crate::").split_once("::") else {
            continue;
        };
        exported.extend(heads(rest).into_iter().map(|name| (name, module.to_owned())));
    }
    exported
}
