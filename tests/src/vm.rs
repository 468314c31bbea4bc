//! One VM under test: its guest, and the helper beside it. Started by `stillpoint run`, restored,
//! or plain: by QEMU alone.

use crate::guest::{Guest, TIMEOUT};
use crate::lab::{Lab, Ran};
use crate::process::{self, Pid, wait_until};
use crate::recipe::Recipe;
use crate::taken::Taken;
use serde_json::Value;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Ended when dropped.
pub struct TestVm<'lab> {
    pub(crate) guest: Guest,
    /// What `stillpoint restore --json` or `stillpoint adopt --json` said; null for a VM that was
    /// started.
    pub report: Value,
    pub(crate) lab: &'lab Lab,
    /// None when `stillpoint restore` started it.
    child: Option<Child>,
}

impl Deref for TestVm<'_> {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl<'lab> TestVm<'lab> {
    fn new(lab: &'lab Lab, name: &str, directory: PathBuf) -> Self {
        let runtime = lab.runtime().join(name);
        let logs =
            vec![directory.join("qemu.out"), runtime.join("qemu.log"), runtime.join("helper.log")];
        Self {
            guest: Guest::new(name, directory, &lab.qemu, logs),
            report: Value::Null,
            lab,
            child: None,
        }
    }

    pub(crate) fn start(
        lab: &'lab Lab,
        name: &str,
        recipe: &Recipe,
        environment: &[(&str, &str)],
    ) -> Self {
        let mut vm = Self::furnished(lab, name, recipe);
        let mut command = lab.command(&["run", "--name", name, "--"]);
        command.args(recipe.command_line(&lab.qemu)).envs(environment.iter().copied());
        vm.spawn(command);
        vm.wait_for("QEMU's plugin", |vm| vm.peer().is_some());
        vm
    }

    /// An external QEMU: no launcher, no plugin, no helper, and RAM as the recipe says.
    pub(crate) fn start_plain(lab: &'lab Lab, name: &str, recipe: &Recipe) -> Self {
        let mut vm = Self::furnished(lab, name, recipe);
        let words = recipe.plain_command_line(&lab.qemu);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        vm.spawn(command);
        // QEMU opens this socket last; only the helper connects to it.
        let monitor = vm.directory.join("qmp.sock");
        vm.wait_for("QEMU's monitor", |_| monitor.exists());
        vm
    }

    fn furnished(lab: &'lab Lab, name: &str, recipe: &Recipe) -> Self {
        let directory = lab.path().join(name);
        std::fs::create_dir_all(&directory).expect("the test's directory");
        recipe.furnish(&lab.qemu, &directory);
        Self::new(lab, name, directory)
    }

    fn spawn(&mut self, mut command: Command) {
        let log = File::create(self.directory.join("qemu.out")).expect("the test's directory");
        command
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log);
        let child = command.spawn().expect("the program can be run");
        self.guest.qemu = Pid::from_raw(child.id().cast_signed());
        self.child = Some(child);
    }

    pub(crate) fn restore(lab: &'lab Lab, checkpoint: &str, new_name: &str, more: &[&str]) -> Self {
        let directory = lab.fresh_directory(new_name);
        let qemu = lab.qemu.to_str().expect("UTF-8");
        let mut words = vec![
            "restore",
            checkpoint,
            "--json",
            "--qemu",
            qemu,
            "--dir",
            directory.to_str().expect("UTF-8"),
        ];
        if checkpoint.split('@').next() != Some(new_name) {
            words.extend(["--as", new_name]);
        }
        // Most tests look at what is there when the command has ended.
        if !more.contains(&"--lazy") {
            words.push("--eager");
        }
        words.extend(more);
        let ran = lab.run(&words);
        let mut vm = Self::new(lab, new_name, directory.clone());
        match vm.peer() {
            // Even after a failure, so that it is ended.
            Some(pid) => vm.guest.qemu = pid,
            None => assert_ne!(ran.code, 0, "restore succeeded, but no QEMU answers"),
        }
        vm.report = ran.expect_success().json();
        vm
    }

    fn wait_for(&self, what: &str, mut up: impl FnMut(&Self) -> bool) {
        let up = wait_until(TIMEOUT, || up(self) || !self.qemu_runs());
        assert!(
            up && self.qemu_runs(),
            "{} did not start, {what} does not answer: {}",
            self.name,
            self.said()
        );
    }

    fn peer(&self) -> Option<Pid> {
        process::listener(&self.runtime_file("plugin.sock"))
    }

    pub(crate) fn runtime_file(&self, name: &str) -> PathBuf {
        self.lab.runtime().join(&self.name).join(name)
    }

    // ---- the helper

    pub fn try_checkpoint(&self) -> Ran {
        self.try_checkpoint_with(&[])
    }

    pub fn try_checkpoint_with(&self, words: &[&str]) -> Ran {
        self.lab.run(&[&["checkpoint", &self.name, "--json"], words].concat())
    }

    /// A checkpoint that must succeed.
    pub fn checkpoint(&self) -> Taken {
        self.checkpoint_with(&[])
    }

    pub fn checkpoint_with(&self, words: &[&str]) -> Taken {
        let before = self.step();
        let ran = self.try_checkpoint_with(words);
        assert_eq!(ran.code, 0, "checkpoint of {}: {}\n{}", self.name, ran.err, self.said());
        let outcome: engine::checkpoint::outcome::Outcome =
            serde_json::from_value(ran.json()).expect("the documented form");
        Taken { name: format!("{}@{}", self.name, outcome.id), outcome, before, after: self.step() }
    }

    /// The helper's process, if it runs.
    pub fn helper(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.runtime_file("helper.pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        (process::is_running(pid) && process::is_ours(pid, &self.lab.runtime())).then_some(pid)
    }

    /// The same of a VM that has just been started: its helper comes up beside it.
    pub fn wait_for_helper(&self) -> Pid {
        self.wait_for("its helper", |vm| vm.helper().is_some());
        self.helper().expect("it runs")
    }

    /// The process that would replace the helper.
    pub fn supervisor(&self) -> Option<Pid> {
        process::parent(self.helper()?).filter(|pid| process::is_ours(*pid, &self.lab.runtime()))
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

    /// SIGKILL for QEMU alone; waits until it is gone.
    pub fn kill_qemu(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Ours until it is waited for, so the number cannot be another's.
            let _ = child.kill();
            let _ = child.wait();
        }
        self.end_other_qemu();
    }

    fn end_other_qemu(&self) {
        if self.qemu.as_raw() > 0 && process::belongs_to(self.qemu, &self.places()) {
            process::kill_hard(self.qemu);
        }
    }

    fn places(&self) -> [&Path; 2] {
        [self.lab.path(), &self.directory]
    }

    fn end(&mut self) {
        self.supervisor().into_iter().for_each(process::kill_hard);
        self.kill_helper();
        self.kill_qemu();
    }
}

impl Drop for TestVm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} has said:\n{}\n---", self.name, self.said());
        }
        self.end();
    }
}
