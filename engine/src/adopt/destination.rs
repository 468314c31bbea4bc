//! The new QEMU's process: started detached and paused, ended by its number if the adoption fails.

use super::record::Process;
use anyhow::{Context, Error, Result, bail};
use dirty_tracker::GuestMemory;
use qmp_bridge::poll::poll_until;
use qmp_bridge::{Qmp, said};
use std::future::ready;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::Duration;
use vm::launch::spawn;
use vm::process;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// QEMU opens its monitor within 100 ms; a loaded host takes longer.
const STARTUP: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Variables of ours that the new QEMU does not get from the old one's environment.
const NOT_INHERITED: &str = "STILLPOINT_";

/// In a session of its own, where the old one stands.
///
/// `like`: the old process, whose environment it gets (a library path, say).
pub(super) fn start(
    file: &VmFile,
    runtime: &RuntimeDir,
    plugin: &Path,
    memory: &GuestMemory,
    like: Option<u32>,
) -> Result<Process> {
    for socket in [runtime.qmp(), runtime.plugin()] {
        // Left by an earlier VM of this name.
        let _ = std::fs::remove_file(socket);
    }
    let mut command = spawn::in_own_session(&file.qemu);
    if let Some(environment) = like.and_then(environment) {
        command.env_clear().envs(environment);
    }
    let mut child = spawn::qemu(command, file, runtime, Some(plugin), memory)?;
    let process = Process::of(child.id());
    // When it ends it must not stay a zombie for as long as this helper lives.
    std::thread::spawn(move || child.wait());
    process.with_context(|| format!("QEMU ended at once; see {}", runtime.qemu_log().display()))
}

fn environment(pid: u32) -> Option<Vec<(std::ffi::OsString, std::ffi::OsString)>> {
    let words = process::environment(&process::open(pid).ok()?).ok()?.into_iter();
    let words = words.filter_map(|word| {
        let at = word.iter().position(|byte| *byte == b'=')?;
        Some((word[..at].to_vec(), word[at + 1..].to_vec()))
    });
    let kept = words.filter(|(name, _)| !name.starts_with(NOT_INHERITED.as_bytes()));
    let text = std::ffi::OsString::from_vec;
    Some(kept.map(|(name, value)| (text(name), text(value))).collect())
}

/// Its monitor, as soon as it has one.
pub(super) async fn connect(process: Process, runtime: &RuntimeDir) -> Result<Qmp> {
    let is_up = || {
        ready(if runtime.qmp().exists() { Some(true) } else { (!process.lives()).then_some(false) })
    };
    match poll_until(STARTUP, POLL_INTERVAL, is_up).await {
        Some(true) => {}
        Some(false) => bail!("the new QEMU did not come up"),
        None => bail!("the new QEMU did not open its monitor within {STARTUP:?}"),
    }
    Qmp::connect(runtime.qmp(), STARTUP).await.context("connecting to the new QEMU's monitor")
}

/// Ends a process for good, and waits until it has let go of everything.
pub(super) async fn end(process: Process) -> Result<()> {
    let end = move || process::end(process.pid, process.started);
    let ended = tokio::task::spawn_blocking(end).await;
    Ok(ended.context("internal error: ending QEMU panicked")??)
}

/// The error with what the new QEMU itself said.
pub(super) fn explain(runtime: &RuntimeDir, error: Error) -> Error {
    let said = said::quote_log(&runtime.qemu_log());
    if said.is_empty() { error } else { error.context(format!("the new QEMU said: {said}")) }
}

/// The QEMU of this instance that we started, found by its command line, when its number was not
/// written down any more.
pub(super) fn find(file: &VmFile) -> Option<Process> {
    let id = format!("id=stillpoint-{}", file.instance);
    let mut hits = process::all().filter(|process| {
        process::command_line(process)
            .is_ok_and(|words| words.iter().any(|word| word.ends_with(id.as_bytes())))
    });
    hits.find_map(|process| Process::of(process.pid.unsigned_abs()))
}
