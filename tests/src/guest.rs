//! The guest of one VM, no matter how its QEMU was started: what it writes to its serial port, and
//! what its monitor reports.

use crate::images::read_image;
use crate::process::{self, Pid, wait_until};
use crate::qmp::QmpClient;
use crate::taken::Taken;
use crate::witness::{self, Line};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A guest needs 4 to 8 seconds to boot on two free cores; nothing else takes nearly as long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(90);
/// It takes 4 to 12 seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Lines come four times a second, steps ten times a second, and a busy host is late.
const STEPS_BETWEEN_LINES: u64 = 15;

pub struct Guest {
    pub name: String,
    /// QEMU's working directory.
    pub directory: PathBuf,
    pub(crate) qemu: Pid,
    /// The QEMU program, whose qemu-img reads its disks.
    program: PathBuf,
    /// What QEMU, the launcher and the helper write: for messages of failed tests.
    logs: Vec<PathBuf>,
}

impl Guest {
    pub(crate) fn new(name: &str, directory: PathBuf, program: &Path, logs: Vec<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            directory,
            qemu: Pid::from_raw(0),
            program: program.to_owned(),
            logs,
        }
    }

    pub fn said(&self) -> String {
        let serial = self.directory.join("serial.log");
        let texts =
            self.logs.iter().chain([&serial]).filter_map(|file| std::fs::read_to_string(file).ok());
        texts
            .map(|text| {
                text.lines()
                    .rev()
                    .take(12)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .collect::<Vec<_>>()
                    .join("\n")
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub fn qemu(&self) -> Pid {
        self.qemu
    }

    pub fn qemu_runs(&self) -> bool {
        process::is_running(self.qemu)
    }

    // ---- the witness

    pub fn lines(&self) -> Vec<Line> {
        witness::lines(&self.directory.join("serial.log"))
    }

    /// The last step that the witness reported; 0 before the first.
    pub fn step(&self) -> u64 {
        self.lines().last().map_or(0, |line| line.step)
    }

    /// The last line, once there is one that fits. Panics on a contradiction, and when QEMU ends.
    pub fn wait_for_line(&self, what: &str, fits: impl Fn(&Line) -> bool) -> Line {
        let mut hit = None;
        let done = wait_until(TIMEOUT, || {
            hit = self.lines().pop().filter(|line| fits(line));
            hit.is_some() || !self.qemu_runs()
        });
        self.assert_no_contradiction();
        assert!(
            done && hit.is_some(),
            "{}: {what} never came; last {:?}\n{}",
            self.name,
            self.lines().last(),
            self.said()
        );
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
    ///
    /// The emulator's vCPUs hang now and then while the guest kernel starts, before the witness
    /// runs; then the test prints a message and resets the VM once.
    pub fn wait_for_witness(&self) -> Line {
        let began = wait_until(BOOT_TIMEOUT, || !self.lines().is_empty() || !self.qemu_runs());
        if !began && self.qemu_runs() {
            eprintln!(
                "{}: the guest did not come up in {BOOT_TIMEOUT:?} and is reset; it has said:\n{}",
                self.name,
                self.said()
            );
            self.qmp().execute("system_reset", serde_json::json!({}));
        }
        self.wait_for_line("the witness", |line| line.passes >= 1)
    }

    /// The guest takes further steps.
    pub fn assert_makes_progress(&self) {
        let now = self.lines().len();
        let more = wait_until(TIMEOUT, || self.lines().len() > now + 1 || !self.qemu_runs());
        self.assert_no_contradiction();
        assert!(more && self.qemu_runs(), "{}: the guest is stopped\n{}", self.name, self.said());
    }

    /// This restored VM continues where the checkpoint was taken, and all of its memory and disks
    /// are right: the witness has walked over the whole table twice.
    pub fn assert_continues(&self, taken: &Taken) {
        let first = self.wait_for_line("a first line", |_| true);
        let first = self.lines().into_iter().next().unwrap_or(first);
        let expected = taken.before + 1..=taken.after + STEPS_BETWEEN_LINES;
        assert!(
            expected.contains(&first.step),
            "{}: continued with step {}, {expected:?} was expected",
            self.name,
            first.step
        );
        self.assert_all_right(&first);
    }

    /// Two walks over the whole table after `since` find everything right.
    pub fn assert_all_right(&self, since: &Line) {
        let last = self.wait_for_line("two passes", |line| line.passes >= since.passes + 2);
        assert!(last.is_ok && last.contradictions == 0, "{}: {last:?}", self.name);
        assert!(last.disks.iter().all(|disk| *disk == last.step), "{}: {last:?}", self.name);
    }

    // ---- its monitor

    /// The monitor that every recipe has besides the helper's.
    pub fn qmp(&self) -> QmpClient {
        QmpClient::connect(&self.directory.join("extra.sock"))
    }

    /// What a drive holds. Where a restored VM has its disks is its own affair: QEMU says.
    pub fn disk(&self, drive: &str) -> Vec<u8> {
        let all = self.qmp().execute("query-block", json!({}));
        let hit = all.as_array().into_iter().flatten().find(|block| block["device"] == drive);
        let inserted = &hit.unwrap_or_else(|| panic!("no drive {drive} in {all}"))["inserted"];
        let (file, format) = (
            inserted["file"].as_str().expect("a file"),
            inserted["drv"].as_str().expect("a format"),
        );
        read_image(&self.program, &self.directory.join(file), format)
    }
}
