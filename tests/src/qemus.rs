//! Which QEMUs to test with.

use std::path::{Path, PathBuf};
use std::process::Command;

const DEFAULTS: &[&str] =
    &["/usr/bin/qemu-system-x86_64", "/opt/stillpoint/qemu-10.0/usr/bin/qemu-system-x86_64"];

/// STILLPOINT_TEST_QEMUS, else the versions that scripts/install-deps puts side by side, oldest
/// first.
pub fn qemus() -> Vec<PathBuf> {
    let listed = std::env::var("STILLPOINT_TEST_QEMUS").ok();
    let names: Vec<PathBuf> = match &listed {
        Some(list) => list.split(':').map(PathBuf::from).collect(),
        None => DEFAULTS.iter().map(PathBuf::from).collect(),
    };
    let missing: Vec<&PathBuf> = names.iter().filter(|path| !path.exists()).collect();
    assert!(
        missing.is_empty(),
        "{missing:?} not found: run scripts/install-deps, or name others in STILLPOINT_TEST_QEMUS"
    );
    names
}

/// For tests of what does not depend on the version.
pub fn newest_qemu() -> PathBuf {
    qemus().pop().expect("at least one is named")
}

/// 7 of 7.2.22.
pub fn major_version(qemu: &Path) -> u32 {
    let output = Command::new(qemu).arg("--version").output().expect("QEMU can be run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number =
        text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no version in {text}"))
}

/// How the stream engine can get memory of one instant from it, under TCG. Before 9.0 a live
/// migration of a TCG guest loses pages, and a guest can hang when the reader of a background
/// snapshot ends: both are refused.
pub fn stream_modes(qemu: &Path) -> &'static [&'static str] {
    if major_version(qemu) >= 9 { &["pre-copy", "background-snapshot"] } else { &["stopped"] }
}

/// Runs a test body with every QEMU, side by side as far as VMs may run at once; a failure names
/// its QEMU.
pub fn on_each_qemu(body: impl Fn(&Path) + Sync) {
    let body = &body;
    let failed: Vec<PathBuf> = std::thread::scope(|scope| {
        let runs: Vec<_> = qemus()
            .into_iter()
            .map(|qemu| (qemu.clone(), scope.spawn(move || body(&qemu))))
            .collect();
        runs.into_iter().filter_map(|(qemu, run)| run.join().is_err().then_some(qemu)).collect()
    });
    assert!(failed.is_empty(), "failed with {failed:?}; see above");
}
