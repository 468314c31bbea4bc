//! `stillpoint restore`: lets the VM's helper restore it, and prints what came of it.

use crate::cli::RestoreArgs;
use crate::terminal::{Terminal, out, print_json};
use anyhow::{Context, Result};
use engine::progress::bytes;
use engine::restore::Request;
use helper::client;
use helper::start::Supervision;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: RestoreArgs, is_verbose: bool) -> Result<()> {
    let (json, wait) = (args.json, args.wait);
    let runtime_base = args.runtime.runtime_dir.clone();
    let supervision = Supervision::unless(args.supervision.no_supervisor);
    let restored = helper::restore::start(&request(args), supervision, is_verbose).await?;
    if wait {
        let runtime = RuntimeDir::new(runtime_base.as_deref(), &restored.name)?;
        client::wait_until_hydrated(&runtime, &Terminal).await?;
    }
    if json {
        return print_json(&serde_json::to_value(&restored).context("encoding the result")?);
    }
    out!(
        "{} {} as of {}@{}, {:.0} ms after the command, {} read from the store",
        restored.name,
        restored.state,
        restored.restored,
        restored.id,
        restored.resume_ms,
        bytes(restored.bytes_read),
    );
    if restored.memory_bytes_to_come > 0 && !wait {
        out!(
            "  {} of memory arrive while it runs; 'stillpoint status {}' shows how far they are",
            bytes(restored.memory_bytes_to_come),
            restored.name,
        );
    }
    if !restored.disks_to_come.is_empty() && !wait {
        out!("  disks that arrive while it runs: {}", restored.disks_to_come.join(", "));
    }
    restored.notes.iter().for_each(|note| out!("  note: {note}"));
    Ok(())
}

fn request(args: RestoreArgs) -> Request {
    Request {
        checkpoint: args.checkpoint,
        store: args.store.store,
        runtime_base: args.runtime.runtime_dir,
        new_name: args.new_name,
        dir: args.dir,
        qemu: args.qemu,
        fleecing: args.fleecing_dir,
        map: args.map,
        allow: args.allow,
        take_over: args.take_over,
        paused: args.paused,
        run: args.run,
        lazy: !args.eager,
        deadline: args.deadline,
    }
}
