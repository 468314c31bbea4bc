//! `stillpoint adopt`: a machine that is attached by its monitor moves into a QEMU of ours while it runs.
//!
//! ```text
//! plan      nothing done   what is in the way is refused, with what to do
//! start     guest runs     a second QEMU of the same machine, paused, its RAM in our memory
//! move      guest runs     QEMU's own live migration, over a unix socket
//! switch    guest stands   rest of memory, devices, disks; the decision; `cont` in the new QEMU
//! finish    guest runs     the old QEMU ends, sockets get their names, machine.json says what there is now
//! ```
//! The files come in that order: [`plan`] (with [`mod@line`], [`sockets`] and [`host`]), [`destination`], [`steps`] (with [`memory`]), [`record`]
//! (how far it is, on disk), [`finish`], [`mod@recover`] (back, or on, after a failure or a killed helper).

mod destination;
mod finish;
mod host;
mod line;
mod memory;
mod plan;
mod record;
mod recover;
mod sockets;
mod steps;

use crate::cli::AdoptArgs;
use crate::control::{Adopted, Request};
use crate::helper::client::ask;
use crate::launch;
use crate::runtime::RuntimeDir;
use crate::terminal::out;
use anyhow::{Context, Result};

pub use recover::recover;
pub use steps::adopt;

/// Asks the machine's helper, which holds its monitor.
pub async fn run(args: &AdoptArgs) -> Result<()> {
    let runtime = RuntimeDir::of_helper(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let qemu = args.qemu.as_deref().map(launch::find_program).transpose()?;
    let result = ask(&runtime, &Request::Adopt { qemu }).await?;
    if args.json {
        return crate::inspect::print_json(&result);
    }
    let adopted: Adopted = serde_json::from_value(result).context("the helper's answer is not understood")?;
    out!("{}", describe(&args.name, &adopted));
    adopted.notes.iter().for_each(|note| out!("  note: {note}"));
    Ok(())
}

fn describe(name: &checkpoint_format::VmName, adopted: &Adopted) -> String {
    let Adopted { downtime_ms, qemu_downtime_ms, total_ms, source_pid, pid, .. } = adopted;
    let by_qemu = qemu_downtime_ms.map_or_else(String::new, |ms| format!(" ({ms:.0} ms by QEMU's own count)"));
    format!("{name} moved from QEMU {source_pid} to {pid}: the guest stood for {downtime_ms:.1} ms{by_qemu}, {total_ms:.0} ms in all")
}
