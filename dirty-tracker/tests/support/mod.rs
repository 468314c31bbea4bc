//! What the tests share: the built plugin, and a process that stands in for QEMU.

#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use checkpoint_format::{CheckpointId, CheckpointRef, DurableReceipt, PageIndex, PageSet};
use dirty_tracker::{
    BlockId, BlockMemory, DirtyClaim, GuestMemory, PluginHandles, TrackedBlock, Tracker,
};
use tempfile::TempDir;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// The plugin and the stand-in, as cargo builds them.
pub(crate) struct Built {
    pub plugin: PathBuf,
    pub stand_in: PathBuf,
}

/// Builds both once per test program; when they are up to date this takes a tenth of a second.
pub(crate) fn built() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| {
        let artifacts = cargo_build();
        let find = |wanted: &dyn Fn(&Path) -> bool| {
            let found = artifacts.iter().find(|path| wanted(path));
            found.expect("cargo reports what it has built").clone()
        };
        Built {
            plugin: find(&|path| path.extension().is_some_and(|extension| extension == "so")),
            stand_in: find(&|path| path.file_name().is_some_and(|name| name == "stand-in")),
        }
    })
}

fn cargo_build() -> Vec<PathBuf> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").to_owned());
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/plugin/Cargo.toml");
    let mut command = Command::new(cargo);
    command.args([
        "build",
        "--lib",
        "--example",
        "stand-in",
        "--message-format=json",
        "--manifest-path",
        manifest,
    ]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(output.status.success(), "the plugin does not build");
    let text = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
    let messages =
        text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages.flat_map(|message| paths_in(&message)).collect()
}

fn paths_in(message: &serde_json::Value) -> Vec<PathBuf> {
    let files = message["filenames"].as_array().into_iter().flatten();
    files.filter_map(|path| path.as_str().map(PathBuf::from)).collect()
}

/// Inheriting a descriptor is a matter of the whole process: one start at a time.
static STARTING: Mutex<()> = Mutex::new(());

/// A process with the plugin in it, some shared memory and some private memory. Killed on drop.
pub(crate) struct StandIn {
    pub memory: GuestMemory,
    pub socket: PathBuf,
    pub private_address: u64,
    pub shared_address: u64,
    pub private_pages: u64,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    dir: TempDir,
}

impl StandIn {
    pub(crate) fn start(shared_pages: u64, private_pages: u64) -> Self {
        let dir = TempDir::new().expect("a directory");
        Self::start_in(dir, shared_pages, private_pages)
    }

    pub(crate) fn start_in(dir: TempDir, shared_pages: u64, private_pages: u64) -> Self {
        let memory = GuestMemory::create("ram", shared_pages * PAGE).expect("memory");
        let socket = dir.path().join("plugin.sock");
        let mut child = spawn(&memory, &socket, shared_pages, private_pages);
        let input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = output.next().expect("an answer").expect("a line");
        let mut addresses =
            ready.strip_prefix("ready ").unwrap_or_else(|| panic!("{ready}")).split(' ');
        let mut address = || u64::from_str_radix(addresses.next().expect("two"), 16).expect("hex");
        let (shared_address, private_address) = (address(), address());
        Self {
            memory,
            socket,
            private_address,
            shared_address,
            private_pages,
            child,
            input,
            output,
            dir,
        }
    }

    /// What the plugin's install function returns when its socket is `socket`.
    pub(crate) fn try_socket(socket: &Path) -> String {
        let memory = GuestMemory::create("ram", PAGE).expect("memory");
        let output = spawn(&memory, socket, 1, 1).wait_with_output().expect("it ends");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Sends one line and returns the answer.
    pub(crate) fn tell(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").expect("it listens");
        self.output.next().expect("it answers").expect("text")
    }

    pub(crate) fn act(&mut self, operation: char, memory: char, pages: &[u64]) {
        let mut line = format!("{operation} {memory}");
        for page in pages {
            line += &format!(" {page}");
        }
        assert_eq!(self.tell(&line), "ok", "{line}");
    }

    pub(crate) fn write(&mut self, memory: char, pages: &[u64]) {
        self.act('w', memory, pages);
    }

    pub(crate) fn handles(&self) -> PluginHandles {
        PluginHandles::connect(&self.socket, TIMEOUT).expect("the plugin answers")
    }

    pub(crate) fn blocks(&self) -> Vec<TrackedBlock> {
        vec![
            TrackedBlock {
                name: "shared".into(),
                host_address: self.shared_address,
                bytes: self.memory.len(),
                memory: BlockMemory::Shared(self.memory.clone()),
            },
            TrackedBlock {
                name: "private".into(),
                host_address: self.private_address,
                bytes: self.private_pages * PAGE,
                memory: BlockMemory::Private,
            },
        ]
    }

    /// The same with holes watched, as for a VM with a balloon.
    pub(crate) fn attach_watching(&self) -> (Tracker, BlockId, BlockId) {
        let (mut tracker, shared, private) = self.attach();
        tracker.watch_holes().expect("holes can be watched");
        (tracker, shared, private)
    }

    /// A tracker, and the numbers of the shared and the private RAM block.
    pub(crate) fn attach(&self) -> (Tracker, BlockId, BlockId) {
        let tracker = Tracker::attach(self.handles(), self.blocks()).expect("tracking starts");
        let (shared, private) =
            (tracker.find("shared").expect("there"), tracker.find("private").expect("there"));
        (tracker, shared, private)
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(memory: &GuestMemory, socket: &Path, shared_pages: u64, private_pages: u64) -> Child {
    let Built { plugin, stand_in } = built();
    let _one_at_a_time = STARTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    memory.set_inheritable(true).expect("ours");
    let child = Command::new(stand_in)
        .args([plugin.as_path(), socket])
        .args([memory.raw_fd().to_string(), shared_pages.to_string(), private_pages.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the stand-in starts");
    memory.set_inheritable(false).expect("ours");
    child
}

/// The page numbers of a set.
pub(crate) fn numbers(pages: &PageSet) -> Vec<u64> {
    pages.iter().map(PageIndex::get).collect()
}

/// The checkpoint that the tests' claims are for.
pub(crate) fn checkpoint() -> CheckpointRef {
    CheckpointRef { vm: "test".parse().expect("a name"), id: CheckpointId(1) }
}

/// Acknowledges a claim for it, without a store.
#[expect(clippy::disallowed_methods, reason = "a receipt without a store")]
pub(crate) fn acknowledge(claim: DirtyClaim) {
    claim.acknowledge(&DurableReceipt::of_commit(checkpoint())).expect("the same checkpoint");
}
