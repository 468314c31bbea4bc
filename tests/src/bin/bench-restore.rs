//! How long a restore takes until the guest runs, and until it does its next step: lazy and eager,
//! beside a QEMU that boots.
//!
//! ```text
//! bench-restore [--count N] [--ram MIB] [--age N] [--hdfs yes]
//! ```
//! All take turns, so that all see the same host. Run by `scripts/bench-restore`.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;
use stillpoint_tests::figures::{heading, median, row};
use stillpoint_tests::{Cluster, Lab, Pid, Recipe, kill_hard, newest_qemu};

const USAGE: &str = "bench-restore [--count N] [--ram MIB] [--age N] [--hdfs yes]";
/// Of the VM that is restored.
const NAME: &str = "m";
/// Of the guest's memory the witness fills all but this, for the kernel and what it unpacks.
const KERNEL_MIB: u64 = 160;

struct Options {
    count: usize,
    ram_mib: u64,
    age: usize,
    hdfs: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options { count: 5, ram_mib: 1024, age: 1, hdfs: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word}: a value is missing; {USAGE}"))?;
        let number: Option<u64> = value.parse().ok().filter(|number| *number > 0);
        let number = || number.ok_or_else(|| format!("{word} {value}: no number; {USAGE}"));
        match word.as_str() {
            "--count" => options.count = usize::try_from(number()?).map_err(|_| USAGE)?,
            "--ram" => options.ram_mib = number()?.max(KERNEL_MIB + 32),
            "--age" => options.age = usize::try_from(number()?).map_err(|_| USAGE)?,
            "--hdfs" => options.hdfs = value == "yes",
            _ => return Err(format!("{word} is not known; {USAGE}")),
        }
    }
    Ok(options)
}

impl Options {
    fn recipe(&self) -> Recipe {
        let table = self.ram_mib - KERNEL_MIB;
        let words = format!("witness.table_mib={table} witness.report_ms=50 witness.rate=1500");
        let memory = self.ram_mib.to_string();
        Recipe::witness("q35-virtio.cfg").words(&words).arguments(&["-m", &memory])
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// A QEMU of the recipe's command line, beside the lab's VMs; its end is the end of this value.
struct Bare {
    directory: PathBuf,
    qemu: Pid,
}

impl Bare {
    /// With `-daemonize` the command ends when the guest may run.
    fn start(directory: &Path, recipe: &Recipe, qemu: &Path) -> Self {
        let words = recipe.command_line(qemu);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["-daemonize", "-pidfile", "qemu.pid"]);
        let status = command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("QEMU can be run");
        assert!(status.success(), "QEMU did not start in {}", directory.display());
        let pid = std::fs::read_to_string(directory.join("qemu.pid")).expect("QEMU wrote it");
        let qemu = Pid::from_raw(pid.trim().parse().expect("a process ID"));
        Self { directory: directory.to_owned(), qemu }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        kill_hard(self.qemu);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn furnished(lab: &Lab, recipe: &Recipe, qemu: &Path) -> PathBuf {
    let directory = lab.fresh_directory("bare");
    std::fs::create_dir_all(&directory).expect("the lab");
    recipe.furnish(qemu, &directory);
    directory
}

/// Milliseconds until the guest of a QEMU that boots may run.
fn boot(lab: &Lab, recipe: &Recipe, qemu: &Path) -> f64 {
    let directory = furnished(lab, recipe, qemu);
    let begun = Instant::now();
    let _bare = Bare::start(&directory, recipe, qemu);
    milliseconds(begun)
}

/// One restore; its VM is killed then.
struct Restored {
    /// Milliseconds from the request until the guest may run, as the restore says.
    running: f64,
    /// Milliseconds from the command until the guest has done a step.
    step: f64,
    /// Of the store, until the guest might run.
    bytes_read: f64,
    report: Value,
}

fn restore(lab: &Lab, more: &[&str]) -> Restored {
    let begun = Instant::now();
    let vm = lab.restore(NAME, NAME, more);
    vm.wait_for_line("a step after the restore", |_| true);
    let step = milliseconds(begun);
    let report = vm.report.clone();
    vm.kill();
    let number = |key: &str| report[key].as_f64().expect("the documented form");
    Restored { running: number("resume_ms"), step, bytes_read: number("bytes_read"), report }
}

fn each(restored: &[Restored], figure: impl Fn(&Restored) -> f64) -> Vec<f64> {
    restored.iter().map(figure).collect()
}

/// Milliseconds of each phase, the medians.
fn phases(restored: &[Restored]) -> String {
    let of = |name: &str| -> Vec<f64> {
        restored.iter().filter_map(|one| one.report["phases"][name].as_f64()).collect()
    };
    let Some(known) = restored.first().and_then(|one| one.report["phases"].as_object()) else {
        return String::new();
    };
    let phase = |name: &String| format!("{name} {:.0}", median(&of(name)));
    known.keys().map(phase).collect::<Vec<_>>().join(", ")
}

/// A VM that was checkpointed as often as asked, and killed.
fn prepare(lab: &Lab, recipe: &Recipe, age: usize) {
    let vm = lab.start(NAME, recipe);
    vm.wait_for_line("the guest's first line", |_| true);
    (0..age).for_each(|_| drop(vm.checkpoint()));
    vm.kill();
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let (qemu, recipe) = (newest_qemu(), options.recipe());
    let cluster = options.hdfs.then(Cluster::shared);
    let mut lab = Lab::new(&qemu);
    if let Some(cluster) = &cluster {
        lab = lab.with_store(&cluster.fresh_store("bench-restore"));
    }
    prepare(&lab, &recipe, options.age);
    let (mut booted, mut lazy, mut eager) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=options.count {
        eprintln!("bench-restore: {number} of {}", options.count);
        booted.push(boot(&lab, &recipe, &qemu));
        lazy.push(restore(&lab, &["--lazy"]));
        // The lab asks for --eager if nothing else is said.
        eager.push(restore(&lab, &[]));
    }
    let place = if options.hdfs { "HDFS" } else { "a directory" };
    println!("{} MiB, {} checkpoints in {place}, {}", options.ram_mib, options.age, qemu.display());
    heading("ms");
    let bare = row("a booting QEMU: the guest may run", &booted);
    let running = row("lazy restore: the guest may run", &each(&lazy, |one| one.running));
    row("eager restore: the guest may run", &each(&eager, |one| one.running));
    let step = row("lazy restore: next step", &each(&lazy, |one| one.step));
    let eager_step = row("eager restore: next step", &each(&eager, |one| one.step));
    row("lazy restore: bytes read until it may run", &each(&lazy, |one| one.bytes_read));
    println!("lazy phases: {}", phases(&lazy));
    println!("eager phases: {}", phases(&eager));
    println!("lazy restore beyond a booting QEMU: {:.0} ms", running - bare);
    println!("next step, eager over lazy: {:.2}", eager_step / step);
    ExitCode::SUCCESS
}
