//! Programs of the operator, before anything of a restore is made and when its guest runs.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use qmp_bridge::said;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use vm::error::refused;
use vm::launch;

/// What a hook gets to end, unless the request says otherwise.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The programs, and how long each may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hooks {
    /// Run when all checks are done and nothing is made yet; if it fails, the restore is refused.
    pub before: Option<PathBuf>,
    /// Run when the guest may run; if it fails, the VM stays.
    pub after: Option<PathBuf>,
    /// What each gets to end.
    pub timeout: Duration,
}

impl Hooks {
    /// The same with the programs' own paths: one that is missing is known before anything is made.
    pub(super) fn located(self) -> Result<Self> {
        let locate = |program: Option<PathBuf>| program.map(|name| path_of(&name)).transpose();
        Ok(Self { before: locate(self.before)?, after: locate(self.after)?, ..self })
    }
}

fn path_of(name: &Path) -> Result<PathBuf> {
    let found = match name.to_str() {
        Some(name) if !name.contains('/') => launch::on_path(name),
        _ => Some(name.to_owned()),
    };
    let found = found.and_then(|path| path.canonicalize().ok()).filter(|path| path.is_file());
    found.ok_or_else(|| refused(format!("there is no program {} for a hook", name.display())))
}

impl Default for Hooks {
    fn default() -> Self {
        Self { before: None, after: None, timeout: TIMEOUT }
    }
}

/// Runs a program in a process group of its own, which is killed when it does not end in time or
/// this future is dropped. What it leaves running when it ends is its own affair.
pub(super) async fn run(
    program: &Path,
    facts: Vec<(&'static str, OsString)>,
    timeout: Duration,
) -> Result<()> {
    let output = tempfile::tempfile().context("making a file for the output of a hook")?;
    let copy = || Ok::<_, anyhow::Error>(Stdio::from(output.try_clone().context("for a hook")?));
    let mut command = Command::new(program);
    command
        .envs(facts)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(copy()?)
        .stderr(copy()?);
    let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
    let mut group = Group(Some(child));
    let ended = group.wait(timeout).await.context("waiting for a hook")?;
    let Some(status) = ended else {
        drop(group);
        bail!(
            "{} did not end within {timeout:?} and was killed{}",
            program.display(),
            quoted(output)
        );
    };
    if !status.success() {
        bail!("{} failed ({status}){}", program.display(), quoted(output));
    }
    Ok(())
}

fn quoted(output: File) -> String {
    let said = said::quote_file(output);
    if said.is_empty() { said } else { format!("; it said: {said}") }
}

/// A hook that has not ended.
struct Group(Option<Child>);

impl Group {
    /// None if it does not end in time.
    async fn wait(
        &mut self,
        timeout: Duration,
    ) -> std::io::Result<Option<std::process::ExitStatus>> {
        let Some(child) = &mut self.0 else { return Ok(None) };
        match tokio::time::timeout(timeout, child.wait()).await {
            Ok(status) => {
                self.0 = None;
                status.map(Some)
            }
            Err(_) => Ok(None),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not waited for yet, so the number is still its own.
        if let Some(pid) = self.0.as_ref().and_then(Child::id) {
            let _ = killpg(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    const LONG: Duration = Duration::from_secs(30);

    fn program(place: &Path, words: &str) -> PathBuf {
        let path = place.join("hook");
        std::fs::write(&path, format!("#!/bin/sh\n{words}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn hook_has_facts_and_no_input() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let words = format!("read line; echo \"$NAME $?\" > {}", out.display());
        let facts = vec![("NAME", OsString::from("web 1"))];
        run(&program(place.path(), &words), facts, LONG).await.unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "web 1 1\n");
    }

    #[tokio::test]
    async fn hook_that_fails_is_quoted() {
        let place = tempfile::tempdir().unwrap();
        let hook = program(place.path(), "echo begun; echo 'no bridge' >&2; exit 3");
        let error = run(&hook, Vec::new(), LONG).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("no bridge"), "{error}");
        let error = run(&place.path().join("none"), Vec::new(), LONG).await.unwrap_err();
        assert!(error.to_string().contains("starting"), "{error}");
    }

    /// With all that it has started.
    #[tokio::test]
    async fn hook_that_does_not_end_is_killed() {
        let place = tempfile::tempdir().unwrap();
        let fifo = place.path().join("fifo");
        let words = format!("mkfifo {0}; echo waiting; (exec cat {0}) & wait", fifo.display());
        let hook = program(place.path(), &words);
        let error = run(&hook, Vec::new(), Duration::from_secs(2)).await.unwrap_err().to_string();
        assert!(error.contains("did not end within 2s"), "{error}");
        assert!(error.ends_with("waiting"), "{error}");
        // No process has the reading end any more.
        let end = std::time::Instant::now() + LONG;
        let is_read = || {
            let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
            File::options().write(true).custom_flags(flags).open(&fifo).is_ok()
        };
        while is_read() {
            assert!(std::time::Instant::now() < end, "what the hook has started lives");
            tokio::task::yield_now().await;
        }
    }

    /// As when the command is interrupted.
    #[tokio::test]
    async fn hook_of_a_restore_that_is_dropped_is_killed() {
        let place = tempfile::tempdir().unwrap();
        let begun = place.path().join("begun");
        let hook =
            program(place.path(), &format!("echo $$ > {}; exec sleep 1000", begun.display()));
        let running = tokio::spawn(async move { run(&hook, Vec::new(), LONG).await });
        let pid = loop {
            let text = std::fs::read_to_string(&begun).unwrap_or_default();
            if let Ok(pid) = text.trim().parse::<u32>() {
                break pid;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        let end = std::time::Instant::now() + LONG;
        while vm::process::started(pid).is_some() {
            assert!(std::time::Instant::now() < end, "the hook lives");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn hook_may_leave_a_service_running() {
        let place = tempfile::tempdir().unwrap();
        let (fifo, out) = (place.path().join("fifo"), place.path().join("out"));
        let words = format!("mkfifo {0}; cat {0} > {1} &", fifo.display(), out.display());
        run(&program(place.path(), &words), Vec::new(), LONG).await.unwrap();
        tokio::task::spawn_blocking(move || std::fs::write(fifo, "alive")).await.unwrap().unwrap();
        while std::fs::read_to_string(&out).unwrap_or_default() != "alive" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
