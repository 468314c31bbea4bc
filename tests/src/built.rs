//! The program under test, built once per test program.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The root of this source tree.
pub fn project() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The `stillpoint` program; its plugin stands beside it.
pub fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| match std::env::var_os("STILLPOINT_TEST_PROGRAM") {
        Some(program) => given(PathBuf::from(program)),
        None => build(),
    })
}

fn given(program: PathBuf) -> PathBuf {
    let plugin = program.with_file_name("libstillpoint_plugin.so");
    assert!(
        program.is_file() && plugin.is_file(),
        "STILLPOINT_TEST_PROGRAM: {} or {} is missing",
        program.display(),
        plugin.display()
    );
    program.canonicalize().expect("it is there")
}

fn build() -> PathBuf {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").to_owned());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--message-format=json", "-p", "stillpoint", "-p", "stillpoint-plugin"])
        .current_dir(project());
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(output.status.success(), "stillpoint and its plugin do not build; see above");
    let text = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
    let messages =
        text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs =
        messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.find(|path| path.ends_with("stillpoint")).expect("cargo names what it has built")
}
