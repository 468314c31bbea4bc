//! Where a test takes place: a directory, a store in it, and the right to run so many VMs.

use crate::built::built;
use crate::process;
use crate::recipe::Recipe;
use crate::slots::{Slots, shared_directory};
use crate::vm::TestVm;
use checkpoint_format::CheckpointId;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that any one command may take: a hanging store is given up after two minutes.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);

pub struct Lab {
    directory: TempDir,
    pub qemu: PathBuf,
    store: String,
    environment: Vec<(String, String)>,
    // After the directory: fields are dropped in order, and the slots must be released last.
    _slots: Slots,
}

impl Lab {
    /// A place for a test that has one VM at a time.
    pub fn new(qemu: &Path) -> Self {
        Self::for_vms(qemu, 1)
    }

    /// Waits until so many VMs may run.
    pub fn for_vms(qemu: &Path, count: usize) -> Self {
        let slots = Slots::take(count);
        let directory =
            tempfile::Builder::new().prefix("stillpoint-").tempdir().expect("a directory");
        let store = format!("file://{}/store", directory.path().display());
        // What a QEMU binary is need not be found out by every test.
        let cache = shared_directory().join("cache");
        let mut lab = Self {
            directory,
            qemu: qemu.to_owned(),
            store,
            environment: Vec::new(),
            _slots: slots,
        };
        lab.set("STILLPOINT_RUNTIME_DIR", lab.runtime().display().to_string());
        lab.set("STILLPOINT_FLEECING_DIR", lab.path().display().to_string());
        lab.set("STILLPOINT_CACHE_DIR", cache.display().to_string());
        // A helper that a test kills stays away, unless the test says otherwise.
        lab.set("STILLPOINT_NO_SUPERVISOR", "yes".to_owned());
        lab
    }

    pub fn with_store(mut self, url: &str) -> Self {
        url.clone_into(&mut self.store);
        self
    }

    /// A variable for every command from now on.
    pub fn set(&mut self, name: &str, value: String) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value));
    }

    /// From now on a helper that dies is followed by another, as by default.
    pub fn with_supervisor(&mut self) {
        self.environment.retain(|(known, _)| known != "STILLPOINT_NO_SUPERVISOR");
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn store(&self) -> &str {
        &self.store
    }

    /// The store's directory, where it is one.
    pub fn store_directory(&self) -> PathBuf {
        PathBuf::from(self.store.strip_prefix("file://").expect("a store in a directory"))
    }

    /// A name in the lab that was not used before; nothing is there yet.
    pub fn fresh_directory(&self, name: &str) -> PathBuf {
        let names = (1..).map(|number| self.path().join(format!("{name}-{number}")));
        names.into_iter().find(|path| !path.exists()).expect("numbers do not end")
    }

    pub fn runtime(&self) -> PathBuf {
        self.path().join("run")
    }

    /// Starts a VM and its helper; its directory is named as it is.
    pub fn start(&self, name: &str, recipe: &Recipe) -> TestVm<'_> {
        TestVm::start(self, name, recipe, &[])
    }

    /// The same with more environment, for the helper too.
    pub fn start_with(
        &self,
        name: &str,
        recipe: &Recipe,
        environment: &[(&str, &str)],
    ) -> TestVm<'_> {
        TestVm::start(self, name, recipe, environment)
    }

    /// Starts QEMU by its own command line, without `stillpoint`: an external VM.
    pub fn start_plain(&self, name: &str, recipe: &Recipe) -> TestVm<'_> {
        TestVm::start_plain(self, name, recipe)
    }

    /// Restores NAME or NAME@ID as VM `new_name`, in a fresh directory.
    pub fn restore(&self, checkpoint: &str, new_name: &str, more: &[&str]) -> TestVm<'_> {
        TestVm::restore(self, checkpoint, new_name, more)
    }

    /// `stillpoint` with this lab's variables.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(built());
        command.args(words).current_dir(self.path()).env("STILLPOINT_STORE", &self.store);
        for name in ["STILLPOINT_DIE_AT", "STILLPOINT_NAME", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().cloned());
        command
    }

    pub fn run(&self, words: &[&str]) -> Ran {
        self.run_with(words, &[])
    }

    pub fn run_with(&self, words: &[&str], environment: &[(&str, &str)]) -> Ran {
        let mut command = self.command(words);
        command.envs(environment.iter().copied());
        Ran::of(command, &words.join(" "))
    }

    /// The same where there may be no store yet.
    pub fn list_if_any(&self, name: &str) -> Vec<CheckpointId> {
        if self.store_directory().join("store.json").exists() {
            self.list(name)
        } else {
            Vec::new()
        }
    }

    /// Ids of the checkpoints that a VM has in the store; a VM without any is an error of the
    /// command.
    pub fn list(&self, name: &str) -> Vec<CheckpointId> {
        let listed = self.run(&["ls", name, "--json"]);
        if listed.code == 1 && listed.err.contains("no checkpoint") {
            return Vec::new();
        }
        let listed = listed.expect_success().json();
        let rows = listed["checkpoints"].as_array().expect("a list").iter();
        rows.map(|row| CheckpointId(row["id"].as_u64().expect("a number"))).collect()
    }

    /// Neither a QEMU nor a helper of that name answers.
    pub fn nothing_runs(&self, name: &str) -> bool {
        let socket = |file: &str| {
            std::os::unix::net::UnixStream::connect(self.runtime().join(name).join(file))
        };
        ["plugin.sock", "control.sock"].iter().all(|file| socket(file).is_err())
    }

    /// `STILLPOINT_TEST_KEEP=failed`: if the test fails; any other value: always.
    fn is_kept(&self) -> bool {
        std::env::var("STILLPOINT_TEST_KEEP")
            .is_ok_and(|which| which != "failed" || std::thread::panicking())
    }

    /// Reads back all that the VM has in the store.
    pub fn verify(&self, name: &str) {
        let report = self.run(&["verify", name, "--json"]).expect_success().json();
        assert_eq!(report["ok"], true, "{report}");
    }
}

impl Drop for Lab {
    /// VMs that a failed test did not expect to run.
    fn drop(&mut self) {
        process::qemus_below(self.path()).into_iter().for_each(process::kill_hard);
        let runtime = self.runtime();
        let vms = std::fs::read_dir(&runtime).into_iter().flatten().flatten();
        for vm in vms.map(|entry| entry.path()) {
            for socket in ["control.sock", "plugin.sock"] {
                let pid = process::listener(&vm.join(socket))
                    .filter(|pid| process::is_ours(*pid, &runtime));
                pid.into_iter().for_each(process::kill_hard);
            }
        }
        if self.is_kept() {
            eprintln!("STILLPOINT_TEST_KEEP: {} is kept", self.path().display());
            self.directory.disable_cleanup(true);
        }
    }
}

/// How a command went.
#[derive(Debug)]
pub struct Ran {
    pub what: String,
    pub code: i32,
    pub out: String,
    pub err: String,
    pub time: Duration,
}

impl Ran {
    /// Runs to the end. Output goes to files: a VM that the command leaves behind may hold them
    /// open.
    pub fn of(mut command: Command, what: &str) -> Self {
        let files = [
            tempfile::NamedTempFile::new().expect("a file"),
            tempfile::NamedTempFile::new().expect("a file"),
        ];
        let open = |number: usize| Stdio::from(File::create(files[number].path()).expect("a file"));
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(open(0))
            .stderr(open(1))
            .spawn()
            .expect("stillpoint can be run");
        let read = |number: usize| {
            String::from_utf8_lossy(&std::fs::read(files[number].path()).unwrap_or_default())
                .into_owned()
        };
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child") {
                break status;
            }
            if begun.elapsed() > COMMAND_TIMEOUT {
                let _ = child.kill();
                let _ = child.wait();
                panic!("stillpoint {what} hangs; it said: {}", read(1));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let ran = Self {
            what: what.to_owned(),
            code: status.code().unwrap_or(-1),
            out: read(0),
            err: read(1),
            time: begun.elapsed(),
        };
        assert!(!ran.err.contains("panicked at"), "stillpoint {what} panicked: {}", ran.err);
        ran
    }

    pub fn expect_success(self) -> Self {
        assert_eq!(self.code, 0, "stillpoint {}: {}", self.what, self.err);
        self
    }

    /// It failed with this code; its message.
    pub fn expect_failure(self, code: i32) -> String {
        assert_eq!(self.code, code, "stillpoint {}: {}{}", self.what, self.out, self.err);
        format!("{}{}", self.out, self.err)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("stillpoint {}: {error} in {}", self.what, self.out))
    }
}
