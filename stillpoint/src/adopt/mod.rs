//! `stillpoint adopt`: a machine that is attached by its monitor moves into a QEMU of ours while it runs.

use crate::cli::AdoptArgs;
use crate::control::Request;
use crate::helper::client::ask;
use crate::launch;
use crate::runtime::RuntimeDir;
use anyhow::Result;

/// Asks the machine's helper, which holds its monitor.
pub async fn run(args: &AdoptArgs) -> Result<()> {
    let runtime = RuntimeDir::new(args.runtime.runtime_dir.as_deref(), &args.name)?;
    let qemu = args.qemu.as_deref().map(launch::find_program).transpose()?;
    let result = ask(&runtime, &Request::Adopt { qemu }).await?;
    crate::inspect::print_json(&result)
}
