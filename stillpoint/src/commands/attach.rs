//! `stillpoint attach`: a running VM gets a helper again.

use crate::cli::AttachArgs;
use crate::terminal::out;
use anyhow::{Context, Result};
use checkpoint_store::Mode;
use engine::checkpoint::{Force, StoreSession};
use engine::stores;
use helper::attach;
use helper::start::{self, Supervision};
use std::path::Path;
use vm::external::{self, Wanted};
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: AttachArgs) -> Result<()> {
    let name = args.vm()?;
    let runtime = RuntimeDir::new(args.runtime.runtime_dir.as_deref(), name)?;
    if args.take_over && runtime.path().exists() {
        attach::end_other(&runtime).await?;
    }
    let found = match &args.qmp {
        Some(monitor) => Some(external::describe(&runtime, name, wanted(monitor, &args)?).await?),
        None => None,
    };
    let vm = attach::check(&runtime)?;
    if args.take_over {
        // At once, and by this command: a helper that remembered the order would carry it out
        // whenever it next starts.
        StoreSession::open(&vm, &runtime, Mode::CreateIfMissing, Force::TakeOver).await?;
    }
    if args.foreground {
        return Ok(helper::serve(runtime).await?);
    }
    let supervision = Supervision::unless(args.supervision.no_supervisor);
    start::spawn(name, args.runtime.runtime_dir.as_deref(), &runtime, supervision)?;
    let helper = start::wait(&runtime).await?;
    let of_qemu = helper.vm.map_or_else(
        || "QEMU ?".to_owned(),
        |vm| format!("QEMU {}, pid {}", vm.qemu_version, vm.qemu_pid),
    );
    out!("helper {} is attached to {} ({of_qemu})", helper.pid, vm.name);
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
