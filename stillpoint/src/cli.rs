//! The command line.

#![expect(
    missing_docs,
    reason = "clap takes a doc comment of what is flattened for the help of the whole command; \
              a test finds commands and arguments without a help text"
)]

use checkpoint_format::VmName;
use clap::builder::{FalseyValueParser, PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use engine::lineage::CheckpointName;
use engine::restore::Mapping;
use std::path::PathBuf;
use std::str::FromStr;
use strum::{EnumMessage, IntoEnumIterator};
use vm::memory_source::{EngineChoice, StreamChoice};

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed; the message says what, on what and what to do
  2  the command line is wrong
  3  refused: the VM, host or store is not in a state in which this may be done
  4  store I/O failed; the last checkpoint is intact, retry
  5  the store holds damaged content";

/// Live, incremental, consistent checkpoints of QEMU VMs, restored on any host.
#[derive(Parser)]
#[command(name = "stillpoint", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// Log at debug level on stderr (RUST_LOG, if set, takes precedence)
    #[arg(short, long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Start QEMU as a managed VM with a helper beside it; this process becomes QEMU
    Run(RunArgs),
    /// Attach a helper to a running VM: a managed VM by name, any other by its QMP socket
    Attach(AttachArgs),
    /// Move an attached external VM, while it runs, into a managed QEMU on this host
    Adopt(AdoptArgs),
    /// Take a checkpoint of a running VM
    Checkpoint(CheckpointArgs),
    /// Restore a VM from its checkpoint in the store
    Restore(RestoreArgs),
    /// Set a running VM back, in place, to a checkpoint that it descends from
    Rollback(RollbackArgs),
    /// List VMs, or the checkpoints of one
    Ls(LsArgs),
    /// Show what one checkpoint holds
    Show(ShowArgs),
    /// Read back checkpoints and check every digest; with --restore, restore one in a sandbox and
    /// compare everything
    Verify(VerifyArgs),
    /// Show a running VM, its helper, and how much of a restored VM's memory and disks has arrived
    Status(StatusArgs),
    /// Check this host, or with --qmp a running QEMU, and name a remedy for what is missing
    Doctor(DoctorArgs),
    /// Measure pauses and sizes on a running VM, then prove its last checkpoint
    Bench(BenchArgs),
    /// The helper itself; 'run', 'attach' and 'restore' start it
    #[command(hide = true)]
    Helper(HelperArgs),
    /// Start the helper, and another one whenever it dies; 'run', 'attach' and 'restore' start it
    #[command(hide = true)]
    Supervise(HelperArgs),
    /// Run a program in place of this process, without network and with read-only file systems;
    /// 'verify --restore' starts it
    #[command(hide = true)]
    Sandbox(SandboxArgs),
}

#[derive(Args)]
pub struct Runtime {
    /// Directory of the running VMs' sockets and logs [default: /run/stillpoint for root, else
    /// $XDG_RUNTIME_DIR/stillpoint, /run/user/UID/stillpoint or /tmp/stillpoint-UID]
    #[arg(long, env = "STILLPOINT_RUNTIME_DIR", value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
}

#[derive(Args)]
pub struct Supervision {
    /// If the helper dies, leave the VM without one until 'attach' [default: a supervisor starts
    /// another one as long as QEMU runs]
    #[arg(long, env = "STILLPOINT_NO_SUPERVISOR", value_parser = FalseyValueParser::new())]
    pub no_supervisor: bool,
}

#[derive(Args)]
pub struct Store {
    /// Store of the checkpoints: file:///DIR, hdfs://NAMENODE:PORT/PATH or
    /// hdfs://NAMESERVICE/PATH
    #[arg(long, env = "STILLPOINT_STORE", value_name = "URL")]
    pub store: String,
}

#[derive(Args)]
pub struct RunArgs {
    /// The VM's name in the store
    #[arg(long, env = "STILLPOINT_NAME")]
    pub name: VmName,
    #[command(flatten)]
    pub store: Store,
    #[command(flatten)]
    pub runtime: Runtime,
    #[command(flatten)]
    pub supervision: Supervision,
    /// Directory for temporary fleecing overlays; needs free space on a disk-backed file system
    /// [default: /var/tmp]
    #[arg(long, alias = "scratch-dir", env = "STILLPOINT_FLEECING_DIR", value_name = "DIR")]
    pub fleecing_dir: Option<PathBuf>,
    /// The QEMU program and its arguments, after '--'
    #[arg(last = true, required = true, value_name = "QEMU ARGS")]
    pub qemu: Vec<String>,
}

#[derive(Args)]
pub struct AttachArgs {
    /// The VM's name
    #[arg(required_unless_present = "long_name")]
    pub name: Option<VmName>,
    /// The VM's name (the same as NAME)
    #[arg(id = "long_name", long = "name", value_name = "NAME", conflicts_with = "name")]
    pub long_name: Option<VmName>,
    /// QMP socket of a running QEMU that Stillpoint did not start; no other client may use it
    #[arg(long, env = "STILLPOINT_QMP", value_name = "SOCKET", requires = "store")]
    pub qmp: Option<PathBuf>,
    /// With --qmp: store of the checkpoints: file:///DIR, hdfs://NAMENODE:PORT/PATH or
    /// hdfs://NAMESERVICE/PATH
    #[arg(long, env = "STILLPOINT_STORE", value_name = "URL")]
    pub store: Option<String>,
    /// With --qmp: directory for temporary fleecing overlays; needs free space on a disk-backed
    /// file system [default: /var/tmp]
    #[arg(long, alias = "scratch-dir", env = "STILLPOINT_FLEECING_DIR", value_name = "DIR")]
    pub fleecing_dir: Option<PathBuf>,
    /// With --qmp: engine that finds and reads changed memory
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    #[arg(value_parser = choice::<EngineChoice>())]
    pub engine: EngineChoice,
    /// With --qmp: how the stream engine gets the memory of one instant
    #[arg(long, value_name = "MODE", default_value = "auto")]
    #[arg(value_parser = choice::<StreamChoice>())]
    pub stream: StreamChoice,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Stay in the foreground (for a service manager, which starts another one if this one dies)
    #[arg(long)]
    pub foreground: bool,
    #[command(flatten)]
    pub supervision: Supervision,
    /// Take over the VM's writer epoch now and fence the current writer, once; never put this into
    /// a service's unit
    #[arg(long)]
    pub take_over: bool,
}

#[derive(Args)]
pub struct AdoptArgs {
    /// The VM's name, as it was attached
    pub name: VmName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// QEMU program to move it into [default: the one that runs it now]
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<String>,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct CheckpointArgs {
    /// The VM's name
    pub name: VmName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Engine that finds and reads changed memory [default: what the VM was attached with]
    #[arg(long, value_name = "ENGINE", value_parser = choice::<EngineChoice>())]
    pub engine: Option<EngineChoice>,
    /// How the stream engine gets the memory of one instant [default: what the VM was attached
    /// with]
    #[arg(long, value_name = "MODE", value_parser = choice::<StreamChoice>())]
    pub stream: Option<StreamChoice>,
    /// Take a full checkpoint: it needs no earlier one and begins a new lineage
    #[arg(long)]
    pub full: bool,
    /// Then prove that it restores, as 'verify --restore' does, at the lowest priority; needs free
    /// memory and disk space for a second copy of the VM
    #[arg(long)]
    pub verify: bool,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct RestoreArgs {
    /// NAME for its newest checkpoint, NAME@ID for the one with that ID
    pub checkpoint: CheckpointName,
    #[command(flatten)]
    pub store: Store,
    #[command(flatten)]
    pub runtime: Runtime,
    #[command(flatten)]
    pub supervision: Supervision,
    /// Restore under another name, as a VM of its own beside the original (docs/copies.md);
    /// repeatable, for several copies at once
    #[arg(long = "as", value_name = "NEW")]
    pub new_names: Vec<VmName>,
    /// Restore N copies at once, named NEW-1 to NEW-N (without --as: NAME-1 to NAME-N)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub copies: Option<u16>,
    /// Directory for the restored disks, logs and sockets [default: ./NAME]; for several copies,
    /// the directory in which each has its own [default: .]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// QEMU program [default: the first one that is new enough: on the PATH by the file name of the
    /// one that the checkpoint was taken with, then qemu-system-x86_64, then those in
    /// /opt/stillpoint]
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<String>,
    /// Directory for temporary fleecing overlays [default: /var/tmp]
    #[arg(long, alias = "scratch-dir", env = "STILLPOINT_FLEECING_DIR", value_name = "DIR")]
    pub fleecing_dir: Option<PathBuf>,
    /// On the VM's command line, replace the value OLD by NEW (whole values only; repeatable); for
    /// several copies, {name} and {number} stand for those of each copy
    #[arg(long, value_name = "OLD=NEW")]
    pub map: Vec<Mapping>,
    /// Let the restored VM use something of this host that its command line names:
    /// OPTION.KEY=VALUE, or OPTION.KEY for any value (repeatable)
    #[arg(long, value_name = "WHAT")]
    pub allow: Vec<String>,
    /// Take over the VM's writer epoch and fence the current writer, which must be dead
    #[arg(long, conflicts_with = "copies")]
    pub take_over: bool,
    /// Leave the restored VM paused even if its guest ran
    #[arg(long)]
    pub paused: bool,
    /// Let the restored VM run even if its guest was stopped when the checkpoint was taken
    #[arg(long, conflicts_with = "paused")]
    pub run: bool,
    /// Read all memory and disks before the guest runs
    #[arg(long)]
    pub eager: bool,
    /// Let the guest run before its memory and disks have been read; pages and blocks are read when
    /// the guest needs them, and all others in the background (the default)
    #[arg(long, conflicts_with = "eager")]
    pub lazy: bool,
    /// Stop the guest when it has waited for a page of memory for TIME, such as 5m, because the
    /// store does not answer; it stays stopped until 'cont' [default: it waits for the store]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub deadline: Option<std::time::Duration>,
    /// Return only when all memory and disks are here, and nothing more is needed from the store
    #[arg(long)]
    pub wait: bool,
    /// Program that is run before anything is made; if it fails, nothing is restored
    /// (docs/copies.md lists its environment)
    #[arg(long, value_name = "PROGRAM")]
    pub hook_before: Option<PathBuf>,
    /// Program that is run when the guest may run and the helper listens; if it fails, the VM stays
    #[arg(long, value_name = "PROGRAM")]
    pub hook_after: Option<PathBuf>,
    /// How long each of these programs may take; then it is killed, and has failed
    #[arg(
        long,
        value_name = "TIME",
        default_value = "60s",
        value_parser = humantime::parse_duration
    )]
    pub hook_timeout: std::time::Duration,
    /// Do not let the guest's agent set the guest's clock to the time of this host
    #[arg(long)]
    pub keep_clock: bool,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct RollbackArgs {
    /// NAME@ID: the VM, and the checkpoint that it is set back to
    pub checkpoint: CheckpointName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Take no checkpoint of the present first: what the VM did since its last one is lost
    #[arg(long)]
    pub discard: bool,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct StatusArgs {
    /// The VM's name
    pub name: VmName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct LsArgs {
    /// The VM whose checkpoints are listed [default: list the VMs]
    pub name: Option<VmName>,
    #[command(flatten)]
    pub store: Store,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ShowArgs {
    /// NAME for its newest checkpoint, NAME@ID for the one with that ID
    pub checkpoint: CheckpointName,
    #[command(flatten)]
    pub store: Store,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct VerifyArgs {
    /// NAME for all of its checkpoints (with --restore: the newest), NAME@ID for one and its
    /// ancestors
    pub checkpoint: CheckpointName,
    #[command(flatten)]
    pub store: Store,
    /// Restore it in a sandbox, compare all memory, disks and device state, and note the proof in
    /// the store
    #[arg(long)]
    pub restore: bool,
    /// With --restore: QEMU program [default: as for 'restore']
    #[arg(long, value_name = "PROGRAM", requires = "restore")]
    pub qemu: Option<String>,
    /// With --restore: then let the guest run for TIME, such as 5s, and report whether it died,
    /// panicked or reset
    #[arg(long, value_name = "TIME", requires = "restore", value_parser = humantime::parse_duration)]
    pub run: Option<std::time::Duration>,
    /// With --restore: on the VM's command line, replace the value OLD by NEW (whole values only;
    /// repeatable)
    #[arg(long, value_name = "OLD=NEW", requires = "restore")]
    pub map: Vec<Mapping>,
    /// With --restore: as 'restore --allow'
    #[arg(long, value_name = "WHAT", requires = "restore")]
    pub allow: Vec<String>,
    /// With --restore: directory for the temporary disks [default: /var/tmp]
    #[arg(long, alias = "scratch-dir", env = "STILLPOINT_FLEECING_DIR", value_name = "DIR")]
    pub fleecing_dir: Option<PathBuf>,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct DoctorArgs {
    /// The QEMU program to check
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "PROGRAM")]
    pub qemu: String,
    /// Check a running QEMU by its QMP socket instead: which engines it can have, and what prevents
    /// checkpoints
    #[arg(long, value_name = "SOCKET", conflicts_with = "qemu")]
    pub qmp: Option<PathBuf>,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct BenchArgs {
    /// The VM's name
    pub name: VmName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Checkpoints to take
    #[arg(long, default_value_t = 20, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Milliseconds between two checkpoints
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    pub interval_ms: u64,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct HelperArgs {
    /// The VM's name
    pub name: VmName,
    #[command(flatten)]
    pub runtime: Runtime,
    /// Restore the VM first, by the request that comes on standard input
    #[arg(long)]
    pub restore: bool,
}

#[derive(Args)]
pub struct SandboxArgs {
    /// The one directory that stays writable
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The program's working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: PathBuf,
    /// The program and its arguments, after '--'
    #[arg(last = true, required = true, value_name = "PROGRAM ARGS")]
    pub program: Vec<String>,
}

impl AttachArgs {
    /// The VM, by whichever of the two arguments named it.
    ///
    /// # Errors
    /// When neither did, which clap does not let through.
    pub fn vm(&self) -> anyhow::Result<&VmName> {
        self.name
            .as_ref()
            .or(self.long_name.as_ref())
            .ok_or_else(|| anyhow::anyhow!("no VM was named"))
    }
}

/// The values of a library's enum by their names, each with its documentation as help.
fn choice<T>() -> impl TypedValueParser<Value = T>
where
    T: IntoEnumIterator + EnumMessage + Into<&'static str>,
    T: FromStr<Err = strum::ParseError> + Clone + Send + Sync + 'static,
{
    let values = T::iter().map(|value| {
        let meaning = value.get_documentation().unwrap_or_default();
        PossibleValue::new(value.into()).help(meaning)
    });
    PossibleValuesParser::new(values).try_map(|word| word.parse::<T>())
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Of a command and all below it, hidden ones too: "run --name".
    fn without_help(command: &clap::Command, path: &str) -> Vec<String> {
        let has_text = |text: Option<&clap::builder::StyledStr>| {
            text.is_some_and(|text| !text.to_string().trim().is_empty())
        };
        let arguments = command.get_arguments().filter(|argument| !has_text(argument.get_help()));
        let mut found: Vec<String> =
            arguments.map(|argument| format!("{path} {argument}")).collect();
        found.extend(Some(path.to_owned()).filter(|_| !has_text(command.get_about())));
        found.extend(
            command
                .get_subcommands()
                .flat_map(|inner| without_help(inner, &format!("{path} {}", inner.get_name()))),
        );
        found
    }

    #[test]
    fn help_every_command_and_argument_has_a_text() {
        assert_eq!(without_help(&Cli::command(), "stillpoint"), [] as [String; 0]);
    }
}
