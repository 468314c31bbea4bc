//! The `stillpoint` command: its arguments, what it prints, its exit codes. What it does is in the
//! crates `engine` and `helper`; ARCHITECTURE.md has the picture.

#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

mod commands;
mod terminal;

use anyhow::{Context, Result};
use clap::Parser;
use engine::proof;
use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use stillpoint_cli::cli::{self, Cli, Command};
use terminal::Terminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use vm::error::{self, Class, class_of};
use vm::launch;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => return print_usage(&message),
    };
    let log_as_helper = log_to_stderr(&cli);
    match dispatch(cli, log_as_helper).and_then(|code| terminal::finish().map(|()| code)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("stillpoint: {}", error::explain(error));
    ExitCode::from(class_of(error).exit_code())
}

/// An error of the command line, or the help that was asked for.
fn print_usage(message: &clap::Error) -> ExitCode {
    match message.print() {
        Err(error) if !message.use_stderr() && error.kind() != ErrorKind::BrokenPipe => {
            fail(&terminal::not_written(&error))
        }
        _ if message.use_stderr() => ExitCode::from(Class::Usage.exit_code()),
        _ => ExitCode::SUCCESS,
    }
}

/// Returns what is to be called when stderr is a helper's log from then on.
fn log_to_stderr(cli: &Cli) -> impl FnOnce() + use<> {
    let of_level =
        |level| EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let helper = match &cli.command {
        Command::Helper(args) | Command::Supervise(args) => Some(args),
        _ => None,
    };
    let quiet = if helper.is_some_and(|args| !args.restore) { "info" } else { "warn" };
    let log = tracing_subscriber::fmt()
        .with_env_filter(of_level(if cli.verbose { "debug" } else { quiet }))
        .with_writer(std::io::stderr)
        .with_ansi(helper.is_none() && std::io::stderr().is_terminal())
        .with_target(false)
        .with_span_events(FmtSpan::CLOSE)
        .with_filter_reloading();
    let filter = log.reload_handle();
    log.init();
    move || {
        // It fails only when there is no log any more.
        let _ = filter.reload(of_level("info"));
    }
}

fn dispatch(cli: Cli, log_as_helper: impl FnOnce()) -> Result<ExitCode> {
    match cli.command {
        // Before any thread exists: this process becomes QEMU.
        Command::Run(args) => match commands::run::run(args)? {},
        // Without any other thread: it only waits.
        Command::Supervise(args) => commands::supervise::run(args, cli.verbose),
        Command::Sandbox(args) => {
            match proof::sandbox::become_program(&args.dir, &args.cwd, &args.program)? {}
        }
        Command::Verify(args) if args.restore && proof::sandbox::workspace().is_none() => {
            let fleecing = launch::fleecing_dir(args.fleecing_dir.as_deref())?;
            Ok(proof::sandbox::supervise(&fleecing)?)
        }
        other => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("starting the asynchronous runtime")?;
            runtime.block_on(dispatch_async(other, cli.verbose, log_as_helper))
        }
    }
}

async fn dispatch_async(
    command: Command,
    is_verbose: bool,
    log_as_helper: impl FnOnce(),
) -> Result<ExitCode> {
    match command {
        Command::Doctor(args) => return commands::doctor::run(&args).await,
        Command::Attach(args) => commands::attach::run(args).await?,
        Command::Adopt(args) => commands::adopt::run(&args).await?,
        Command::Helper(args) if args.restore => {
            helper::restore::run(Arc::new(Terminal), log_as_helper).await?
        }
        Command::Helper(args) => {
            helper::run(args.runtime.runtime_dir.as_deref(), &args.name).await?
        }
        Command::Checkpoint(args) => commands::checkpoint::run(&args).await?,
        Command::Restore(args) => commands::restore::run(args, is_verbose).await?,
        Command::Rollback(args) => commands::rollback::run(&args).await?,
        Command::Ls(args) => commands::inspect::ls(&args).await?,
        Command::Show(args) => commands::inspect::show(&args).await?,
        Command::Verify(args) if args.restore => commands::verify::prove(args).await?,
        Command::Verify(args) => commands::verify::read_back(&args).await?,
        Command::Status(args) => commands::status::run(args).await?,
        Command::Bench(args) => commands::bench::run(&args).await?,
        Command::Run(_) | Command::Supervise(_) | Command::Sandbox(_) => {
            unreachable!("handled without the asynchronous runtime")
        }
    }
    Ok(ExitCode::SUCCESS)
}
