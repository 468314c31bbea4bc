//! `stillpoint run`: prepares the VM, leaves a helper behind, in a session of its own, and becomes
//! QEMU, which so never depends on a helper that lives.

use crate::cli::RunArgs;
use crate::terminal::Terminal;
use anyhow::{Context, Result};
use engine::boot::{Prepared, Request};
use helper::start::{self, Supervision};

/// Returns only on failure: on success this process is QEMU.
pub(crate) fn run(args: RunArgs) -> Result<std::convert::Infallible> {
    let supervision = Supervision::unless(args.supervision.no_supervisor);
    let mut words = args.qemu.into_iter();
    let request = Request {
        qemu: words.next().context("no QEMU program was named after '--'")?,
        arguments: words.collect(),
        name: args.name,
        store: args.store.store,
        runtime_base: args.runtime.runtime_dir,
        fleecing: args.fleecing_dir,
    };
    let prepared = Prepared::of(&request, &Terminal)?;
    let base = request.runtime_base.as_deref();
    start::spawn(&request.name, base, &prepared.runtime, supervision)?;
    Err(prepared.exec().into())
}
