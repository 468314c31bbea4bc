//! `stillpoint attach`: a running VM gets a helper again.

use crate::cli::AttachArgs;
use crate::helper::other::OtherHelper;
use crate::helper::{self, start};
use crate::terminal::out;
use anyhow::{Context, Result, bail};
use checkpoint_store::Mode;
use engine::checkpoint::{Force, StoreSession};
use engine::stores;
use std::path::Path;
use std::time::{Duration, Instant};
use vm::error::refused;
use vm::external::{self, Wanted};
use vm::launch;
use vm::process::Signal;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// What a helper gets to end in order.
const GRACE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub async fn run(args: AttachArgs) -> Result<()> {
    let name = args.vm()?;
    let runtime = RuntimeDir::new(args.runtime.runtime_dir.as_deref(), name)?;
    if args.take_over && runtime.path().exists() {
        end_other(&runtime).await?;
    }
    let found = match &args.qmp {
        Some(monitor) => Some(external::describe(&runtime, name, wanted(monitor, &args)?).await?),
        None => None,
    };
    let vm = runtime.vm()?;
    drop(runtime.lock_helper()?);
    launch::refuse_half_restored(&runtime)?;
    check_running(&vm, &runtime)?;
    if args.take_over {
        // At once, and by this command: a helper that remembered the order would carry it out
        // whenever it next starts.
        StoreSession::open(&vm, &runtime, Mode::CreateIfMissing, Force::TakeOver).await?;
    }
    if args.foreground {
        return helper::serve(runtime).await;
    }
    start::spawn_helper(name, args.runtime.runtime_dir.as_deref(), &runtime)?;
    let status = start::wait(&runtime).await?;
    out!(
        "helper {} is attached to {} (QEMU {}, pid {})",
        status["pid"],
        vm.name,
        status["qemu_version"].as_str().unwrap_or("?"),
        status["qemu_pid"]
    );
    if let Some(found) = found {
        out!("engine {}", found.engine);
    }
    Ok(())
}

fn wanted(monitor: &Path, args: &AttachArgs) -> Result<Wanted> {
    let store = stores::absolute(
        args.store.as_deref().context("--qmp needs --store (or STILLPOINT_STORE)")?,
    )?;
    stores::connect(&store)?;
    Ok(Wanted {
        monitor: monitor.to_owned(),
        store,
        fleecing: args.fleecing_dir.clone(),
        engine: args.engine,
        stream: args.stream,
    })
}

fn check_running(vm: &VmFile, runtime: &RuntimeDir) -> Result<()> {
    if runtime.adoption().exists() {
        // Which of the two QEMUs is the VM is for the helper to find out.
        return Ok(());
    }
    if vm.external.is_some() {
        return external::check_alive(runtime, vm);
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
async fn end_other(runtime: &RuntimeDir) -> Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if runtime.lock_helper().is_ok() {
                return Ok(());
            }
            if let Some(other) = OtherHelper::find(runtime)? {
                other.signal(signal);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    bail!(
        "the other helper of this VM does not end; its pid is in {}",
        runtime.helper_pid().display()
    )
}
