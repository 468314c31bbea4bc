//! Kill points: `STILLPOINT_DIE_AT=NAME` in a helper's environment makes it die there by SIGKILL,
//! as a crash would have it.
//!
//! For tests of what a dead helper leaves behind. Without the variable a point is one comparison of
//! an empty option.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::OnceLock;
use std::time::Duration;

const HOLD_POLL: Duration = Duration::from_millis(10);

/// Every point, in the order in which a checkpoint passes them, then an adoption, then a
/// restore, then a rollback.
pub const POINTS: &[&str] = &[
    "prepare",
    "prepared",
    "pre-copy.paused",
    "pre-copy",
    "pause.paused",
    "stream.prepared",
    "stream.started",
    "stream.switched",
    "stream.completed",
    "stream.captured",
    "stream.held",
    "stream.read",
    "pause.captured",
    "upload.disks",
    "upload",
    "uploaded",
    "commit",
    "committed",
    "adopt.plan",
    "adopt.started",
    "adopt.migrating",
    "adopt.switchover",
    "adopt.completed",
    "adopt.decided",
    "adopt.running",
    "adopt.done",
    "restore.started",
    "restore.loaded",
    "restore.claimed",
    "restore.listening",
    "restore.fault",
    "restore.filling",
    "restore.zeros",
    "restore.hydrated",
    "restore.recorded",
    "restore.disks-arrived",
    "rollback.staged",
    "rollback.paused",
    "rollback.begun",
    "rollback.disks",
    "rollback.memory",
    "rollback.loaded",
    "rollback.recorded",
];

/// What `STILLPOINT_DAMAGE=WHAT=VALUE` asks a proof to spoil before it compares, so that tests see
/// it found: `memory=OFFSET` inverts a byte of the guest's RAM, `layer=OFFSET` one of the first
/// layer's local file, `monitor=LINE` gives the restored QEMU a monitor command, and so does a
/// rollback before it loads the device state. `state=BYTES` cuts
/// so many off the device state that a rollback loads.
pub(crate) fn damage(what: &str) -> Option<String> {
    let chosen = std::env::var("STILLPOINT_DAMAGE").ok()?;
    chosen.strip_prefix(what)?.strip_prefix('=').map(str::to_owned)
}

/// The two parts of memory that come by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filling {
    /// What the guest needed first the last time.
    First,
    /// All the rest.
    Rest,
}

/// While the file that `STILLPOINT_HOLD_FILLER=PATH` names exists, memory that is still to come
/// comes only when the guest needs it, so that tests see a restored VM in that state for as long as
/// they want. If the file holds the word `rest`, what the guest needed first comes all the same.
pub(crate) async fn hold_filler(part: Filling) {
    while holds_filler(part) {
        tokio::time::sleep(HOLD_POLL).await;
    }
}

/// Whether that file holds this part; while it exists, nothing is copied into disks either.
pub(crate) fn holds_filler(part: Filling) -> bool {
    let path = std::env::var_os("STILLPOINT_HOLD_FILLER");
    let held = path.and_then(|path| vm::files::read(path).ok());
    held.is_some_and(|held| part == Filling::Rest || held != b"rest")
}

/// Dies here if that was asked for.
pub(crate) fn point(name: &'static str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let chosen = CHOSEN.get_or_init(|| std::env::var("STILLPOINT_DIE_AT").ok());
    if chosen.as_deref() == Some(name) {
        tracing::error!(name, "dying, as STILLPOINT_DIE_AT asks");
        // It cannot fail for ourselves, and cannot be caught.
        let _ = kill(Pid::this(), Signal::SIGKILL);
    }
}
