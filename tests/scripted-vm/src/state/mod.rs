//! All that the scripted QEMU is at one moment, and its events.

pub(crate) mod blocks;
mod commands;
pub(crate) mod incoming;
pub(crate) mod migration;
pub(crate) mod script;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::{Ram, Version};
use blocks::Blocks;
use incoming::Incoming;
use migration::Migration;
use script::Script;

/// Sends a line. The client may be gone, which is what some tests are about.
pub(crate) fn send(out: &UnixStream, message: &Value) {
    let mut writer = out;
    let _ = writer.write_all(format!("{message}\r\n").as_bytes());
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) class: &'static str,
    pub(crate) description: String,
}

impl Refusal {
    pub(crate) fn generic(description: impl Into<String>) -> Self {
        Self { class: "GenericError", description: description.into() }
    }
}

pub(crate) type Reply = Result<Value, Refusal>;

/// An open file that QEMU was given.
pub(crate) struct FdSet {
    pub(crate) opaque: String,
    pub(crate) file: File,
}

/// All that the scripted QEMU is.
pub struct State {
    /// Which QEMU is played.
    pub version: Version,
    /// The guest's memory.
    pub ram: Ram,
    /// QEMU's name of the run state.
    pub run_state: String,
    /// Path and kind of each device of `-device`.
    pub devices: Vec<(String, String)>,
    /// Why this VM cannot be migrated.
    pub blockers: Vec<String>,
    /// Name and kind of each object of `object-add`.
    pub objects: Vec<(String, String)>,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Hot-plugged memory in bytes.
    pub plugged_memory: u64,
    /// All capabilities of a migration.
    pub capabilities: BTreeMap<String, bool>,
    /// All parameters of a migration.
    pub parameters: Map<String, Value>,
    /// Ids of character devices, and whether the guest has opened the port before each.
    pub chardevs: Vec<(String, bool)>,
    /// The disks.
    pub blocks: Blocks,
    /// The migration that is under way, or was last.
    pub migration: Migration,
    /// What is loaded, of one that was started to load.
    pub incoming: Incoming,
    /// What clients under test have sent.
    pub log: Vec<String>,
    pub(crate) fds: HashMap<String, OwnedFd>,
    pub(crate) sets: BTreeMap<u64, FdSet>,
    pub(crate) script: Script,
    /// Its process, to be ended by `quit`.
    pub(crate) process: Option<Arc<OwnedFd>>,
    /// Its process has ended: no client is served any more.
    pub(crate) has_ended: bool,
    pub(crate) connections: Vec<Arc<UnixStream>>,
    /// The NBD server was started, and its thread not yet.
    pub(crate) serves_nbd: bool,
}

impl State {
    pub(crate) fn new(version: Version, ram: Ram) -> Self {
        let since_8_2 = (version.major, version.minor) >= (8, 2);
        let mut capabilities: BTreeMap<String, bool> = [
            "xbzrle",
            "auto-converge",
            "events",
            "postcopy-ram",
            "return-path",
            "multifd",
            "pause-before-switchover",
            "dirty-bitmaps",
            "late-block-activate",
            "x-ignore-shared",
            "background-snapshot",
        ]
        .map(|name| (name.to_owned(), false))
        .into();
        let mut parameters = json!({
            "max-bandwidth": 128 << 20, "downtime-limit": 300, "tls-creds": "",
            "multifd-channels": 2, "announce-rounds": 5,
        });
        if since_8_2 {
            capabilities.insert("mapped-ram".into(), false);
            parameters["mode"] = "normal".into();
            parameters["avail-switchover-bandwidth"] = 0.into();
            parameters["zero-page-detection"] = "multifd".into();
        }
        let Value::Object(parameters) = parameters else { unreachable!("as written above") };
        Self {
            version,
            ram,
            run_state: "running".into(),
            devices: Vec::new(),
            blockers: Vec::new(),
            objects: Vec::new(),
            vcpus: 1,
            plugged_memory: 0,
            chardevs: Vec::new(),
            capabilities,
            parameters,
            blocks: Blocks::default(),
            migration: Migration::default(),
            incoming: Incoming::default(),
            process: None,
            has_ended: false,
            log: Vec::new(),
            fds: HashMap::new(),
            sets: BTreeMap::new(),
            script: Script::default(),
            connections: Vec::new(),
            serves_nbd: false,
        }
    }

    /// Sends an event to every client.
    pub fn event(&self, name: &str, data: Value) {
        let mut message = json!({
            "timestamp": { "seconds": 1_700_000_000, "microseconds": 0 }, "event": name,
        });
        if !data.is_null() {
            message["data"] = data;
        }
        self.connections.iter().for_each(|out| send(out, &message));
    }

    /// Whether vCPUs run.
    pub fn is_running(&self) -> bool {
        self.run_state == "running"
    }

    pub(crate) fn enter(&mut self, run_state: &str) {
        run_state.clone_into(&mut self.run_state);
    }

    /// `stop`.
    pub fn stop(&mut self) {
        if self.is_running() {
            self.enter("paused");
            self.event("STOP", Value::Null);
        }
    }

    /// `cont`.
    pub fn cont(&mut self) {
        if !self.is_running() {
            self.enter("running");
            self.blocks.is_active = true;
            self.event("RESUME", Value::Null);
        }
    }

    /// Another client's command without arguments, whether QEMU refuses it or not.
    pub fn order(&mut self, command: &str) {
        let _ = self.execute(command, &Value::Null, None);
    }

    /// `system_reset`.
    pub fn reset(&mut self) {
        if matches!(self.run_state.as_str(), "paused" | "postmigrate") {
            self.enter("prelaunch");
        }
        self.event("RESET", json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    }

    pub(crate) fn disconnect(&mut self) {
        for out in self.connections.drain(..) {
            let _ = out.shutdown(std::net::Shutdown::Both);
        }
        self.blocks.disconnect();
    }
}
