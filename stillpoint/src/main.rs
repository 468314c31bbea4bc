//! The `stillpoint` command. ARCHITECTURE.md has the picture; each folder here is one room of it:
//! `launch` starts QEMU, `helper` sits beside it, `checkpoint` takes, `restore` brings back, `layers` and `pack` carry
//! data, `inspect` looks at a store, `proof` restores in a sandbox and compares.

mod adopt;
mod bench;
mod cache;
mod checkpoint;
mod control;
mod doctor;
mod drives;
mod engine;
mod exit;
mod fault;
mod files;
mod helper;
mod inspect;
mod launch;
mod layers;
mod lineage;
mod pack;
mod proof;
mod restore;
mod run_state;
mod runtime;
mod stores;
mod terminal;

use anyhow::{Context, Result};
use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use stillpoint_cli::cli::{self, Cli, Command};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(&cli);
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("stillpoint: {}", exit::explain(&error));
            exit::code(&error)
        }
    }
}

fn log_to_stderr(cli: &Cli) {
    let quiet = if matches!(cli.command, Command::Helper(_)) { "info" } else { "warn" };
    let default = if cli.verbose { "debug" } else { quiet };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_span_events(FmtSpan::CLOSE)
        .init();
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        // Before any thread exists: this process becomes QEMU.
        Command::Run(args) => match launch::run(args.try_into()?)? {},
        Command::Sandbox(args) => match proof::sandbox::become_program(&args)? {},
        Command::Verify(args) if args.restore && proof::sandbox::workspace().is_none() => {
            proof::sandbox::supervise(&launch::scratch_dir(args.scratch_dir.as_deref())?)
        }
        Command::Doctor(args) => doctor::run(&args),
        other => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("starting the asynchronous runtime")?;
            runtime.block_on(dispatch_async(other))
        }
    }
}

async fn dispatch_async(command: Command) -> Result<ExitCode> {
    match command {
        Command::Attach(args) => helper::attach::run(args).await?,
        Command::Adopt(args) => adopt::run(&args).await?,
        Command::Helper(args) => helper::run(args).await?,
        Command::Checkpoint(args) => helper::client::checkpoint(&args).await?,
        Command::Restore(args) => restore::run(args).await?,
        Command::Ls(args) => inspect::ls(&args).await?,
        Command::Show(args) => inspect::show(&args).await?,
        Command::Verify(args) if args.restore => proof::run(&args).await?,
        Command::Verify(args) => inspect::verify::run(&args).await?,
        Command::Bench(args) => bench::run(&args).await?,
        Command::Run(_) | Command::Doctor(_) | Command::Sandbox(_) => unreachable!("handled without the asynchronous runtime"),
    }
    Ok(ExitCode::SUCCESS)
}
