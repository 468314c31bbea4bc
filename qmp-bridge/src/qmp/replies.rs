//! What QEMU's replies hold, as far as it is read: each command once, with the type of its reply.
//!
//! The types have QEMU's names, so that its documentation of QMP is found by them. Fields that are
//! not read are not here, so a QEMU that has more of them, or other ones, is accepted. A field
//! that is missing or of another type is an error; an `Option` says what its absence means. Values
//! of enumerations stay text where they are only compared or shown: QEMU gets new ones.

use std::fmt;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Qmp, QmpError, QmpEvent};

mod block;
pub use block::{
    BlockDeviceInfo, BlockDirtyInfo, BlockExportInfo, BlockGraph, BlockInfo, BlockJobInfo,
    FormatSpecific, GraphEdge, GraphNode, ImageInfo, Medium, Qcow2Info,
};

/// Commands without arguments.
macro_rules! queries {
    ($($(#[$doc:meta])* $name:ident: $command:literal => $reply:ty;)*) => {
        impl Qmp { $(
            $(#[$doc])*
            ///
            /// # Errors
            /// As for [`Self::execute`].
            pub async fn $name(&self) -> Result<$reply, QmpError> {
                self.query($command, Value::Null).await
            }
        )* }
    };
}

queries! {
    /// The devices that can have a medium.
    query_block: "query-block" => Vec<BlockInfo>;
    /// Exports of block nodes, of whatever kind.
    query_block_exports: "query-block-exports" => Vec<BlockExportInfo>;
    /// Jobs on block devices.
    query_block_jobs: "query-block-jobs" => Vec<BlockJobInfo>;
    /// Which block nodes, devices and jobs use which nodes.
    query_block_graph: "x-debug-query-block-graph" => BlockGraph;
    /// Character devices.
    query_chardev: "query-chardev" => Vec<ChardevInfo>;
    /// The commands that this QEMU has.
    query_commands: "query-commands" => Vec<CommandInfo>;
    /// The virtual CPUs.
    query_cpus: "query-cpus-fast" => Vec<CpuInfo>;
    /// Descriptors that QEMU holds under file names.
    query_fdsets: "query-fdsets" => Vec<FdsetInfo>;
    /// Threads for I/O.
    query_iothreads: "query-iothreads" => Vec<IothreadInfo>;
    /// All jobs.
    query_jobs: "query-jobs" => Vec<JobInfo>;
    /// Whether KVM is used.
    query_kvm: "query-kvm" => KvmInfo;
    /// The machine types that this QEMU can build.
    query_machine_types: "query-machines" => Vec<MachineType>;
    /// The sizes of the VM's memory.
    query_memory_size: "query-memory-size-summary" => MemoryInfo;
    /// The run state.
    query_status: "query-status" => StatusInfo;
}

impl Qmp {
    /// Every block node that has a name, without the chain below it.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn query_block_nodes(&self) -> Result<Vec<BlockDeviceInfo>, QmpError> {
        self.query("query-named-block-nodes", json!({ "flat": true })).await
    }

    /// The members of an object of QEMU's object tree.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn qom_list(&self, path: &str) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
        self.query("qom-list", json!({ "path": path })).await
    }

    /// A property of an object of QEMU's object tree.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn qom_get<T: DeserializeOwned>(
        &self,
        path: &str,
        property: &str,
    ) -> Result<T, QmpError> {
        self.query("qom-get", json!({ "path": path, "property": property })).await
    }

    /// The run state, and when the reply was read: events of a later time came after it.
    pub(crate) async fn query_status_timed(&self) -> Result<(StatusInfo, Instant), QmpError> {
        let (reply, at) = self.execute_timed("query-status", Value::Null).await?;
        Ok((parse("query-status", reply)?, at))
    }

    /// The clients of a display server: `vnc` or `spice`. A QEMU without that display refuses.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    pub async fn query_display(&self, server: &str) -> Result<DisplayInfo, QmpError> {
        self.query(&format!("query-{server}"), Value::Null).await
    }
}

impl QmpEvent {
    /// Its members.
    ///
    /// # Errors
    /// When one of them is missing or of another type.
    pub fn members<T: DeserializeOwned>(&self) -> Result<T, QmpError> {
        parse(&self.name, self.data.clone())
    }
}

/// Reads QEMU's reply to a command, or the data of an event.
pub(crate) fn parse<T: DeserializeOwned>(command: &str, reply: Value) -> Result<T, QmpError> {
    serde_path_to_error::deserialize(reply).map_err(|error| QmpError::Reply {
        command: command.into(),
        field: error.path().to_string(),
        source: error.into_inner(),
    })
}

/// The greeting of a monitor.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Greeting {
    /// QEMU's version.
    #[serde(deserialize_with = "super::line::object")]
    pub version: VersionInfo,
}

/// QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VersionInfo {
    /// Its numbers.
    #[serde(deserialize_with = "super::line::object")]
    pub qemu: VersionTriple,
    /// The distributor's suffix.
    pub package: String,
}

/// The numbers of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[expect(missing_docs, reason = "the numbers of a version, in their order")]
pub struct VersionTriple {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

/// A job.
#[derive(Debug, Clone, Deserialize)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// `create`, `backup` or another kind.
    pub r#type: String,
    /// Its status.
    pub status: JobStatus,
    /// Why it failed; none while it runs, and when it did not.
    pub error: Option<String>,
}

/// The status of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    /// It runs.
    Running,
    /// It has ended and waits to be dismissed.
    Concluded,
    /// It failed or was cancelled, and cleans up.
    Aborting,
    /// It was dismissed.
    Null,
    /// Another status, by QEMU's name.
    #[serde(untagged)]
    Other(String),
}

/// QEMU's name of the status.
impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A character device.
#[derive(Debug, Clone, Deserialize)]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// What is behind it, as QEMU describes it.
    pub filename: String,
    /// Whether the guest has opened the port before it; always so for devices without such a state.
    #[serde(rename = "frontend-open")]
    pub frontend_open: bool,
}

/// A command of QMP.
#[derive(Debug, Clone, Deserialize)]
pub struct CommandInfo {
    /// What a client sends.
    pub name: String,
}

/// A virtual CPU.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfo {
    /// Its path in the object tree.
    pub qom_path: String,
    /// Its thread's id.
    pub thread_id: u64,
}

/// A server of displays.
#[derive(Debug, Clone, Deserialize)]
pub struct DisplayInfo {
    /// Connected ones (SPICE calls them channels); not there while the server does not run.
    #[serde(default, alias = "channels")]
    pub clients: Vec<serde::de::IgnoredAny>,
}

/// Descriptors under one file name.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    /// N of `/dev/fdset/N`.
    pub fdset_id: u64,
    /// The descriptors.
    pub fds: Vec<FdsetFdInfo>,
}

/// A descriptor of a set.
#[derive(Debug, Clone, Deserialize)]
pub struct FdsetFdInfo {
    /// Its number in QEMU.
    pub fd: i32,
    /// The name that its sender gave it, if any.
    pub opaque: Option<String>,
}

/// The set that a descriptor was put into.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct AddfdInfo {
    pub(crate) fdset_id: u64,
}

/// A thread for I/O.
#[derive(Debug, Clone, Deserialize)]
pub struct IothreadInfo {
    /// Its object's id.
    pub id: String,
}

/// Whether KVM is used.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct KvmInfo {
    /// It is.
    pub enabled: bool,
}

/// A machine type that a QEMU can build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineType {
    /// The versioned name, e.g. `pc-q35-10.0`.
    pub name: String,
    /// The short name that means this version in this QEMU, e.g. `q35`; none of older versions.
    pub alias: Option<String>,
    /// The id QEMU gives to the main RAM block, which is its name in a migration stream; none of a
    /// type that has no such block.
    pub default_ram_id: Option<String>,
    /// Whether QEMU takes it when no type is named; not there where it does not.
    #[serde(default)]
    pub is_default: bool,
}

/// The sizes of the VM's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryInfo {
    /// Bytes, without hot-plugged modules.
    pub base_memory: u64,
    /// Hot-plugged bytes; not there in a QEMU that cannot plug memory.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// A member of an object of QEMU's object tree.
#[derive(Debug, Clone, Deserialize)]
pub struct ObjectPropertyInfo {
    /// Its name.
    pub name: String,
    /// Its type; `child<TYPE>` for an object.
    pub r#type: String,
}

/// The run state.
#[derive(Debug, Clone, Deserialize)]
pub struct StatusInfo {
    /// QEMU's name of it.
    pub status: String,
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn reply_with_a_missing_or_malformed_field_names_command_and_field() {
        let read = |reply: Value| parse::<Vec<BlockInfo>>("query-block", reply);
        let error = |reply: Value| read(reply).expect_err("an error").to_string();
        let missing = error(json!([{ "device": "a", "inserted": null }]));
        assert!(missing.contains("query-block") && missing.contains("`removable`"), "{missing}");
        let medium = json!({ "node-name": 7, "ro": true });
        let malformed = error(json!([{ "device": "a", "removable": true, "inserted": medium }]));
        assert!(malformed.contains("[0].inserted.node-name"), "{malformed}");
        let more = json!([{ "device": "a", "removable": true, "of-the-future": {} }]);
        assert!(read(more).expect("unknown fields are ignored")[0].inserted.is_none());
    }

    #[test]
    fn reply_keeps_words_that_are_unknown() {
        let job = |status: &str| {
            let row = json!({ "id": "j", "type": "new", "status": status });
            parse::<JobInfo>("query-jobs", row).expect("a job").status
        };
        assert_eq!(job("concluded"), JobStatus::Concluded);
        assert_eq!(job("of-the-future"), JobStatus::Other("of-the-future".into()));
        assert_eq!(job("of-the-future").to_string(), "of-the-future");
        assert_eq!(JobStatus::Aborting.to_string(), "aborting");
    }

    #[test]
    fn image_of_another_format_is_no_qcow2() {
        let image = |specific: Value| {
            let reply = json!({ "virtual-size": 1, "format-specific": specific });
            parse::<ImageInfo>("query-named-block-nodes", reply)
        };
        let file = json!({ "type": "file", "data": { "extent-size-hint": 1 } });
        let other = image(file).expect("an image").format_specific;
        assert!(matches!(other, Some(FormatSpecific::Other(name)) if name == "file"));
        let damaged = image(json!({ "type": "qcow2", "data": { "refcount-bits": 16 } }));
        assert!(damaged.expect_err("no compat").to_string().contains("`compat`"));
    }
}
