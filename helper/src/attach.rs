//! A running VM gets a helper again: what has to be so first.

use crate::other::OtherHelper;
use anyhow::{Result, bail};
use std::time::Duration;
use tokio::time::Instant;
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::external;
use vm::launch;
use vm::process::Signal;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// What a helper gets to end in order, and what the kernel gets to end it.
const ENDING: [(Signal, Duration); 2] =
    [(Signal::TERM, Duration::from_secs(5)), (Signal::KILL, Duration::from_secs(5))];
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The VM that a helper of this directory would attach to.
///
/// # Errors
/// Refused while another helper holds the VM, when it does not run, or when it was restored only by
/// half.
pub fn check(runtime: &RuntimeDir) -> Result<VmFile, EngineError> {
    attachable(runtime).in_phase(Phase::Attach)
}

fn attachable(runtime: &RuntimeDir) -> Result<VmFile> {
    let vm = runtime.vm()?;
    drop(runtime.lock_helper()?);
    launch::refuse_half_restored(runtime)?;
    check_running(&vm, runtime)?;
    Ok(vm)
}

pub(crate) fn check_running(vm: &VmFile, runtime: &RuntimeDir) -> Result<()> {
    if runtime.adoption().exists() {
        // Which of the two QEMUs is the VM is for the helper to find out.
        return Ok(());
    }
    if vm.external.is_some() {
        return Ok(external::check_alive(runtime, vm)?);
    }
    let socket = runtime.plugin();
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_) => Ok(()),
        Err(_) => Err(refused(format!(
            "{} does not run: no process answers at {}",
            vm.name,
            socket.display()
        ))),
    }
}

/// Ends the helper that holds the VM, by force if it does not listen. The guest does not notice
/// either way.
///
/// # Errors
/// When the process that holds the VM is no helper of it, or does not end.
pub async fn end_other(runtime: &RuntimeDir) -> Result<(), EngineError> {
    end_by(ENDING, runtime).await.in_phase(Phase::Attach)
}

async fn end_by(ending: [(Signal, Duration); 2], runtime: &RuntimeDir) -> Result<()> {
    for (signal, grace) in ending {
        let end = Instant::now() + grace;
        while Instant::now() < end {
            if runtime.lock_helper().is_ok() {
                return Ok(());
            }
            if let Some(other) = OtherHelper::find(runtime)? {
                if signal == Signal::KILL {
                    other.end_supervisor(runtime);
                }
                other.signal(signal);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    bail!(
        "the other helper of this VM does not end; its pid is in {}",
        runtime.helper_pid().display()
    )
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::Place;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command, Stdio};
    use vm::error::Class;

    /// With a VM whose plugin answers.
    fn running() -> (Place, UnixListener) {
        let place = Place::new();
        place.runtime.save_vm(&place.file(std::process::id())).unwrap();
        let plugin = UnixListener::bind(place.runtime.plugin()).unwrap();
        (place, plugin)
    }

    fn refusal(place: &Place) -> String {
        let refusal = check(&place.runtime).unwrap_err();
        assert_eq!((refusal.class(), refusal.phase()), (Class::Refused, Phase::Attach));
        refusal.explain()
    }

    #[test]
    fn attach_needs_a_vm_that_runs() {
        let place = Place::new();
        assert!(refusal(&place).contains("no VM is known"));
        place.runtime.save_vm(&place.file(std::process::id())).unwrap();
        assert!(refusal(&place).contains("vm does not run"));
        let (place, plugin) = running();
        assert_eq!(check(&place.runtime).unwrap().name.as_str(), "vm");
        drop(plugin);
        assert!(refusal(&place).contains("vm does not run"), "a socket that a dead one left");
    }

    #[test]
    fn attach_is_refused_while_another_helper_holds_the_vm() {
        let (place, _plugin) = running();
        let lock = place.runtime.lock_helper().unwrap();
        place.runtime.replace("helper.pid", b"4711").unwrap();
        assert!(refusal(&place).contains("pid 4711"));
        drop(lock);
        check(&place.runtime).unwrap();
        // It is free for the helper that comes next.
        place.runtime.lock_helper().unwrap();
    }

    #[test]
    fn attach_is_refused_to_a_vm_that_was_restored_by_half() {
        let (place, _plugin) = running();
        place.runtime.replace("restore.json", b"{}").unwrap();
        assert!(refusal(&place).contains("stillpoint restore"));
    }

    /// Which of its two QEMUs runs is for the helper to find out.
    #[test]
    fn attach_leaves_an_interrupted_adoption_to_the_helper() {
        let place = Place::new();
        place.runtime.save_vm(&place.file(std::process::id())).unwrap();
        place.runtime.replace("adopt.json", b"{}").unwrap();
        check(&place.runtime).unwrap();
    }

    /// Another process that holds the VM's lock, until it ends; `words` are what it does first.
    fn holder(place: &Place, words: &str) -> Child {
        let lock = place.runtime.path().join("helper.lock");
        drop(place.runtime.lock_helper().unwrap());
        let words = format!("{words}; echo ready; read line");
        let mut child = Command::new("flock")
            .arg("--no-fork")
            .arg(&lock)
            .args(["sh", "-c", &words])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("flock of util-linux");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        place.runtime.replace("helper.pid", child.id().to_string().as_bytes()).unwrap();
        child
    }

    #[tokio::test]
    async fn take_over_ends_the_other_helper_and_waits_for_its_lock() {
        let place = Place::new();
        end_other(&place.runtime).await.unwrap();
        let mut other = holder(&place, ":");
        end_other(&place.runtime).await.unwrap();
        drop(place.runtime.lock_helper().unwrap());
        assert!(!other.wait().unwrap().success());
    }

    #[tokio::test]
    async fn take_over_kills_a_helper_that_does_not_listen() {
        use std::os::unix::process::ExitStatusExt;
        let place = Place::new();
        let mut other = holder(&place, "trap '' TERM");
        let [(term, _), kill] = ENDING;
        end_by([(term, POLL_INTERVAL), kill], &place.runtime).await.unwrap();
        assert_eq!(other.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
    }

    /// One that cannot be ended is said, and left.
    #[tokio::test]
    async fn take_over_fails_while_the_lock_is_held() {
        let place = Place::new();
        let mut other = holder(&place, "trap '' TERM");
        let [(term, _), _] = ENDING;
        let short = [(term, POLL_INTERVAL); 2];
        let error = end_by(short, &place.runtime).await.unwrap_err().to_string();
        assert!(error.contains("does not end") && error.contains("helper.pid"), "{error}");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
