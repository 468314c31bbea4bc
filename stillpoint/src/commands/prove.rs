//! A proof for another command: `checkpoint --verify` and `bench` let `verify --restore` do it, in
//! a process of its own with the lowest priority, so that the guest is not slowed.

use anyhow::{Context, Result};
use checkpoint_format::{CheckpointId, VmName};
use serde_json::Value;
use std::process::Stdio;
use tokio::process::Command;
use vm::error::{Class, classed};
use vm::runtime_dir::RuntimeDir;

/// What `verify --restore --json` says of the checkpoint. An error if it does not prove.
pub(crate) async fn prove(
    runtime: &RuntimeDir,
    vm_name: &VmName,
    id: CheckpointId,
) -> Result<Value> {
    let file = runtime.vm()?;
    let program = std::env::current_exe().context("finding this program's own path")?;
    let mut command = Command::new("nice");
    command.args(["-n", "19", "ionice", "-c", "3"]).arg(program);
    command
        .args(["verify", "--restore", "--json", "--store", &file.store, "--fleecing-dir"])
        .arg(&file.fleecing);
    // The very program that runs the VM: it is here, whatever the record says of other hosts.
    command.arg("--qemu").arg(&file.qemu).arg(format!("{vm_name}@{id}"));
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .context("starting the proof")?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() {
        return serde_json::from_slice(&output.stdout)
            .context("the proof's result cannot be parsed");
    }
    let code = output.status.code().and_then(|code| u8::try_from(code).ok());
    let class = code.map_or(Class::Failed, Class::of_exit_code);
    Err(classed(class, format!("{vm_name}@{id} is durable but not proven: {said}")))
}
