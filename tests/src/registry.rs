//! All tests of the project, as its test programs list them.

use crate::built::project;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The tests of all programs of the workspace: `PROGRAM::MODULE::NAME`. The program of unit tests
/// is called like its crate.
pub struct Registry(BTreeSet<String>);

impl Registry {
    /// Asked once per test program. What is built already takes two seconds.
    pub fn get() -> &'static Self {
        static ALL: OnceLock<Registry> = OnceLock::new();
        ALL.get_or_init(|| {
            let programs = programs().into_iter();
            Self(programs.flat_map(|(name, path)| listed(&name, &path)).collect())
        })
    }

    /// Whether there is one test whose name is, or ends with, this path.
    pub fn has(&self, path: &str) -> bool {
        let end = format!("::{path}");
        self.0.iter().any(|test| test == path || test.ends_with(&end))
    }
}

/// The tests of the program that runs, without its name.
pub fn own_tests() -> Vec<String> {
    list(&std::env::current_exe().expect("the kernel tells"))
}

fn listed(program: &str, path: &Path) -> Vec<String> {
    let program = program.replace('-', "_");
    list(path).iter().map(|test| format!("{program}::{test}")).collect()
}

fn list(program: &Path) -> Vec<String> {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    assert!(output.status.success(), "{} lists no tests", program.display());
    let text = String::from_utf8(output.stdout).expect("names are text");
    text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// Name and path of each test program.
fn programs() -> Vec<(String, PathBuf)> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").to_owned());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--workspace", "--no-run", "--quiet", "--message-format=json"])
        .current_dir(project());
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(output.status.success(), "the workspace's tests do not build; see above");
    let text = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let is_test = |message: &Value| message["profile"]["test"] == true;
    let program = |message: Value| {
        let name = message["target"]["name"].as_str()?.to_owned();
        Some((name, PathBuf::from(message["executable"].as_str()?)))
    };
    messages.filter(is_test).filter_map(program).collect()
}
