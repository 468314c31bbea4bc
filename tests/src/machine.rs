//! One machine under test, started or restored: its QEMU, its helper, its witness.

use crate::images::read_image;
use crate::lab::{Lab, Ran};
use crate::process::{self, Pid, wait_until};
use crate::qmp::QmpClient;
use crate::recipe::Recipe;
use crate::witness::{self, Line};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

/// A guest needs 4 to 8 seconds to boot on two free cores; nothing else takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(90);
/// Lines come once a second, steps ten times a second, and a busy host is late.
const STEPS_BETWEEN_LINES: u64 = 15;

/// What `stillpoint checkpoint --json` says, as far as tests look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Outcome {
    pub id: u64,
    pub parent: Option<u64>,
    pub kind: String,
    pub pause_ms: f64,
    pub pages_dirty: u64,
    pub bytes_changed: u64,
    pub bytes_stored_raw: u64,
    pub bytes_stored: u64,
    pub layer_bytes_stored: u64,
    pub durable_ms: f64,
    pub replicas: Option<u16>,
    pub notes: Vec<String>,
}

/// A checkpoint, and the guest's last steps that were seen before and after it.
#[derive(Clone, Debug)]
pub struct Taken {
    /// NAME@ID.
    pub name: String,
    pub outcome: Outcome,
    before: u64,
    after: u64,
}

/// Ended when dropped.
pub struct TestMachine<'lab> {
    pub name: String,
    /// QEMU's working directory.
    pub directory: PathBuf,
    /// What `stillpoint restore --json` said; null for a machine that was started.
    pub report: Value,
    lab: &'lab Lab,
    qemu: Pid,
    /// None when `stillpoint restore` started it.
    child: Option<Child>,
}

impl<'lab> TestMachine<'lab> {
    pub(crate) fn start(lab: &'lab Lab, name: &str, recipe: &Recipe, environment: &[(&str, &str)]) -> Self {
        let directory = lab.path().join(name);
        std::fs::create_dir_all(&directory).expect("the test's directory");
        recipe.furnish(&lab.qemu, &directory);
        let log = File::create(directory.join("qemu.out")).expect("the test's directory");
        let mut command = lab.command(&["run", "--name", name, "--"]);
        command.args(recipe.command_line(&lab.qemu)).envs(environment.iter().copied()).current_dir(&directory);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
        let child = command.spawn().expect("stillpoint can be run");
        let qemu = Pid::from_raw(child.id() as i32);
        let mut machine = Self { name: name.to_owned(), directory, report: Value::Null, lab, qemu, child: Some(child) };
        machine.wait_for_qemu();
        machine
    }

    pub(crate) fn restore(lab: &'lab Lab, checkpoint: &str, new_name: &str, more: &[&str]) -> Self {
        let directory = lab.fresh_directory(new_name);
        let qemu = lab.qemu.to_str().expect("UTF-8");
        let mut words = vec!["restore", checkpoint, "--json", "--qemu", qemu, "--dir", directory.to_str().expect("UTF-8")];
        if checkpoint.split('@').next() != Some(new_name) {
            words.extend(["--as", new_name]);
        }
        words.extend(more);
        let ran = lab.run(&words);
        let mut machine = Self { name: new_name.to_owned(), directory, report: Value::Null, lab, qemu: Pid::from_raw(0), child: None };
        match machine.peer() {
            // Even after a failure, so that it is ended.
            Some(pid) => machine.qemu = pid,
            None => assert_ne!(ran.code, 0, "restore succeeded, but no QEMU answers"),
        }
        machine.report = ran.expect_success().json();
        machine
    }

    fn wait_for_qemu(&mut self) {
        let up = wait_until(PATIENCE, || self.peer().is_some() || !self.qemu_runs());
        assert!(up && self.qemu_runs(), "{} did not start: {}", self.name, self.said());
    }

    fn peer(&self) -> Option<Pid> {
        process::listener(&self.runtime_file("plugin.sock"))
    }

    fn runtime_file(&self, name: &str) -> PathBuf {
        self.lab.runtime().join(&self.name).join(name)
    }

    /// What QEMU, the launcher and the helper have said: for messages of failed tests.
    fn said(&self) -> String {
        let files = [self.directory.join("qemu.out"), self.runtime_file("qemu.log"), self.runtime_file("helper.log")];
        let texts = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
        texts
            .map(|text| text.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    // ---- the guest

    pub fn qemu_runs(&self) -> bool {
        process::is_running(self.qemu)
    }

    pub fn lines(&self) -> Vec<Line> {
        witness::lines(&self.directory.join("serial.log"))
    }

    /// The last line, once there is one that fits. Panics on a contradiction, and when QEMU ends.
    pub fn wait_for_line(&self, what: &str, fits: impl Fn(&Line) -> bool) -> Line {
        let mut hit = None;
        let done = wait_until(PATIENCE, || {
            hit = self.lines().pop().filter(|line| fits(line));
            hit.is_some() || !self.qemu_runs()
        });
        self.assert_no_contradiction();
        assert!(done && hit.is_some(), "{}: {what} never came; last {:?}\n{}", self.name, self.lines().last(), self.said());
        hit.expect("just checked")
    }

    pub fn assert_no_contradiction(&self) {
        let found = witness::contradictions(&self.directory.join("serial.log"));
        assert!(
            found.is_empty(),
            "{} is not what it was: {} contradictions, first {:#?}",
            self.name,
            found.len(),
            &found[..found.len().min(3)]
        );
    }

    /// The guest is up and has worked a little.
    pub fn wait_for_witness(&self) -> Line {
        self.wait_for_line("the witness", |line| line.passes >= 1)
    }

    /// The guest takes further steps.
    pub fn assert_goes_on(&self) {
        let now = self.lines().len();
        let more = wait_until(PATIENCE, || self.lines().len() > now + 1 || !self.qemu_runs());
        self.assert_no_contradiction();
        assert!(more && self.qemu_runs(), "{}: the guest stands still\n{}", self.name, self.said());
    }

    /// This restored machine goes on where the checkpoint was taken, and all of its memory and disks are right: the
    /// witness has walked over the whole table twice.
    pub fn assert_continues(&self, taken: &Taken) {
        let first = self.wait_for_line("a first line", |_| true);
        let first = self.lines().into_iter().next().unwrap_or(first);
        let expected = taken.before + 1..=taken.after + STEPS_BETWEEN_LINES;
        assert!(expected.contains(&first.step), "{}: went on with step {}, {expected:?} was expected", self.name, first.step);
        let last = self.wait_for_line("two passes", |line| line.passes >= first.passes + 2);
        assert!(last.is_ok && last.contradictions == 0, "{}: {last:?}", self.name);
        assert!(last.disks.iter().all(|disk| *disk == last.step), "{}: {last:?}", self.name);
    }

    /// The monitor that every recipe has besides the helper's.
    pub fn qmp(&self) -> QmpClient {
        QmpClient::connect(&self.directory.join("extra.sock"))
    }

    /// What a drive holds. Where a restored machine has its disks is its own affair: QEMU says.
    pub fn disk(&self, drive: &str) -> Vec<u8> {
        let all = self.qmp().execute("query-block", json!({}));
        let hit = all.as_array().into_iter().flatten().find(|block| block["device"] == drive);
        let inserted = &hit.unwrap_or_else(|| panic!("no drive {drive} in {all}"))["inserted"];
        let (file, format) = (inserted["file"].as_str().expect("a file"), inserted["drv"].as_str().expect("a format"));
        read_image(&self.lab.qemu, &self.directory.join(file), format)
    }

    // ---- the helper

    pub fn try_checkpoint(&self) -> Ran {
        self.lab.run(&["checkpoint", &self.name, "--json"])
    }

    /// A checkpoint that must succeed.
    pub fn checkpoint(&self) -> Taken {
        let step = || self.lines().last().map_or(0, |line| line.step);
        let before = step();
        let ran = self.try_checkpoint();
        assert_eq!(ran.code, 0, "checkpoint of {}: {}\n{}", self.name, ran.err, self.said());
        let outcome: Outcome = serde_json::from_value(ran.json()).expect("the documented form");
        Taken { name: format!("{}@{}", self.name, outcome.id), outcome, before, after: step() }
    }

    /// The helper's process, if it runs.
    pub fn helper(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.runtime_file("helper.pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        (process::is_running(pid) && process::is_ours(pid, &self.lab.runtime())).then_some(pid)
    }

    pub fn kill_helper(&self) {
        if let Some(pid) = self.helper() {
            process::kill_hard(pid);
        }
    }

    pub fn attach(&self) {
        self.attach_with(&[], &[]);
    }

    pub fn attach_with(&self, words: &[&str], environment: &[(&str, &str)]) {
        let words = [&["attach", &self.name], words].concat();
        let ran = self.lab.run_with(&words, environment);
        assert_eq!(ran.code, 0, "{}{}", ran.err, self.said());
    }

    // ---- the end

    /// SIGKILL for the helper and QEMU, as when the power fails.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.kill_helper();
        if let Some(mut child) = self.child.take() {
            // Ours until it is waited for, so the number cannot be another's.
            let _ = child.kill();
            let _ = child.wait();
        } else if self.qemu.as_raw() > 0 && process::is_ours(self.qemu, &self.lab.runtime()) {
            process::kill_hard(self.qemu);
        }
    }
}

impl Drop for TestMachine<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} has said:\n{}\n---", self.name, self.said());
        }
        self.end();
    }
}
