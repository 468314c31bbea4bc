//! A look at a running QEMU: its process, and what its monitor says. Nothing is changed.

use super::peer;
use crate::exit::refused;
use crate::helper::machine;
use crate::launch::foreign::{self, Foreign, Said};
use crate::launch::inherited::Hold;
use crate::launch::process::QemuProcess;
use anyhow::{Context, Result};
use qmp_bridge::machine::{MachineFacts, MachineType, machine_types};
use qmp_bridge::migration::{self, Support};
use qmp_bridge::ramblock::{self, RamBlock};
use qmp_bridge::{Qmp, QmpError};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A QEMU that runs greets at once, unless another client holds its monitor.
const ANSWER: Duration = Duration::from_secs(5);

pub struct Look {
    pub process: QemuProcess,
    pub monitor: PathBuf,
    pub qmp: Qmp,
    pub facts: MachineFacts,
    pub types: Vec<MachineType>,
    pub blocks: Vec<RamBlock>,
    /// Regular files behind `/dev/fdset/N`.
    fd_paths: HashMap<String, PathBuf>,
}

impl Look {
    pub async fn at(monitor: &Path, process: QemuProcess) -> Result<Self> {
        let qmp = connect(monitor).await?;
        let facts = MachineFacts::read(&qmp).await.context("asking QEMU what machine it runs")?;
        let types = machine_types(&qmp).await.context("asking QEMU for its machine types")?;
        let blocks = ramblock::ram_blocks(&qmp).await.context("asking QEMU for its RAM blocks")?;
        let sets = qmp.execute_json("query-fdsets", Value::Null).await.context("asking QEMU for its descriptors")?;
        let fd_paths = fd_paths(&sets, process.pid);
        Ok(Self { process, monitor: monitor.to_owned(), qmp, facts, types, blocks, fd_paths })
    }

    /// The machine as it can be started anew.
    pub fn understand(&self) -> Result<Foreign> {
        let hold = Hold {
            monitor: &self.monitor,
            directory: &self.process.directory,
            tap: &|descriptor| self.process.tap(descriptor),
            fd_path: &|path| self.fd_paths.get(path).cloned(),
        };
        foreign::understand(&self.process.words, &hold, &Said { facts: &self.facts, types: &self.types, blocks: &self.blocks })
    }

    /// Whether the tracker can follow the machine's memory, or why not.
    pub async fn tracker(&self, found: &Foreign) -> Result<(), String> {
        let Some(socket) = &found.plugin else {
            return Err("Stillpoint's plugin does not sit in this QEMU".to_owned());
        };
        if let Some(why) = &found.no_tracker {
            return Err(why.clone());
        }
        machine::can_track(&self.qmp, socket.clone(), &found.ram_block).await.map_err(|error| format!("{error:#}"))
    }

    pub async fn support(&self) -> Result<Support> {
        migration::probe(&self.qmp).await.context("asking what QEMU's migration can do")
    }
}

/// The monitor, or why it cannot be had.
pub async fn connect(monitor: &Path) -> Result<Qmp> {
    Qmp::connect(monitor, ANSWER).await.map_err(|error| match error {
        QmpError::NoGreeting { .. } => refused(busy(monitor)),
        QmpError::Connect { .. } | QmpError::NotQmp { .. } => refused(error.to_string()),
        other => anyhow::Error::from(other).context("connecting to QEMU's monitor"),
    })
}

/// QEMU serves one client of a monitor at a time; the next one waits without a word.
fn busy(monitor: &Path) -> String {
    format!(
        "the monitor {} does not answer: another client holds it (its manager, or a helper of Stillpoint that is attached under another \
         name); give QEMU a second one, -qmp unix:/run/NAME-stillpoint.qmp,server=on,wait=off, with libvirt by <qemu:commandline> \
         (docs/libvirt.md)",
        monitor.display()
    )
}

/// `/dev/fdset/N` by the file that the first descriptor of the set is.
fn fd_paths(sets: &Value, pid: u32) -> HashMap<String, PathBuf> {
    let path = |set: &Value| {
        let file = std::fs::read_link(format!("/proc/{pid}/fd/{}", set["fds"][0]["fd"].as_u64()?)).ok()?;
        // Pipes and sockets have a name of another kind.
        (file.is_absolute() && !file.starts_with("/dev")).then(|| Some((format!("/dev/fdset/{}", set["fdset-id"].as_u64()?), file)))?
    };
    sets.as_array().into_iter().flatten().filter_map(path).collect()
}

/// A look at whatever is behind `monitor`.
pub async fn at_monitor(monitor: &Path) -> Result<Look> {
    let monitor = std::path::absolute(monitor).with_context(|| format!("making {} absolute", monitor.display()))?;
    let process = peer::behind(&monitor)?;
    Look::at(&monitor, process).await
}
