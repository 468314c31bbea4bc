//! The command line of an external QEMU, in the form from which `stillpoint restore` starts it
//! elsewhere.
//!
//! What is common with `stillpoint run` is in [`super::normalize`]; this module has what only an
//! external VM needs. Its memory objects are left out, as Stillpoint's object replaces them, and so
//! are options that concern the process only. The accelerator is the one that QEMU uses now. What
//! no engine can save is refused.

use super::arguments::QemuOption;
use super::form::Form;
use super::host_specific::{self, Dropped, Hold, Manager};
use super::normalize::{self, Normalized};
use super::qemu_binary::QemuFacts;
use super::unsupported;
use super::{accelerator, arguments, memory, readconfig};
use crate::error::{explain, refused};
use anyhow::{Context, Result};
use qemu_cmdline::unsupported::Command;
use qmp_bridge::qmp::replies::MachineType;
use qmp_bridge::ramblock::RamBlock;
use qmp_bridge::vm::VmFacts;
use std::path::PathBuf;

/// The VM behind a strange command line.
#[derive(Debug)]
pub struct ExternalVm {
    /// The options from which a restore starts it.
    pub options: Vec<QemuOption>,
    /// Versioned.
    pub machine_type: String,
    /// The value of `-accel`.
    pub accelerator: String,
    /// Main memory, in bytes.
    pub ram_bytes: u64,
    /// Main memory's RAM block.
    pub ram_block: String,
    /// What a restored VM is started without.
    pub dropped: Vec<Dropped>,
    /// Who manages it, if its command line shows that.
    pub manager: Option<Manager>,
    /// Where our plugin listens, if it sits there.
    pub plugin: Option<PathBuf>,
}

const NETWORK: &[&str] = &["net", "netdev", "nic", "nodefaults"];

/// What QEMU itself says of its VM.
pub(crate) struct Said<'a> {
    pub facts: &'a VmFacts,
    pub types: &'a [MachineType],
    pub blocks: &'a [RamBlock],
}

/// Reads `words`, the arguments of the process, against what QEMU says.
pub(crate) fn parse(words: &[String], hold: &Hold<'_>, said: &Said<'_>) -> Result<ExternalVm> {
    // It runs, so QEMU takes it: what Stillpoint does not read is no fault of the user's command
    // line.
    let refuse = |error: anyhow::Error| refused(explain(&error));
    let options = arguments::parse(words)
        .context("reading the command line of that process")
        .map_err(refuse)?;
    let said_network = options.iter().any(|option| NETWORK.contains(&option.name.as_str()));
    let options = readconfig::expand_in(options, hold.directory).map_err(config_gone)?;
    let options = with_default_network(options, said_network);
    let options: Vec<QemuOption> = options.into_iter().map(without_revision).collect();
    unsupported::check(&options, Command::Attach, hold.directory).map_err(refuse)?;
    let manager = Manager::of(&options);
    let plugin = options
        .iter()
        .find_map(host_specific::plugin_socket)
        .map(|socket| hold.directory.join(socket));
    let memory = memory::take_out(options).map_err(refuse)?;
    let (options, mut dropped) =
        host_specific::without_process(memory.options, hold).map_err(refuse)?;
    dropped.extend(memory.dropped);
    let accelerator = accelerator::of_running(&options, said.facts.accelerator.as_str());
    let normalized = normalize::normalize(accelerator::without(options), &facts(said));
    let normalized = normalized.map_err(|error| refused(error.explain()))?;
    let ram_block = memory.block.unwrap_or_else(|| normalized.ram_block.clone());
    let (machine_type, ram_bytes) = (normalized.machine_type.clone(), normalized.ram_bytes);
    check(&normalized, &ram_block, said)?;
    Ok(ExternalVm {
        options: normalized.options,
        machine_type,
        accelerator,
        ram_bytes,
        ram_block,
        dropped,
        manager,
        plugin,
    })
}

/// QEMU makes its default network card unless one of these stands on the command line itself; a
/// configuration file's do not count. Written out, they would; so the default is written out too,
/// in QEMU's own words.
fn with_default_network(mut options: Vec<QemuOption>, said_network: bool) -> Vec<QemuOption> {
    let from_file = options.iter().any(|option| NETWORK.contains(&option.name.as_str()));
    if from_file && !said_network {
        options.extend(["nic", "user"].map(|what| QemuOption::with("net", what)));
    }
    options
}

/// Proxmox's QEMU counts revisions of a machine type (`pc-i440fx-9.0+pve0`), which no list of types
/// shows.
fn without_revision(option: QemuOption) -> QemuOption {
    let mut form = Form::of(&option);
    let plain = form
        .get("type")
        .filter(|_| normalize::is_machine_option(&option))
        .and_then(|name| name.split_once("+pve").map(|(name, _)| name.to_owned()));
    match plain {
        Some(name) => {
            form.set("type", &name);
            form.into_option(&option.name)
        }
        None => option,
    }
}

fn config_gone(error: anyhow::Error) -> anyhow::Error {
    refused(format!(
        "{error:#}; the VM's configuration must still be where it was when the VM was started"
    ))
}

fn facts(said: &Said<'_>) -> QemuFacts {
    QemuFacts { version: said.facts.qemu.to_string(), machine_types: said.types.to_vec() }
}

/// That the command line is the VM's that runs: a restore is built from the one and filled from the
/// other.
fn check(normalized: &Normalized, ram_block: &str, said: &Said<'_>) -> Result<()> {
    let facts = said.facts;
    if normalized.machine_type != facts.machine_type {
        return Err(refused(format!(
            "the command line means machine type {}, but a {} runs; is the monitor that of another process?",
            normalized.machine_type, facts.machine_type
        )));
    }
    if normalized.ram_bytes != facts.ram_bytes {
        return Err(refused(format!(
            "the command line gives {} bytes of RAM, but the VM has {}; is the monitor that of another process?",
            normalized.ram_bytes, facts.ram_bytes
        )));
    }
    if facts.plugged_bytes > 0 {
        return Err(refused(format!(
            "{} bytes of memory are plugged in beside the VM's own; a checkpoint knows one memory: unplug it, or start the VM with all of it by -m",
            facts.plugged_bytes
        )));
    }
    match said.blocks.iter().find(|block| block.name == ram_block) {
        Some(block) if block.used == facts.ram_bytes => Ok(()),
        Some(block) => Err(refused(format!(
            "RAM block {ram_block} has {} bytes of the VM's {}; the rest is elsewhere",
            block.used, facts.ram_bytes
        ))),
        None => Err(refused(format!(
            "QEMU has no RAM block '{ram_block}', which by its command line is the guest's memory"
        ))),
    }
}

#[cfg(test)]
mod test;
