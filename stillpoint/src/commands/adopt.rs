//! `stillpoint adopt`: asks the helper to do it, and prints what came of it.

use crate::cli::AdoptArgs;
use crate::terminal::{out, print_json, show_updates};
use anyhow::Result;
use engine::adopt::Adopted;
use helper::client;
use helper::control::Request;
use vm::launch;
use vm::runtime_dir::RuntimeDir;

/// Asks the VM's helper, which holds its monitor.
pub(crate) async fn run(args: &AdoptArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let qemu = args.qemu.as_deref().map(launch::find_program).transpose()?;
    let result = client::ask(&runtime, &Request::Adopt { qemu }, show_updates()).await?;
    if args.json {
        return print_json(&result);
    }
    let adopted: Adopted = client::decode(result)?;
    out!("{}", describe(&args.name, &adopted));
    adopted.notes.iter().for_each(|note| out!("  note: {note}"));
    Ok(())
}

fn describe(name: &checkpoint_format::VmName, adopted: &Adopted) -> String {
    let Adopted { downtime_ms, qemu_downtime_ms, total_ms, source_pid, pid, .. } = adopted;
    let by_qemu = qemu_downtime_ms
        .map_or_else(String::new, |ms| format!(" ({ms:.0} ms by QEMU's own count)"));
    format!(
        "{name} moved from QEMU {source_pid} to {pid}: the guest stood for {downtime_ms:.1} ms{by_qemu}, {total_ms:.0} ms in all"
    )
}
