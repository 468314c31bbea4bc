//! What the commands and the helper say to each other over the control socket: one JSON request on
//! a line, then lines of progress, then one result. Only the owner of the runtime directory can
//! reach it.

use anyhow::Context;
use checkpoint_format::VmName;
use engine::checkpoint::Choice;
use engine::progress::Update;
use engine::restore::hydration::HydrationStatus;
use engine::restore::lazy_disks::DisksStatus;
use engine::rollback;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;
use vm::error::{EngineError, InPhase, Phase};
use vm::runtime_dir::{Failure, RollbackUnderWay};

/// The longest answer that a command takes, in bytes.
pub const MAX_LINE: usize = 1 << 20;
/// The longest request that the helper takes, in bytes: a few words and a path.
pub const MAX_REQUEST: u64 = 32 << 10;

/// What a command asks of a helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint; where nothing is chosen, as the VM was attached.
    Checkpoint(Choice),
    /// Move the VM into a QEMU of ours.
    Adopt {
        /// Its program; none for the one that runs the VM.
        qemu: Option<PathBuf>,
    },
    /// Set the VM back, in place, to a checkpoint that it descends from.
    Rollback(rollback::Request),
    /// What VM is this, and what is it doing.
    Status,
    /// Time a bare `stop` and `cont`, the least that any pause costs.
    BarePause,
}

impl Request {
    /// Reads the line of a command.
    ///
    /// # Errors
    /// When it is none of these requests.
    pub fn parse(line: &str) -> Result<Self, EngineError> {
        serde_json::from_str(line)
            .context("the request cannot be parsed; are command and helper of the same version?")
            .in_phase(Phase::Ask)
    }
}

/// A line of the helper's answer; the last one is `Done` or `Failed`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// How far the work is.
    Progress(Update),
    /// The result, as the request's documentation has it.
    Done(Value),
    /// Why there is none.
    Failed(Failure),
}

impl Reply {
    /// Reads a line of a helper.
    ///
    /// # Errors
    /// When it is none of these replies.
    pub fn parse(line: &str) -> Result<Self, EngineError> {
        serde_json::from_str(line)
            .context("the helper's answer cannot be parsed")
            .in_phase(Phase::Ask)
    }
}

/// The result of [`Request::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The helper's process.
    pub pid: u32,
    /// A checkpoint or an adoption is under way; then nothing is said of the VM.
    pub busy: bool,
    /// The VM, unless the helper is busy.
    #[serde(flatten)]
    pub vm: Option<VmStatus>,
    /// Memory that is still to come from the store; absent when all of it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hydration: Option<HydrationStatus>,
    /// Disks whose blocks are still to come; absent when all are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DisksStatus>,
    /// A rollback that has begun and is not complete: the guest is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackUnderWay>,
}

/// A VM and what its helper holds of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name in the store.
    pub name: VmName,
    /// The store's URL.
    pub store: String,
    /// This life of its QEMU: a restored VM is another instance.
    pub instance: String,
    /// QEMU's process.
    pub qemu_pid: u32,
    /// As `MAJOR.MINOR.MICRO`.
    pub qemu_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The most memory that the helper was seen to need for a checkpoint, in bytes; none if the
    /// kernel does not say.
    pub peak_memory_bytes: Option<u64>,
    /// The most that it may need, in bytes.
    pub memory_limit_bytes: u64,
}

/// The result of [`Request::BarePause`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct BarePause {
    /// From `stop` to `cont`, in milliseconds.
    pub pause_ms: f64,
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    /// A helper may be older, or newer, than the command that asks it.
    #[test]
    fn control_requests_have_the_form_that_other_versions_know() {
        let choice = json!({ "engine": null, "stream": null, "full": true });
        let full = Choice { full: true, ..Choice::default() };
        for (request, form) in [
            (Request::Status, json!("status")),
            (Request::BarePause, json!("bare_pause")),
            (Request::Checkpoint(full), json!({ "checkpoint": choice })),
            (Request::Adopt { qemu: None }, json!({ "adopt": { "qemu": null } })),
            (Request::Adopt { qemu: Some("/q".into()) }, json!({ "adopt": { "qemu": "/q" } })),
        ] {
            assert_eq!(serde_json::to_value(&request).unwrap(), form);
            assert_eq!(Request::parse(&form.to_string()).unwrap(), request);
        }
    }

    #[test]
    fn control_request_with_more_than_is_known_is_none() {
        for line in [
            r#"{"adopt":{"qemu":null,"by":"copy"}}"#,
            r#"{"checkpoint":{"engine":null,"stream":null,"full":true,"quiet":true}}"#,
            r#"{"status":{}}"#,
            r#""status" "status""#,
            "",
        ] {
            let error = Request::parse(line).unwrap_err();
            assert_eq!(error.phase(), Phase::Ask, "{line}");
            assert!(error.to_string().contains("same version"), "{line}");
        }
    }

    #[test]
    fn control_status_has_the_facts_of_its_vm_beside_its_own() {
        let busy =
            Status { pid: 7, busy: true, vm: None, hydration: None, disks: None, rollback: None };
        assert_eq!(serde_json::to_value(&busy).unwrap(), json!({ "pid": 7, "busy": true }));
        let form = json!({
            "pid": 7, "busy": false, "name": "m", "store": "file:///s", "instance": "i",
            "qemu_pid": 8, "qemu_version": "10.0.2", "accelerator": "kvm",
            "peak_memory_bytes": null, "memory_limit_bytes": 9,
        });
        let status: Status = serde_json::from_value(form.clone()).unwrap();
        assert_eq!(status.vm.as_ref().map(|vm| (vm.qemu_pid, vm.memory_limit_bytes)), Some((8, 9)));
        assert_eq!(serde_json::to_value(&status).unwrap(), form);
    }
}
