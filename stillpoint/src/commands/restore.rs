//! `stillpoint restore`: restores the VM, gives it a helper, and prints what came of it.

use crate::cli::RestoreArgs;
use crate::terminal::{Terminal, out, print_json};
use anyhow::{Context, Result};
use engine::progress::bytes;
use engine::restore::{self, Request};
use helper::start;
use std::sync::Arc;

pub async fn run(args: RestoreArgs) -> Result<()> {
    let json = args.json;
    let runtime_base = args.runtime.runtime_dir.clone();
    let restored = restore::run(request(args)).await?;
    start::spawn(&restored.name, runtime_base.as_deref(), &restored.runtime)?;
    let helper = start::wait(&restored.runtime).await;
    helper.with_context(|| {
        format!(
            "{} is restored, but has no helper ('stillpoint attach {0}' starts one)",
            restored.name
        )
    })?;
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
        progress: Arc::new(Terminal),
    }
}
