//! The `stillpoint` command: its arguments, what it prints, its exit codes. What it does is in the
//! crates `engine` and `helper`; ARCHITECTURE.md has the picture.

mod commands;
mod terminal;

use anyhow::{Context, Result};
use clap::Parser;
use engine::proof;
use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;
use stillpoint_cli::cli::{self, Cli, Command};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use vm::error::{self, Class, class_of};
use vm::launch;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => return print_usage(&message),
    };
    log_to_stderr(&cli);
    match dispatch(cli.command).and_then(|code| terminal::finish().map(|()| code)) {
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
        Command::Run(args) => match commands::run::run(args)? {},
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
            runtime.block_on(dispatch_async(other))
        }
    }
}

async fn dispatch_async(command: Command) -> Result<ExitCode> {
    match command {
        Command::Doctor(args) => return commands::doctor::run(&args).await,
        Command::Attach(args) => commands::attach::run(args).await?,
        Command::Adopt(args) => commands::adopt::run(&args).await?,
        Command::Helper(args) => {
            helper::run(args.runtime.runtime_dir.as_deref(), &args.name).await?
        }
        Command::Checkpoint(args) => commands::checkpoint::run(&args).await?,
        Command::Restore(args) => commands::restore::run(args).await?,
        Command::Ls(args) => commands::inspect::ls(&args).await?,
        Command::Show(args) => commands::inspect::show(&args).await?,
        Command::Verify(args) if args.restore => commands::verify::prove(args).await?,
        Command::Verify(args) => commands::verify::read_back(&args).await?,
        Command::Bench(args) => commands::bench::run(&args).await?,
        Command::Run(_) | Command::Sandbox(_) => {
            unreachable!("handled without the asynchronous runtime")
        }
    }
    Ok(ExitCode::SUCCESS)
}
