//! How long a guest is stopped when it is adopted, beside QEMU's own live migration of the same
//! guest on the same host.
//!
//! ```text
//! bench-adopt [--count N] [--ram MIB] [--rate PAGES]
//! ```
//! Adoptions and plain migrations (plain QEMU to plain QEMU over a unix socket, QEMU's own
//! defaults) take turns, so that both see the same host. Run by `scripts/bench-adopt`.

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;
use stillpoint_tests::figures::{heading, row};
use stillpoint_tests::{Lab, QmpClient, Recipe, TestVm, newest_qemu, wait_until};

/// What an adoption may take, as a multiple of QEMU's own migration.
const MOST: f64 = 3.0;
const TIMEOUT: Duration = Duration::from_secs(60);

struct Options {
    count: usize,
    ram_mib: String,
    rate: String,
}

fn options() -> Result<Options, String> {
    let mut options = Options { count: 5, ram_mib: "1024".to_owned(), rate: "1500".to_owned() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value =
            words.next().filter(|value| value.parse::<u32>().is_ok_and(|number| number > 0));
        let value = value.ok_or_else(|| {
            format!(
                "{word}: a number is missing; bench-adopt [--count N] [--ram MIB] [--rate PAGES]"
            )
        })?;
        match word.as_str() {
            "--count" => options.count = value.parse().map_err(|_| format!("--count {value}"))?,
            "--ram" => options.ram_mib = value,
            "--rate" => options.rate = value,
            _ => {
                return Err(format!(
                    "{word} is not known; bench-adopt [--count N] [--ram MIB] [--rate PAGES]"
                ));
            }
        }
    }
    Ok(options)
}

impl Options {
    /// As `scripts/bench` has it.
    fn recipe(&self) -> Recipe {
        let words = format!("witness.table_mib=32 witness.check=4096 witness.rate={}", self.rate);
        Recipe::witness("q35-virtio.cfg").words(&words).arguments(&["-m", &self.ram_mib])
    }
}

/// The QEMU that a plain migration goes to: the same command line, in the same directory.
struct Destination {
    child: Child,
    monitor: QmpClient,
}

impl Destination {
    fn start(vm: &TestVm, recipe: &Recipe, qemu: &Path) -> Self {
        let words = recipe.plain_command_line(qemu).into_iter();
        let words: Vec<String> = words
            .map(|word| word.replace("serial.log", "serial-2.log").replace(".sock", "-2.sock"))
            .collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["-incoming", "defer"]).current_dir(&vm.directory);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("QEMU can be run");
        let socket = vm.directory.join("extra-2.sock");
        assert!(
            wait_until(TIMEOUT, || vm.directory.join("qmp-2.sock").exists()),
            "the destination did not start"
        );
        Self { child, monitor: QmpClient::connect(&socket) }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Milliseconds: as QEMU counts them, and from the source's STOP to the destination's RESUME.
fn migrate(qemu: &Path, recipe: &Recipe) -> (f64, f64) {
    let lab = Lab::new(qemu);
    let vm = lab.start_plain("m", recipe);
    vm.wait_for_witness();
    let mut source = vm.qmp();
    let mut destination = Destination::start(&vm, recipe, qemu);
    let uri = json!({"uri": format!("unix:{}", vm.directory.join("migration.sock").display())});
    destination.monitor.execute("migrate-incoming", uri.clone());
    source.events();
    source.execute("migrate", uri);
    let status = |monitor: &mut QmpClient| monitor.execute("query-migrate", json!({}));
    let is_over = wait_until(TIMEOUT, || {
        status(&mut source)["status"] == "completed" && destination.monitor.is_running()
    });
    let said = status(&mut source);
    assert!(is_over, "QEMU's own migration did not complete: {said}");
    let stop = source.time_of_event("STOP").expect("the source stopped");
    let resume = destination.monitor.time_of_event("RESUME").expect("the destination runs");
    (said["downtime"].as_f64().expect("QEMU counts it"), (resume - stop) * 1e3)
}

/// What `stillpoint adopt` says.
fn adopt(qemu: &Path, recipe: &Recipe) -> Value {
    let lab = Lab::new(qemu);
    let mut vm = lab.start_plain("m", recipe);
    let last = vm.wait_for_witness();
    vm.attach_plain(&[]);
    vm.adopt();
    let after = vm.wait_for_line("a step after it", |line| line.step > last.step);
    vm.assert_all_right(&after);
    vm.report.clone()
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
    let (mut counted, mut seen, mut adopted, mut by_qemu) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 1..=options.count {
        eprintln!("bench-adopt: {number} of {}", options.count);
        let (downtime, from_stop) = migrate(&qemu, &recipe);
        counted.push(downtime);
        seen.push(from_stop);
        let report = adopt(&qemu, &recipe);
        adopted.push(report["downtime_ms"].as_f64().expect("the documented form"));
        by_qemu.extend(report["qemu_downtime_ms"].as_f64());
    }
    println!("{} MiB, {} pages/s, {}", options.ram_mib, options.rate, qemu.display());
    heading("downtime, ms");
    row("QEMU's own migration, as query-migrate says", &counted);
    let own = row("QEMU's own migration, STOP to RESUME", &seen);
    let ours = row("adoption, as the helper saw it", &adopted);
    if !by_qemu.is_empty() {
        row("adoption, as query-migrate says", &by_qemu);
    }
    let ratio = ours / own;
    println!("adoption over QEMU's own migration: {ratio:.2} (at most {MOST})");
    if ratio <= MOST { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
