//! `stillpoint checkpoint`: asks the helper for one, and prints what came of it.

use super::prove::prove;
use crate::cli::CheckpointArgs;
use crate::terminal::{out, print_json, show_updates};
use anyhow::Result;
use engine::checkpoint::Choice;
use engine::checkpoint::outcome::{Kind, Outcome};
use engine::progress::bytes;
use helper::client;
use vm::runtime_dir::RuntimeDir;

pub(crate) async fn run(args: &CheckpointArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let choice = Choice { engine: args.engine, stream: args.stream, full: args.full };
    let mut result = client::checkpoint(&runtime, choice, show_updates()).await?;
    let outcome: Outcome = client::decode(result.clone())?;
    if !args.json {
        out!("{}", describe(&args.name, &outcome));
        outcome.notes.iter().for_each(|note| out!("  note: {note}"));
    }
    let proof =
        if args.verify { Some(prove(&runtime, &args.name, outcome.id).await) } else { None };
    if args.json {
        // Whatever the proof says, the checkpoint is there.
        result["proof"] =
            proof.as_ref().and_then(|proof| proof.as_ref().ok()).cloned().unwrap_or_default();
        print_json(&result)?;
    } else if let Some(Ok(proof)) = &proof {
        let (version, ms) = (
            proof["qemu_version"].as_str().unwrap_or("?"),
            proof["total_ms"].as_u64().unwrap_or_default(),
        );
        out!("  proven: restored with QEMU {version} and compared in {ms} ms");
    }
    proof.transpose().map(drop)
}

fn describe(name: &checkpoint_format::VmName, outcome: &Outcome) -> String {
    let Outcome { id, pause_ms, durable_ms, .. } = outcome;
    if outcome.kind == Kind::Unchanged {
        return format!("{name}@{id} still holds: nothing changed since (paused {pause_ms:.1} ms)");
    }
    let parent =
        outcome.parent.map(|parent| format!("on {parent}")).unwrap_or_else(|| "full".to_owned());
    let (changed, stored) = (bytes(outcome.bytes_changed), bytes(outcome.bytes_stored));
    let earlier = match outcome.bytes_carried {
        0 => String::new(),
        carried => format!(" ({} of it by earlier tries)", bytes(carried)),
    };
    format!(
        "{name}@{id} ({parent}): paused {pause_ms:.1} ms, {changed} changed, {stored} stored{earlier}, durable after {durable_ms:.0} ms"
    )
}
