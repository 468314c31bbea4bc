//! Starting a helper, and waiting until it is up.

use crate::client;
use crate::control::Status;
use anyhow::{Context, Result, anyhow, bail};
use checkpoint_format::VmName;
use qmp_bridge::said;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::time::Instant;
use vm::error::{EngineError, InPhase, Phase};
use vm::runtime_dir::RuntimeDir;

/// A helper is up in tens of milliseconds; a busy host may need longer.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Whether a helper that dies is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supervision {
    /// By the process that starts it.
    On,
    /// Not by us.
    Off,
}

impl Supervision {
    /// `is_off` is the operator's order.
    pub fn unless(is_off: bool) -> Self {
        if is_off { Self::Off } else { Self::On }
    }

    /// The command of this program that is started.
    fn word(self) -> &'static str {
        match self {
            Self::On => "supervise",
            Self::Off => "helper",
        }
    }
}

/// Starts the helper in a session of its own, not as a child of what will be QEMU.
///
/// # Errors
/// When the process cannot be started.
pub fn spawn(
    name: &VmName,
    runtime_base: Option<&Path>,
    runtime: &RuntimeDir,
    supervision: Supervision,
) -> Result<(), EngineError> {
    start(name, runtime_base, runtime, supervision).in_phase(Phase::Attach)
}

fn start(
    name: &VmName,
    runtime_base: Option<&Path>,
    runtime: &RuntimeDir,
    supervision: Supervision,
) -> Result<()> {
    let log = runtime.open_helper_log()?;
    runtime.forget_helper_failure()?;
    let mut command = command(&["--fork"], name, runtime_base, supervision)?;
    command.stdin(Stdio::null()).stderr(log).current_dir("/");
    let status =
        command.status().context("starting the helper through setsid (package util-linux)")?;
    if !status.success() {
        bail!(
            "setsid could not start the helper: {status}; see {}",
            runtime.helper_log().display()
        );
    }
    Ok(())
}

/// This program as the helper of a VM, in a session of its own by `setsid` with `options`.
pub(crate) fn command(
    options: &[&str],
    name: &VmName,
    runtime_base: Option<&Path>,
    supervision: Supervision,
) -> Result<Command> {
    let program = std::env::current_exe().context("finding this program's own path")?;
    let mut command = Command::new("setsid");
    command.args(options).arg(program).arg(supervision.word());
    if let Some(base) = runtime_base {
        command
            .arg("--runtime-dir")
            .arg(std::path::absolute(base).context("making --runtime-dir absolute")?);
    }
    command.arg(name.as_str()).stdout(Stdio::null());
    Ok(command)
}

/// Until the helper of the VM answers, or has said why it ended.
///
/// # Errors
/// The helper's own, with its class and phase; or when it does not come up in time.
pub async fn wait(runtime: &RuntimeDir) -> Result<Status, EngineError> {
    let end = Instant::now() + TIMEOUT;
    loop {
        let error = match client::status(runtime).await {
            Ok(status) => return Ok(status),
            Err(error) => error,
        };
        if let Some(mut failure) = runtime.helper_failure() {
            failure.message = format!(
                "the helper ended: {}; its log is {}",
                failure.message,
                runtime.helper_log().display()
            );
            return Err(failure.into());
        }
        if Instant::now() >= end {
            return Err(anyhow!(
                "the helper did not come up within {TIMEOUT:?} ({}); its log {} ends with: {}",
                error.explain(),
                runtime.helper_log().display(),
                said::quote_log(&runtime.helper_log())
            ))
            .in_phase(Phase::Attach);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::Place;
    use std::io::Write;
    use vm::error::{Class, refused};
    use vm::runtime_dir::Failure;

    #[test]
    fn helper_is_started_in_a_session_of_its_own_for_its_vm() {
        let base = Path::new("run");
        let name = "web1".parse().unwrap();
        let command = |supervision| command(&["--fork"], &name, Some(base), supervision).unwrap();
        let (supervised, command) = (command(Supervision::On), command(Supervision::Off));
        assert_eq!(supervised.get_args().nth(2), Some("supervise".as_ref()));
        assert_eq!(command.get_program(), "setsid");
        let words: Vec<_> = command.get_args().collect();
        let absolute = std::path::absolute(base).unwrap();
        let program = std::env::current_exe().unwrap();
        let [fork, own, helper, option, directory, name] = words[..] else { panic!("{words:?}") };
        assert_eq!((fork, own), ("--fork".as_ref(), program.as_os_str()));
        // The helper leaves the working directory.
        assert_eq!((helper, option), ("helper".as_ref(), "--runtime-dir".as_ref()));
        assert_eq!((directory, name), (absolute.as_os_str(), "web1".as_ref()));
    }

    #[tokio::test]
    async fn helper_that_is_up_ends_the_wait() {
        let place = Place::new();
        let helper = place.helper(&[r#"{"done":{"pid":7,"busy":true}}"#]);
        assert_eq!(wait(&place.runtime).await.unwrap().pid, 7);
        helper.join().unwrap();
    }

    #[tokio::test]
    async fn helper_that_failed_is_quoted_with_its_class_and_phase() {
        let place = Place::new();
        let error = EngineError::new(Phase::Recover, refused("another QEMU has that name"));
        place.runtime.set_helper_failure(&Failure::of(&error));
        let failure = wait(&place.runtime).await.unwrap_err();
        assert_eq!((failure.class(), failure.phase()), (Class::Refused, Phase::Recover));
        let said = failure.explain();
        assert!(said.starts_with("the helper ended: another QEMU has that name; "), "{said}");
        assert!(said.ends_with("helper.log"), "{said}");
    }

    #[tokio::test(start_paused = true)]
    async fn helper_that_does_not_come_up_is_quoted_by_the_end_of_its_log() {
        let place = Place::new();
        let mut log = place.runtime.open_helper_log().unwrap();
        (0..100).for_each(|number| writeln!(log, "line {number}").unwrap());
        writeln!(log, "no such device").unwrap();
        let begun = Instant::now();
        let failure = wait(&place.runtime).await.unwrap_err();
        assert!(begun.elapsed() >= TIMEOUT);
        assert_eq!((failure.class(), failure.phase()), (Class::Failed, Phase::Attach));
        let said = failure.explain();
        assert!(said.contains("no helper answers"), "{said}");
        assert!(said.ends_with("no such device") && !said.contains("line 1;"), "{said}");
    }
}
