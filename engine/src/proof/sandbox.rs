//! Processes and places of a proof, so that nothing of the host is touched and nothing stays.
//!
//! ```text
//! stillpoint verify --restore          the supervisor: makes a private directory and a process
//!   |                                  namespace, removes the directory when all have ended
//!   stillpoint verify --restore …      first process of the namespace: restores and compares; when
//!     |                                it dies the kernel kills the others, and it dies with the
//!     |                                supervisor
//!     qemu-system-x86_64 …             by way of `stillpoint sandbox`: an empty network, every
//!                                      file system read-only but the private directory, few
//!                                      devices
//! ```

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::unistd::{getegid, geteuid};
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use tokio::signal::unix::{SignalKind, signal};
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::files;
use vm::process::{self, Process, ProcessFd, Signal};

/// Names the private directory to the process inside; also says that it is inside.
const WORKSPACE: &str = "STILLPOINT_PROOF_WORKSPACE";
const PREFIX: &str = "stillpoint-proof.";
/// Devices that a VM may need and that hold nothing of the host.
const DEVICES: &[&str] =
    &["null", "zero", "full", "random", "urandom", "kvm", "net/tun", "vhost-net", "vhost-vsock"];
/// A process ended by a signal, as shells count.
const SIGNALLED: u8 = 128;

/// The private directory, in the process inside.
pub fn workspace() -> Option<PathBuf> {
    std::env::var_os(WORKSPACE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Runs this very command again, inside, and takes its exit code. The private directory is made in
/// `fleecing` and removed when all that ran inside has ended.
///
/// # Errors
/// When the directory cannot be made; refused when the kernel gives no namespaces.
pub fn supervise(fleecing: &Path) -> Result<ExitCode, EngineError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the asynchronous runtime");
    let supervised = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let workspace = Workspace::make(fleecing)?;
            let code = run_inside(&workspace).await;
            workspace.remove();
            code
        })
    });
    supervised.in_phase(Phase::Plan)
}

async fn run_inside(workspace: &Workspace) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
    enter(CloneFlags::CLONE_NEWPID)?;
    let program = std::env::current_exe().context("finding this program's own path")?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(std::env::args_os().skip(1))
        .env(WORKSPACE, &workspace.path)
        .stdin(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().context("starting the process that proves")?;
    // Open as long as this process lives.
    let _alive = child.stdin.take();
    let process = child.id().map(ProcessFd::open).transpose()?.flatten();
    let pass = || process.as_ref().map(|process| process.signal(Signal::TERM));
    loop {
        tokio::select! {
            status = child.wait() => return Ok(exit_code(status.context("waiting for the process that proves")?)),
            _ = interrupt.recv() => drop(pass()),
            _ = terminate.recv() => drop(pass()),
            _ = hangup.recv() => drop(pass()),
        }
    }
}

fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let signalled = || {
        SIGNALLED.saturating_add(
            status.signal().and_then(|signal| u8::try_from(signal).ok()).unwrap_or_default(),
        )
    };
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or_else(signalled))
}

/// In the process inside, before anything else: it must not outlive the supervisor.
pub(super) fn die_with_supervisor() -> Result<()> {
    set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .context("asking the kernel to end this process with its supervisor")?;
    // The supervisor may have died before that.
    let input = std::io::stdin();
    let mut alive = [PollFd::new(input.as_fd(), PollFlags::empty())];
    match poll(&mut alive, PollTimeout::ZERO) {
        Ok(0) => Ok(()),
        _ => bail!("the supervisor has ended"),
    }
}

/// The number by which `/proc`, which is the host's, has a process of this namespace.
pub(super) fn pid_in_proc(pid: u32) -> Result<u32> {
    let namespace = |process: &Process| process::namespace(process, "pid").ok().flatten();
    let ours = namespace(&Process::myself().context("reading /proc")?);
    let is_it = |process: &Process| {
        let here = process.status().ok().and_then(|status| status.nspid?.last().copied());
        here == i32::try_from(pid).ok() && namespace(process) == ours
    };
    let found = process::all().find(is_it).context("QEMU's process is not in /proc")?;
    Ok(found.pid.unsigned_abs())
}

/// Into new namespaces; an ordinary user needs one for users too, in which it may make the others.
fn enter(namespaces: CloneFlags) -> Result<()> {
    let (user, group) = (geteuid(), getegid());
    let error = |errno: Errno| {
        refused(format!(
            "the kernel gives no private namespaces to this process ({errno}); 'verify --restore' needs root, or user namespaces \
             (kernel.unprivileged_userns_clone, user.max_user_namespaces)"
        ))
    };
    if user.is_root() {
        return unshare(namespaces).map_err(error);
    }
    unshare(namespaces | CloneFlags::CLONE_NEWUSER).map_err(error)?;
    let write = |file: &str, text: String| {
        std::fs::write(format!("/proc/self/{file}"), text)
            .with_context(|| format!("writing {file}"))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("0 {user} 1"))?;
    write("gid_map", format!("0 {group} 1"))
}

/// A directory that only this proof uses; locked as long as it is in use.
struct Workspace {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Workspace {
    fn make(fleecing: &Path) -> Result<Self> {
        std::fs::create_dir_all(fleecing)
            .with_context(|| format!("making {}", fleecing.display()))?;
        remove_abandoned(fleecing);
        let made = tempfile::Builder::new().prefix(PREFIX).tempdir_in(fleecing);
        let path = made
            .with_context(|| format!("making a private directory in {}", fleecing.display()))?
            .keep();
        let path = path.canonicalize().with_context(|| format!("finding {}", path.display()))?;
        match lock(&path) {
            Some(lock) => Ok(Self { path, _lock: lock }),
            None => bail!("cannot lock {}", path.display()),
        }
    }

    fn remove(self) {
        remove(&self.path);
    }
}

fn lock(path: &Path) -> Option<Flock<File>> {
    Flock::lock(File::open(path).ok()?, FlockArg::LockExclusiveNonblock).ok()
}

/// Removes what killed supervisors left: no process holds their lock.
fn remove_abandoned(fleecing: &Path) {
    let entries = std::fs::read_dir(fleecing).into_iter().flatten().flatten();
    let is_ours = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(PREFIX);
    for path in entries.filter(|entry| is_ours(&entry.file_name())).map(|entry| entry.path()) {
        if path.is_dir() && !path.is_symlink() && lock(&path).is_some() {
            remove(&path);
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_dir_all(path) {
        tracing::warn!("{} is left, remove it: {error}", path.display());
    }
}

/// The command that becomes a QEMU without a host, running in `directory`: its arguments follow.
pub(super) fn command(workspace: &Path, directory: &Path, program: &Path) -> Result<Command> {
    let mut command =
        Command::new(std::env::current_exe().context("finding this program's own path")?);
    command
        .arg("sandbox")
        .arg("--dir")
        .arg(workspace)
        .arg("--cwd")
        .arg(directory)
        .arg("--")
        .arg(program);
    command.env_remove(WORKSPACE).env("TMPDIR", workspace);
    Ok(command)
}

/// `stillpoint sandbox`: becomes the program, and returns only on failure. `private` is the one
/// directory that stays writable, `directory` the program's working directory, `words` the program
/// and its arguments.
///
/// # Errors
/// Refused when the kernel gives no namespaces; failed when a mount or the program cannot be made.
pub fn become_program(
    private: &Path,
    directory: &Path,
    words: &[String],
) -> Result<Infallible, EngineError> {
    become_sandboxed(private, directory, words).in_phase(Phase::Start)
}

fn become_sandboxed(private: &Path, directory: &Path, words: &[String]) -> Result<Infallible> {
    enter(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC)?;
    close_file_systems(private)?;
    let (program, rest) = words.split_first().context("no program was named after '--'")?;
    let error = Command::new(program).args(rest).current_dir(directory).exec();
    Err(error).with_context(|| format!("starting {program}"))
}

fn close_file_systems(private: &Path) -> Result<()> {
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("making mounts private")?;
    mount(Some(private), private, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("mounting {}", private.display()))?;
    let table = files::read_text("/proc/self/mountinfo").context("reading the list of mounts")?;
    for (place, flags) in table.lines().filter_map(mounted) {
        if place == private || flags.contains(MsFlags::MS_RDONLY) {
            continue;
        }
        match mount(
            none,
            &place,
            none,
            MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags,
            none,
        ) {
            // Hidden below another mount, or gone.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::EACCES) => {}
            Err(errno) => {
                return Err(errno).with_context(|| format!("making {} read-only", place.display()));
            }
        }
    }
    close_devices(private)
}

/// Place and flags of a line of `mountinfo`.
fn mounted(line: &str) -> Option<(PathBuf, MsFlags)> {
    let mut words = line.split(' ').skip(4);
    let place = PathBuf::from(unescape(words.next()?));
    let flag = |word: &str| match word {
        "ro" => MsFlags::MS_RDONLY,
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        "nodiratime" => MsFlags::MS_NODIRATIME,
        "relatime" => MsFlags::MS_RELATIME,
        _ => MsFlags::empty(),
    };
    Some((place, words.next()?.split(',').map(flag).collect()))
}

/// The kernel writes space, tab, newline and backslash as octal numbers, and procfs leaves them so.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// A device can be written on a read-only file system, so only harmless ones are there.
fn close_devices(private: &Path) -> Result<()> {
    let none = None::<&Path>;
    let few = private.join("dev");
    std::fs::create_dir_all(few.join("net"))
        .with_context(|| format!("making {}", few.display()))?;
    for name in DEVICES {
        let (from, to) = (Path::new("/dev").join(name), few.join(name));
        if !from.exists() {
            continue;
        }
        let made =
            if from.is_dir() { std::fs::create_dir_all(&to) } else { File::create(&to).map(drop) };
        made.with_context(|| format!("making {}", to.display()))?;
        mount(Some(&from), &to, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("mounting {}", from.display()))?;
    }
    std::os::unix::fs::symlink("/proc/self/fd", few.join("fd"))
        .context("making the link to descriptors")?;
    mount(Some(&few), "/dev", none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .context("mounting the few devices")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_mount_keeps_its_flags() {
        let line = "36 35 98:0 /mnt1 /mnt\\040two rw,nosuid,nodev,relatime master:1 - ext3 /dev/root rw,errors=continue";
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RELATIME;
        assert_eq!(mounted(line), Some((PathBuf::from("/mnt two"), flags)));
    }

    #[test]
    fn abandoned_directories_go_and_used_ones_stay() {
        let fleecing = tempfile::tempdir().unwrap();
        let used = Workspace::make(fleecing.path()).unwrap();
        let abandoned = fleecing.path().join(format!("{PREFIX}old"));
        let other = fleecing.path().join("other");
        [&abandoned, &other].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
        remove_abandoned(fleecing.path());
        assert!(used.path.exists() && other.exists() && !abandoned.exists());
        used.remove();
    }
}
