//! Whether an external VM that runs can be checkpointed, by which engine, and what prevents it.
//!
//! The checks are those of `attach`; the guest is not stopped and nothing is changed. (Only QEMU
//! knows whether it accepts a background snapshot, so the check switches that capability on and off
//! again.)

mod disks;
mod elsewhere;
mod engines;

use super::{Report, Row};
use crate::progress::bytes;
use anyhow::{Error, Result};
use qmp_bridge::{RunState, devices};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vm::error::explain;
use vm::external::probe::Probe;
use vm::launch::arguments;
use vm::launch::expected_devices;
use vm::launch::external::ExternalVm;
use vm::launch::host_specific::Dropped;
use vm::running;
use vm::runtime_dir::{RuntimeDir, VmFile};
use vm::tracked_blocks;

const ANOTHER_MONITOR: &str =
    "name a monitor that QEMU itself has opened and no other client uses (docs/attach.md)";
const START_AGAIN: &str = "see docs/attach.md; start the VM without it, or by 'stillpoint run'";

/// What was found out of one running VM.
#[derive(Debug, Serialize)]
pub struct VmReport {
    /// The checks.
    #[serde(flatten)]
    pub report: Report,
    /// By name; none where QEMU could not be asked.
    pub engines: Option<BTreeMap<String, EngineReport>>,
    /// What a restored VM is started without.
    pub left_out: Vec<LeftOut>,
}

/// Whether an engine can take the VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EngineReport {
    /// Whether it can.
    pub possible: bool,
    /// Why not; none if it can.
    pub why_not: Option<String>,
}

/// Something of the command line that no other host could have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The option, or part of one.
    pub what: String,
    /// Why another host could not have it.
    pub why: &'static str,
}

/// What a helper would look at, by the same checks.
pub async fn look(monitor: &Path) -> VmReport {
    let path = std::path::absolute(monitor).unwrap_or_else(|_| monitor.to_owned());
    let mut look = match Probe::at(&path, |_| Ok(())).await {
        Ok(look) => look,
        Err(error) => {
            return VmReport {
                report: vec![cannot("monitor", &error.into(), ANOTHER_MONITOR)].into(),
                engines: None,
                left_out: Vec::new(),
            };
        }
    };
    let helper = helper_of(&look);
    if let Some((_, file)) = &helper {
        // What a helper has put into this QEMU is in no checkpoint's way.
        look.qmp = look.qmp.for_instance(&file.instance);
    }
    let server = helper.map(|(runtime, _)| runtime.nbd());
    let parsed = look.parse().map_err(Error::from);
    let found = parsed.as_ref().ok();
    let mut rows = who(&look, found);
    rows.push(command_line(&parsed));
    rows.push(run_state(&look).await);
    let engines = match engines::check(&look, found).await {
        Ok((engines, of_engines)) => {
            rows.extend(of_engines);
            Some(engines)
        }
        Err(row) => {
            rows.push(row);
            None
        }
    };
    rows.extend(disks::check(&look, found, server.as_deref()).await);
    rows.extend(plugged(&look, found).await);
    rows.extend(whole(&look));
    let left_out = |dropped: &Dropped| LeftOut { what: dropped.what.clone(), why: dropped.why };
    if let Some(found) = found {
        rows.extend(elsewhere::check(&found.options));
    }
    VmReport {
        report: rows.into(),
        engines,
        left_out: found.map_or_else(Vec::new, |found| found.dropped.iter().map(left_out).collect()),
    }
}

/// What QEMU as a whole is in the way of.
fn whole(look: &Probe) -> Vec<Row> {
    let blockers = running::check_blockers(&look.facts.migration_blockers).err().map(Error::from);
    let blocks = tracked_blocks::check_whole(&look.blocks).err().map(Error::from);
    let user = look.foreign_user().map(Error::msg);
    [("migration", blockers), ("memory", blocks), ("QEMU's user", user)]
        .into_iter()
        .filter_map(|(check, error)| Some(cannot(check, &error?, START_AGAIN)))
        .collect()
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
        Row::ok("machine", format!("{}, {} vCPUs, {memory}", facts.machine_type, facts.vcpus)),
    ]
}

fn command_line(parsed: &Result<ExternalVm>) -> Row {
    const CHECK: &str = "command line";
    match parsed {
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
        Err(error) => return vec![cannot(CHECK, &error.into(), "try again")],
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
