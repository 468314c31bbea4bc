//! The process that starts a VM's helper, and another one whenever that dies.
//!
//! It is the helper's parent, has one thread, and only waits. A helper that ends by itself says by
//! its exit code that it is not needed any more. After any other end (a signal, a panic, a later
//! helper that cannot attach) the next one takes over, after a pause that grows, for as long as the
//! VM's QEMU runs: a guest whose memory is still arriving waits for it.
//!
//! Which QEMU that is the runtime directory says at that moment; an adoption may have put another
//! in its place. No lock is held: where `stillpoint attach` has started a helper meanwhile, that
//! one has the VM, and this process ends.

use crate::attach;
use anyhow::{Context, Result};
use checkpoint_format::VmName;
use rustix::process::{Signal, getpid, kill_process};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};
use vm::error::{Class, EngineError, InPhase, Phase};
use vm::process::ProcessFd;
use vm::runtime_dir::RuntimeDir;

/// A guest may be waiting for the next helper.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The end of a helper that lived so long has nothing to do with that of the one before.
const STABLE: Duration = Duration::from_secs(60);
/// Exit code of a Rust program whose first thread panicked.
const PANICKED: i32 = 101;

/// What is supervised: the helper of one VM.
pub struct Supervisor {
    program: PathBuf,
    runtime_base: Option<PathBuf>,
    name: VmName,
}

impl Supervisor {
    /// Of the VM `name`, whose runtime directory is below `runtime_base`.
    ///
    /// # Errors
    /// When the path of this program is not known.
    pub fn new(runtime_base: Option<PathBuf>, name: VmName) -> Result<Self, EngineError> {
        // Asked once: where the program is replaced meanwhile, the next helper is of the new one.
        let program = std::env::current_exe().context("finding this program's own path");
        let program = program.in_phase(Phase::Attach)?;
        Ok(Self { program, runtime_base, name })
    }

    /// Starts the helper with `arguments` and with the standard input and error of this process,
    /// and the next ones without either. Returns how the last one ended, when no other is needed.
    ///
    /// # Errors
    /// When no process can be started or waited for.
    pub fn run(&self, arguments: &[&str]) -> Result<ExitStatus, EngineError> {
        self.supervise(arguments).in_phase(Phase::Attach)
    }

    fn supervise(&self, arguments: &[&str]) -> Result<ExitStatus> {
        let mut command = self.command();
        let mut helper = command.args(arguments).spawn().context("starting the helper")?;
        let mut pauses = Pauses::default();
        let mut is_first = true;
        loop {
            // What was given to the helper is not held open here.
            self.leave_standard_streams()?;
            let begun = Instant::now();
            let status = helper.wait().context("waiting for the helper")?;
            if status.success() || (is_first && !is_crash(status)) {
                return Ok(status);
            }
            match self.next(status, pauses.after(begun.elapsed()))? {
                Some(next) => helper = next,
                None => return Ok(status),
            }
            is_first = false;
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("helper");
        if let Some(base) = &self.runtime_base {
            command.arg("--runtime-dir").arg(base);
        }
        command.arg(self.name.as_str());
        command
    }

    /// The helper after one that ended with `status`, unless QEMU ends within `pause`.
    fn next(&self, status: ExitStatus, pause: Duration) -> Result<Option<Child>> {
        let runtime = RuntimeDir::new(self.runtime_base.as_deref(), &self.name)?;
        if !is_wanted(&runtime, status) {
            return Ok(None);
        }
        self.leave_standard_streams()?;
        tracing::error!(%status, ?pause, "the helper has ended; another one takes its place");
        if has_ended_within(&runtime, pause)? || !is_wanted(&runtime, status) {
            return Ok(None);
        }
        runtime.forget_helper_failure()?;
        // The point where a test lets a helper die is passed once.
        let next = self.command().env_remove("STILLPOINT_DIE_AT").spawn();
        Ok(Some(next.context("starting another helper")?))
    }

    fn leave_standard_streams(&self) -> Result<()> {
        let about = "leaving the standard streams";
        let nothing = File::options().read(true).write(true).open("/dev/null").context(about)?;
        rustix::stdio::dup2_stdin(&nothing).context(about)?;
        let runtime = RuntimeDir::new(self.runtime_base.as_deref(), &self.name);
        // A VM that is still to be restored has none.
        let log = runtime.and_then(|runtime| runtime.open_helper_log()).unwrap_or(nothing);
        rustix::stdio::dup2_stderr(&log).context(about)?;
        std::env::set_current_dir("/").context(about)
    }
}

/// Of a process that a signal has killed: the same one kills this process. Who waits for it sees
/// the end of what it is.
pub fn die_as(status: ExitStatus) {
    if let Some(signal) = status.signal().and_then(Signal::from_named_raw) {
        // It cannot fail for ourselves.
        let _ = kill_process(getpid(), signal);
    }
}

fn is_crash(status: ExitStatus) -> bool {
    status.code().is_none_or(|code| code == PANICKED)
}

/// Whether the VM runs, after a restore not by half, and has no other helper.
fn is_wanted(runtime: &RuntimeDir, status: ExitStatus) -> bool {
    let is_refused = status.code() == Some(Class::Refused.exit_code().into());
    let has_other = is_refused && runtime.lock_helper().is_err();
    let runs = || runtime.vm().is_ok_and(|vm| attach::check_running(&vm, runtime).is_ok());
    !has_other && !runtime.restore_record().exists() && runs()
}

/// Waits so long for QEMU's end.
fn has_ended_within(runtime: &RuntimeDir, pause: Duration) -> Result<bool> {
    let is_one = !runtime.adoption().exists();
    let pid = runtime.vm().ok().and_then(|vm| vm.pid).filter(|_| is_one);
    match pid.map(ProcessFd::open).transpose()?.flatten() {
        Some(qemu) => Ok(qemu.wait(pause)?),
        // One of two, or one whose process is not known.
        None => {
            std::thread::sleep(pause);
            Ok(false)
        }
    }
}

/// Between two helpers: each twice as long as the one before.
#[derive(Default)]
struct Pauses(u32);

impl Pauses {
    /// After a helper that lived so long.
    fn after(&mut self, life: Duration) -> Duration {
        if life >= STABLE {
            self.0 = 0;
        }
        let pause = FIRST_PAUSE.saturating_mul(1_u32.checked_shl(self.0).unwrap_or(u32::MAX));
        self.0 = (self.0 + 1).min(u32::BITS);
        pause.min(LONGEST_PAUSE)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn supervisor_pauses_grow_to_a_limit_and_begin_again_after_a_stable_helper() {
        let mut pauses = Pauses::default();
        let first: Vec<u128> = (0..4).map(|_| pauses.after(Duration::ZERO).as_millis()).collect();
        assert_eq!(first, [100, 200, 400, 800]);
        let later = (0..100).map(|_| pauses.after(Duration::ZERO)).min();
        assert!(later > Some(Duration::from_millis(800)));
        assert_eq!(pauses.after(Duration::ZERO), LONGEST_PAUSE);
        assert_eq!(pauses.after(STABLE), FIRST_PAUSE);
    }

    #[test]
    fn supervisor_tells_a_crash_from_a_failure() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert!(is_crash(ExitStatus::from_raw(9)) && is_crash(exited(PANICKED)));
        assert!(!is_crash(exited(0)) && !is_crash(exited(1)) && !is_crash(exited(3)));
    }

    #[test]
    fn supervisor_wants_no_helper_for_a_vm_that_does_not_run() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        assert!(!is_wanted(&runtime, ExitStatus::from_raw(9)));
    }
}
