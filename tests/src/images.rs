//! Disk images from outside QEMU.

use std::path::Path;
use std::process::Command;

/// Runs the qemu-img beside `qemu`, or the one on the PATH.
pub fn qemu_img(qemu: &Path, directory: &Path, arguments: &[&str]) {
    let beside = qemu.with_file_name("qemu-img");
    let program = if beside.exists() { beside } else { "qemu-img".into() };
    let output = Command::new(program).args(arguments).current_dir(directory).output();
    let output = output.expect("qemu-img can be run; scripts/install-deps installs it");
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What an image holds, also while a QEMU has it open.
pub fn read_image(qemu: &Path, image: &Path, format: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image.to_str().expect("UTF-8");
    qemu_img(qemu, directory.path(), &["convert", "-U", "-f", format, "-O", "raw", path, "raw"]);
    std::fs::read(directory.path().join("raw")).expect("qemu-img wrote it")
}
