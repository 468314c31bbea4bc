//! `stillpoint supervise`: the helper's parent.

use crate::cli::HelperArgs;
use anyhow::Result;
use helper::supervisor::{Supervisor, die_as};
use std::process::ExitCode;

/// Ends as the last helper did.
pub(crate) fn run(args: HelperArgs, is_verbose: bool) -> Result<ExitCode> {
    let mut words = Vec::new();
    words.extend(args.restore.then_some("--restore"));
    words.extend(is_verbose.then_some("--verbose"));
    let status = Supervisor::new(args.runtime.runtime_dir, args.name)?.run(&words)?;
    die_as(status);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
