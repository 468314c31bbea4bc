//! One command line tried: plain QEMU, then Stillpoint, then a restore somewhere else.

use super::{Mode, Verdict};
use crate::images::qemu_img;
use crate::lab::{Lab, Ran};
use crate::process::{self, Pid, wait_until};
use crate::qmp::QmpClient;
use serde_json::json;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SCRIBBLER: &[u8; 512] = include_bytes!("../scribbler.bin");
/// A loaded host may need long; a QEMU that says nothing by then is taken for one that refuses.
const START: Duration = Duration::from_secs(40);
const SETTLING: Duration = Duration::from_millis(400);
const TRIES: u32 = 3;
/// A QEMU that answers no faster is of no use to its owner either.
const ANSWER: Duration = Duration::from_secs(5);
const ANSWERS: usize = 5;
const DEAF: &str = "QEMU alone does not answer its monitor";
const MONITOR: &str = "own.qmp";

/// Everything that a line may name, made once and copied for each trial.
pub fn templates(qemu: &Path, directory: &Path) {
    std::fs::create_dir_all(directory.join("sub")).expect("the lab");
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(directory.join(name), bytes).expect("the lab");
    let pattern = |len: usize, seed: usize| {
        (0..len)
            .map(|at| if at % 65_536 < 8192 { (at / 512 + seed) as u8 } else { 0 })
            .collect::<Vec<u8>>()
    };
    let mut boot = vec![0; 1 << 20];
    boot[..SCRIBBLER.len()].copy_from_slice(SCRIBBLER);
    write("boot.raw", &boot);
    write("odd.raw", &pattern((1 << 20) + 512, 3));
    for (number, name) in ["data.raw", "disk", "a b.raw", "c,omma.raw", "base.raw", "other.raw"]
        .into_iter()
        .enumerate()
    {
        write(name, &pattern(2 << 20, 10 * number));
    }
    write("x.iso", &pattern(512 << 10, 77));
    write("sub/y.iso", &pattern(256 << 10, 78));
    write("floppy.img", &pattern(1_474_560, 79));
    write("blob.bin", &pattern(4096, 80));
    write("pflash.raw", &pattern(1 << 20, 81));
    write("smbios.bin", &[]);
    write(
        "vm.cfg",
        b"[device \"rng9\"]\n  driver = \"virtio-rng-pci\"\n\n[rtc]\n  base = \"utc\"\n",
    );
    write("disk.cfg", b"[drive \"cfgd\"]\n  file = \"new.qcow2\"\n  format = \"qcow2\"\n  if = \"none\"\n\n[device]\n  driver = \"virtio-blk-pci\"\n  drive = \"cfgd\"\n");
    let create = |words: &[&str]| {
        qemu_img(qemu, directory, &[&["create", "-q", "-f", "qcow2"], words].concat())
    };
    create(&["-F", "raw", "-b", "base.raw", "cow.qcow2"]);
    create(&["-F", "raw", "-b", "base.raw", "mid.qcow2"]);
    create(&["-F", "qcow2", "-b", "mid.qcow2", "deep.qcow2"]);
    create(&["new.qcow2", "8M"]);
    create(&["qcow2", "4M"]);
    create(&["-F", "raw", "-b", "../base.raw", "sub/dir.qcow2"]);
}

/// A line with its place.
pub struct Trial<'a> {
    pub lab: &'a Lab,
    pub qemu: &'a Path,
    pub mode: Mode,
    pub name: String,
    pub words: &'a [String],
    /// QMP commands and their arguments, before the checkpoint: what its owner does to the VM.
    pub acts: &'a [(&'a str, &'a str)],
    /// The same before `attach`.
    pub early: &'a [(&'a str, &'a str)],
    /// Whether plain QEMU is known to take the line.
    pub is_accepted: bool,
}

/// Ended when dropped.
struct Running {
    child: Child,
    directory: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // One that went into the background.
        process::qemus_below(&self.directory).into_iter().for_each(process::kill_hard);
    }
}

impl Running {
    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.directory.join("qemu.out")).unwrap_or_default();
        text.lines()
            .filter(|line| !line.contains("failed to open module"))
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// Whether QEMU's main thread gets to run: in some VMs another thread keeps QEMU's global lock.
    fn answers(&self) -> bool {
        let monitor = self.directory.join(MONITOR);
        let Ok(mut client) = std::panic::catch_unwind(|| QmpClient::connect(&monitor)) else {
            return false;
        };
        (0..ANSWERS).all(|_| {
            let asked = Instant::now();
            client.try_execute("query-status", json!({})).is_ok() && asked.elapsed() < ANSWER
        })
    }

    /// None if QEMU does not answer.
    fn status(&self) -> Option<String> {
        let monitor = self.directory.join(MONITOR);
        let mut client = std::panic::catch_unwind(|| QmpClient::connect(&monitor)).ok()?;
        let answer = client.try_execute("query-status", json!({})).ok()?;
        answer["status"].as_str().map(str::to_owned)
    }
}

impl Trial<'_> {
    fn directory(&self) -> PathBuf {
        self.lab.path().join(&self.name)
    }

    pub fn run(&self) -> Verdict {
        self.furnish();
        let verdict = match self.mode {
            Mode::External => self.external(),
            Mode::Managed => self.managed(),
        };
        process::qemus_below(&self.directory()).into_iter().for_each(process::kill_hard);
        self.end_helper();
        let _ = std::fs::remove_dir_all(self.directory().with_extension("gone"));
        let _ = std::fs::remove_dir_all(self.directory());
        let _ = std::fs::remove_dir_all(self.lab.store_directory().join("vms").join(&self.name));
        verdict
    }

    fn furnish(&self) {
        let templates = self.lab.path().join("templates");
        let status = Command::new("cp")
            .args(["-r", "--sparse=always"])
            .arg(templates)
            .arg(self.directory())
            .status();
        assert!(status.is_ok_and(|status| status.success()), "cannot copy the templates");
    }

    fn spawn(&self, mut command: Command) -> Running {
        let directory = self.directory();
        let log = File::create(directory.join("qemu.out")).expect("the lab");
        command.args(self.words).args([
            "-qmp",
            "unix:sp.qmp,server=on,wait=off",
            "-qmp",
            &format!("unix:{MONITOR},server=on,wait=off"),
        ]);
        command
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log);
        Running { child: command.spawn().expect("the program can be run"), directory }
    }

    /// Whether QEMU alone takes the line.
    fn plain(&self) -> Result<Running, Verdict> {
        let mut running = self.spawn(Command::new(self.qemu));
        let monitor = running.directory.join(MONITOR);
        wait_until(START, || running.has_ended() || monitor.exists());
        // It makes its monitor before its devices, and one that dies in its first moments would be
        // blamed on us.
        let ended = wait_until(SETTLING, || running.has_ended());
        if !ended && running.answers() {
            return Ok(running);
        }
        Err(Verdict::Rejected(if running.has_ended() { running.log() } else { DEAF.to_owned() }))
    }

    fn external(&self) -> Verdict {
        let mut running = match self.plain() {
            Ok(running) => running,
            Err(verdict) => return verdict,
        };
        if let Err(finding) = act(&running, self.early) {
            return finding;
        }
        let socket = running.directory.join("sp.qmp");
        let words = ["attach", "--qmp", socket.to_str().expect("UTF-8"), "--name", &self.name];
        match self.judge("attach", self.lab.run(&words)) {
            Ok(()) => self.checkpoint(&mut running),
            Err(verdict) => self.unharmed(&mut running, "running", verdict),
        }
    }

    fn managed(&self) -> Verdict {
        if !self.is_accepted {
            match self.plain() {
                Ok(running) => drop(running),
                Err(verdict) => return verdict,
            }
            let _ = std::fs::remove_dir_all(self.directory());
            self.furnish();
        }
        let mut command = self.lab.command(&["run", "--name", &self.name, "--"]);
        command.arg(self.qemu);
        let mut running = self.spawn(command);
        let runtime = self.lab.runtime().join(&self.name);
        let helper_said =
            || std::fs::read_to_string(runtime.join("helper.log")).unwrap_or_default();
        let mut ended = false;
        let up = wait_until(START, || {
            ended = running.has_ended();
            ended || UnixStream::connect(runtime.join("control.sock")).is_ok()
        });
        if ended {
            let code = running.child.wait().expect("a child").code().unwrap_or(-1);
            let said = running.log();
            return if code == 3 {
                Verdict::Refused(said)
            } else {
                Verdict::Finding(format!("run ended with {code}: {said}"))
            };
        }
        if !up {
            return Verdict::Finding(format!(
                "no helper answers: {} {}",
                running.log(),
                tail(&helper_said())
            ));
        }
        self.checkpoint(&mut running)
    }

    fn checkpoint(&self, running: &mut Running) -> Verdict {
        if let Err(finding) = act(running, self.acts) {
            return finding;
        }
        let before = running.status().unwrap_or_default();
        let judged = self.judge("checkpoint", self.try_checkpoint());
        if let Err(verdict) = judged {
            return self.unharmed(running, &before, verdict);
        }
        if let finding @ Verdict::Finding(_) = self.unharmed(running, &before, Verdict::Proven) {
            return finding;
        }
        self.elsewhere(running);
        let cache = self.lab.path().join("cache-elsewhere");
        let qemu = self.qemu.to_str().expect("UTF-8");
        let words = ["verify", "--restore", &self.name, "--qemu", qemu, "--run", "200ms"];
        let ran =
            self.lab.run_with(&words, &[("STILLPOINT_CACHE_DIR", cache.to_str().expect("UTF-8"))]);
        let _ = std::fs::remove_dir_all(&cache);
        match ran.code {
            0 => Verdict::Proven,
            code => Verdict::Finding(format!(
                "durable, but the proof ended with {code}: {}",
                said(&ran)
            )),
        }
    }

    /// What asks to be tried again is.
    fn try_checkpoint(&self) -> Ran {
        let mut left = TRIES;
        loop {
            let ran = self.lab.run(&["checkpoint", &self.name]);
            left -= 1;
            if ran.code != 1 || left == 0 || !ran.err.contains("try again") {
                return ran;
            }
        }
    }

    /// The host is dead; another has only the store.
    fn elsewhere(&self, running: &mut Running) {
        let _ = running.child.kill();
        let _ = running.child.wait();
        process::qemus_below(&self.directory()).into_iter().for_each(process::kill_hard);
        self.end_helper();
        let _ = std::fs::rename(self.directory(), self.directory().with_extension("gone"));
    }

    fn end_helper(&self) {
        let text = std::fs::read_to_string(self.lab.runtime().join(&self.name).join("helper.pid"))
            .unwrap_or_default();
        let pid = text.trim().parse().ok().filter(|pid| *pid > 1).map(Pid::from_raw);
        pid.filter(|pid| process::is_ours(*pid, &self.lab.runtime()))
            .into_iter()
            .for_each(process::kill_hard);
    }

    /// 0 continues, 3 with a reason is a refusal, all else is a finding.
    fn judge(&self, what: &str, ran: Ran) -> Result<(), Verdict> {
        match ran.code {
            0 => Ok(()),
            3 if !ran.err.contains("no helper answers") => Err(Verdict::Refused(said(&ran))),
            code => Err(Verdict::Finding(format!("{what} ended with {code}: {}", said(&ran)))),
        }
    }

    /// The guest that ran runs, whatever was done.
    fn unharmed(&self, running: &mut Running, before: &str, verdict: Verdict) -> Verdict {
        if running.has_ended() {
            return Verdict::Finding(format!("QEMU died: {}; {verdict:?}", running.log()));
        }
        let now = running.status().unwrap_or_default();
        let is_well =
            now == before || before != "running" && verdict.is_refusal() || now == "prelaunch";
        if is_well {
            verdict
        } else {
            Verdict::Finding(format!("the guest was {before} and is {now}; {verdict:?}"))
        }
    }
}

/// What the owner of the VM does.
fn act(running: &Running, acts: &[(&str, &str)]) -> Result<(), Verdict> {
    let monitor = running.directory.join(MONITOR);
    wait_until(START, || monitor.exists());
    for (command, arguments) in acts {
        let arguments = serde_json::from_str(arguments).expect("JSON");
        let done = QmpClient::connect(&monitor).try_execute(command, arguments);
        done.map_err(|error| Verdict::Finding(format!("QEMU refused {command}: {error}")))?;
    }
    Ok(())
}

fn said(ran: &Ran) -> String {
    tail(ran.err.trim())
}

fn tail(text: &str) -> String {
    let start = text.len().saturating_sub(1200);
    text.char_indices()
        .find(|(at, _)| *at >= start)
        .map_or(String::new(), |(at, _)| text[at..].to_owned())
}
