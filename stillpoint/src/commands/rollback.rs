//! `stillpoint rollback`: asks the helper to do it, and prints what came of it.

use crate::cli::RollbackArgs;
use crate::terminal::{out, print_json, show_updates};
use anyhow::Result;
use engine::progress::bytes;
use engine::rollback::{Report, Request};
use helper::{client, control};
use vm::error::usage;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: &RollbackArgs) -> Result<()> {
    let name = &args.checkpoint.vm;
    let id = args.checkpoint.id.ok_or_else(|| {
        usage(format!("which checkpoint of {name}? Name one, as in 'stillpoint rollback {name}@7'"))
    })?;
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), name)?;
    let request = control::Request::Rollback(Request { id, discard: args.discard });
    let result = client::ask(&runtime, &request, show_updates()).await?;
    if args.json {
        return print_json(&result);
    }
    out!("{}", describe(&client::decode(result)?));
    Ok(())
}

fn describe(done: &Report) -> String {
    const PAGE: u64 = checkpoint_format::PAGE_SIZE as u64;
    let Report { name, id, saved, pause_ms, pages_written, disk_bytes_written, .. } = done;
    let (memory, disks) = (bytes(pages_written * PAGE), bytes(*disk_bytes_written));
    let state = if done.running { "runs" } else { "is paused" };
    format!(
        "{name} {state} as of {name}@{id} (set back from {name}@{saved}): paused {pause_ms:.1} ms, \
         {memory} of memory and {disks} of disks differed"
    )
}
