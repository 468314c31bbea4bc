//! Real QEMUs for the tests: which ones, how to start one, and that none is left behind.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod loop_guest;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use checkpoint_format::{CheckpointId, CheckpointRef, DurableReceipt};
use qmp_bridge::Qmp;
use qmp_bridge::capture::CapturedDisks;
use tempfile::TempDir;

const DEFAULTS: [&str; 2] =
    ["/usr/bin/qemu-system-x86_64", "/opt/stillpoint/qemu-10.0/usr/bin/qemu-system-x86_64"];

/// The QEMUs to test with: STILLPOINT_TEST_QEMUS, colon separated, else the two that
/// scripts/install-deps installs.
pub(crate) fn qemus() -> Vec<PathBuf> {
    let listed = std::env::var("STILLPOINT_TEST_QEMUS").ok();
    let names: Vec<PathBuf> = match &listed {
        Some(list) => list.split(':').map(PathBuf::from).collect(),
        None => DEFAULTS.iter().map(PathBuf::from).collect(),
    };
    let found: Vec<PathBuf> = names.iter().filter(|path| path.exists()).cloned().collect();
    let enough = listed.is_some() && found.len() == names.len() || found.len() >= DEFAULTS.len();
    assert!(enough, "found only {found:?} of {names:?}: run scripts/install-deps");
    found
}

/// Runs a test body with each QEMU, naming it before, so that a failure tells which.
pub(crate) async fn with_each_qemu<F: AsyncFn(PathBuf)>(body: F) {
    for qemu in qemus() {
        eprintln!("--- {}", qemu.display());
        body(qemu).await;
    }
}

/// Checkpoint `id` of the VM under test.
pub(crate) fn checkpoint(id: u64) -> CheckpointRef {
    CheckpointRef { vm: "test".parse().expect("a name"), id: CheckpointId(id) }
}

/// What a store would say of it.
#[expect(clippy::disallowed_methods, reason = "a receipt without a store")]
pub(crate) fn receipt(id: u64) -> DurableReceipt {
    DurableReceipt::of_commit(checkpoint(id))
}

/// As after the commit of its checkpoint.
pub(crate) async fn acknowledge(captured: CapturedDisks) {
    let receipt = receipt(captured.checkpoint().id.0);
    captured.acknowledge(&receipt).await.expect("acknowledge");
}

/// Whose the connections are.
pub(crate) const INSTANCE: &str = "test-1";

/// One QEMU and its directory; dropping kills it.
pub(crate) struct TestQemu {
    pub qmp: Qmp,
    child: Child,
    pub directory: TempDir,
}

impl TestQemu {
    pub(crate) async fn start(binary: &Path, arguments: &[&str]) -> Self {
        Self::start_in(binary, arguments, tempfile::tempdir().expect("directory")).await
    }

    /// Starts it with `directory` as its working directory.
    pub(crate) async fn start_in(binary: &Path, arguments: &[&str], directory: TempDir) -> Self {
        let log = std::fs::File::create(directory.path().join("qemu.log")).expect("log");
        let child = Command::new(binary)
            .args(["-nodefaults", "-display", "none", "-qmp", "unix:qmp.sock,server=on,wait=off"])
            .args(["-qmp", "unix:second.sock,server=on,wait=off"])
            .args(arguments)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("start QEMU");
        let connected =
            Qmp::connect(directory.path().join("qmp.sock"), Duration::from_secs(20)).await;
        let log = || std::fs::read_to_string(directory.path().join("qemu.log")).unwrap_or_default();
        let qmp =
            connected.unwrap_or_else(|error| panic!("{error}\n{}", log())).for_instance(INSTANCE);
        Self { qmp, child, directory }
    }

    /// A connection that has nothing to do with the first: the view of another helper.
    pub(crate) async fn second(&self) -> Qmp {
        let socket = self.path("second.sock");
        Qmp::connect(socket, Duration::from_secs(5))
            .await
            .expect("second connection")
            .for_instance(INSTANCE)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("qemu.log")).unwrap_or_default()
    }

    /// Writes into a drive as a guest would. Through the drive, not its node: a capture puts a
    /// filter between them.
    pub(crate) async fn write_disk(&self, drive: &str, pattern: u8, offset: u64, length: u64) {
        self.qemu_io(drive, &format!("write -P {pattern:#x} {offset} {length}")).await;
    }

    /// QEMU prints the outcome to its own output; a write that failed shows when the disk is
    /// compared.
    pub(crate) async fn qemu_io(&self, drive: &str, command: &str) {
        let text = self.qmp.hmp(&format!("qemu-io {drive} \"{command}\"")).await.expect("hmp");
        assert!(text.trim().is_empty(), "{command}: {text}");
    }
}

impl Drop for TestQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes an image with the qemu-img beside `qemu`, or the one on the PATH.
pub(crate) fn qemu_img(qemu: &Path, directory: &Path, arguments: &[&str]) {
    let beside = qemu.with_file_name("qemu-img");
    let program = if beside.exists() { beside } else { "qemu-img".into() };
    let status =
        Command::new(program).args(arguments).current_dir(directory).stdout(Stdio::null()).status();
    assert!(status.expect("run qemu-img").success(), "qemu-img {arguments:?}");
}
