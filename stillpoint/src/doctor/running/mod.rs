//! `stillpoint doctor --qmp SOCKET`: whether an external VM that runs can be checkpointed, by which
//! engine, and what prevents it.
//!
//! The checks are those of `attach`; the guest is not stopped and nothing is changed. (Only QEMU
//! knows whether it accepts a background snapshot, so the check switches that capability on and off
//! again.)

mod disks;
mod elsewhere;
mod engines;

use super::{Row, State, table};
use crate::exit::REFUSED;
use crate::terminal::{out, print_json};
use anyhow::{Context, Error, Result};
use engine::progress::bytes;
use qmp_bridge::{RunState, devices};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vm::error::explain;
use vm::external::probe::Probe;
use vm::launch::arguments;
use vm::launch::expected_devices;
use vm::launch::external::ExternalVm;
use vm::running;
use vm::runtime_dir::{RuntimeDir, VmFile};
use vm::tracked_blocks;

const ANOTHER_MONITOR: &str =
    "name a monitor that QEMU itself has opened and no other client uses (docs/attach.md)";
const START_AGAIN: &str = "see docs/attach.md; start the VM without it, or by 'stillpoint run'";

pub fn run(monitor: &Path, as_json: bool) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the asynchronous runtime")?;
    let report = runtime.block_on(look(monitor));
    let can = !report.rows.iter().any(|row| row.state == State::No);
    if as_json {
        let left_out: Vec<Value> =
            report.left_out.iter().map(|(what, why)| json!({ "what": what, "why": why })).collect();
        print_json(
            &json!({ "checkpoints_possible": can, "checks": report.rows, "engines": report.engines, "left_out": left_out }),
        )?;
    } else {
        out!("{}", table(&report.rows, "of this VM").trim_end());
    }
    Ok(if can { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) })
}

#[derive(Default)]
struct Report {
    rows: Vec<Row>,
    /// By name, whether it is possible.
    engines: Value,
    /// What a restored VM is started without, and why.
    left_out: Vec<(String, &'static str)>,
}

/// What a helper would look at, by the same checks.
async fn look(monitor: &Path) -> Report {
    let path = std::path::absolute(monitor).unwrap_or_else(|_| monitor.to_owned());
    let mut look = match Probe::at(&path, |_| Ok(())).await {
        Ok(look) => look,
        Err(error) => {
            return Report {
                rows: vec![cannot("monitor", &error, ANOTHER_MONITOR)],
                ..Report::default()
            };
        }
    };
    let helper = helper_of(&look);
    if let Some((_, file)) = &helper {
        // What a helper has put into this QEMU is in no checkpoint's way.
        look.qmp = look.qmp.for_instance(&file.instance);
    }
    let server = helper.map(|(runtime, _)| runtime.nbd());
    let understood = look.understand();
    let found = understood.as_ref().ok();
    let mut report = Report { rows: who(&look, found), ..Report::default() };
    report.rows.push(command_line(&understood));
    report.rows.push(run_state(&look).await);
    report.rows.extend(engines::check(&look, found, &mut report.engines).await);
    report.rows.extend(disks::check(&look, found, server.as_deref()).await);
    report.rows.extend(plugged(&look, found).await);
    report.rows.extend(
        running::check_blockers(&look.facts.migration_blockers)
            .err()
            .map(|error| cannot("migration", &error, START_AGAIN)),
    );
    report.rows.extend(
        tracked_blocks::check_whole(&look.blocks)
            .err()
            .map(|error| cannot("memory", &error, START_AGAIN)),
    );
    report.rows.extend(
        look.foreign_user().map(|why| cannot("QEMU's user", &Error::msg(why), START_AGAIN)),
    );
    if let Ok(found) = &understood {
        report.rows.extend(elsewhere::check(&found.options));
        report.left_out =
            found.dropped.iter().map(|dropped| (dropped.what.clone(), dropped.why)).collect();
    }
    report
}

/// The helper that has this QEMU, or had it.
fn helper_of(look: &Probe) -> Option<(RuntimeDir, VmFile)> {
    let base = std::env::var_os("STILLPOINT_RUNTIME_DIR")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    let is_it = |file: &VmFile| {
        file.pid == Some(look.process.pid)
            && file.external.as_ref().is_none_or(|there| there.started == look.process.started)
    };
    RuntimeDir::known(base.as_deref()).into_iter().find(|(_, file)| is_it(file))
}

async fn run_state(look: &Probe) -> Row {
    const CHECK: &str = "run state";
    match RunState::of(&look.qmp).await {
        Ok(state) => Row::ok(CHECK, state.name()),
        Err(error) => cannot(CHECK, &error.into(), "try again when the guest runs"),
    }
}

/// A reason often ends in what to do.
fn cannot(check: impl Into<std::borrow::Cow<'static, str>>, error: &Error, remedy: &str) -> Row {
    let text = explain(error);
    match text.rsplit_once("; ") {
        Some((why, what)) => Row::no(check, why, what),
        None => Row::no(check, text, remedy),
    }
}

fn who(look: &Probe, found: Option<&ExternalVm>) -> Vec<Row> {
    let process = &look.process;
    let manager = found
        .and_then(|found| found.manager)
        .map_or(String::new(), |manager| format!(", of {}", manager.name()));
    let facts = &look.facts;
    let package = if facts.qemu.package.is_empty() {
        String::new()
    } else {
        format!(" ({})", facts.qemu.package)
    };
    let memory = format!("{} in {} RAM blocks", bytes(facts.ram_bytes), look.blocks.len());
    vec![
        Row::ok(
            "process",
            format!(
                "{} {}, user {}{manager}",
                process.pid,
                process.program.display(),
                process.user
            ),
        ),
        Row::ok(
            "QEMU",
            format!("{}{package}, accelerator {}", facts.qemu, facts.accelerator.as_str()),
        ),
        Row::ok("machine", format!("{}, {} processors, {memory}", facts.machine_type, facts.vcpus)),
    ]
}

fn command_line(understood: &Result<ExternalVm>) -> Row {
    const CHECK: &str = "command line";
    match understood {
        Ok(found) => Row::ok(
            CHECK,
            format!(
                "it can be started again elsewhere, {} things of this process left out",
                found.dropped.len()
            ),
        ),
        Err(error) => cannot(CHECK, error, START_AGAIN),
    }
}

/// Devices that a checkpoint would miss, or that the command line does not name.
async fn plugged(look: &Probe, found: Option<&ExternalVm>) -> Vec<Row> {
    const CHECK: &str = "devices";
    let devices = match devices::guest_devices(&look.qmp).await {
        Ok(devices) => devices,
        Err(error) => return vec![Row::no(CHECK, error.to_string(), "try again")],
    };
    let mut rows: Vec<Row> = match running::refusals(&look.qmp, &devices).await {
        Ok(refusals) => {
            refusals.into_iter().map(|why| cannot(CHECK, &Error::msg(why), START_AGAIN)).collect()
        }
        Err(error) => return vec![cannot(CHECK, &error, "try again")],
    };
    let options = arguments::parse(&look.process.words).unwrap_or_default();
    let options = found.map_or(options, |found| found.options.clone());
    let difference = expected_devices::difference(&options, &devices);
    rows.extend(
        difference
            .map(|what| cannot(CHECK, &Error::msg(running::not_as_started(&what)), START_AGAIN)),
    );
    if rows.is_empty() {
        rows.push(Row::ok(CHECK, format!("{} devices, all on the command line", devices.len())));
    }
    rows
}
