//! The directory of one running machine: its sockets, its log, and what the launcher knew about it. It lives as long
//! as QEMU does (a tmpfs suits it) and is all that a new helper needs to take a machine over.

use crate::engine::{EngineChoice, StreamChoice};
use crate::exit::refused;
use crate::lineage::CheckpointIdentity;
use anyhow::{Context, Result, bail};
use checkpoint_format::{CheckpointSeq, Epoch, VmName};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `sun_path` of a unix socket, less its final zero.
const MAX_SOCKET_PATH: usize = 107;
/// A saved machine has a few kilobytes of arguments.
const MAX_MACHINE_FILE_BYTES: u64 = 4 << 20;
/// A killed process keeps its locks until the last of its threads is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const MACHINE_FILE_FORMAT: u32 = 1;
const MARKS: &str = "marks.json";
const MAX_MARKS_BYTES: u64 = 1024;

/// What was launched, in the words of `launch`: enough to attach to it and to start it anew elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFile {
    pub format: u32,
    pub name: VmName,
    pub store: String,
    /// One life of one QEMU process; a restored machine is a new instance.
    pub instance: String,
    pub qemu: PathBuf,
    /// QEMU's process, where the launcher knows it: a helper does not wait for one that is gone.
    pub pid: Option<u32>,
    pub qemu_version: String,
    pub machine_type: String,
    pub accelerator: String,
    pub ram_bytes: u64,
    pub ram_block: String,
    /// The user's options, normalized: no readconfig, every drive named, the machine type versioned.
    pub arguments: Vec<String>,
    pub directory: PathBuf,
    pub scratch: PathBuf,
    /// The checkpoint that this instance was restored from.
    pub restored_from: Option<CheckpointSeq>,
    /// A machine that somebody else started; none for one of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unprepared: Option<Unprepared>,
}

/// How a machine that nobody prepared is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unprepared {
    /// Its monitor, ours alone while a helper is attached.
    pub monitor: PathBuf,
    /// Where the plugin listens, if its owner put it into that QEMU.
    pub plugin: Option<PathBuf>,
    /// When the process began, in the kernel's ticks since boot: a later one may get the same pid.
    pub started: u64,
    /// What its owner chose for it.
    pub engine: EngineChoice,
    pub stream: StreamChoice,
}

impl MachineFile {
    pub const FORMAT: u32 = MACHINE_FILE_FORMAT;

    /// The plugin's socket, if there is a plugin.
    pub fn plugin(&self, runtime: &RuntimeDir) -> Option<PathBuf> {
        self.unprepared.as_ref().map_or_else(|| Some(runtime.plugin()), |there| there.plugin.clone())
    }
}

/// What the marks of written pages count from. They outlive a helper: the kernel's in the guest's page tables, the disks' as
/// dirty bitmaps in QEMU. They say nothing of any checkpoint that does not descend from `since`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// The disks' bitmaps record at least since this checkpoint.
    pub since: CheckpointIdentity,
    /// So do the kernel's marks of the guest's memory.
    pub is_exact: bool,
}

impl Marks {
    /// These marks, if they are of use for a checkpoint that adds to `lineage`.
    pub fn of(self, lineage: &[CheckpointIdentity]) -> Option<Self> {
        lineage.contains(&self.since).then_some(self)
    }
}

#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// The directory of machine `name` below `base` (default `/run/stillpoint`, or the user's own run directory).
    pub fn new(base: Option<&Path>, name: &VmName) -> Result<Self> {
        let path = std::path::absolute(base.map_or_else(default_base, Path::to_owned).join(name.as_str()))
            .context("making the runtime directory's path absolute")?;
        let Some(text) = path.to_str() else {
            bail!("the runtime directory {} is not valid UTF-8; name another by --runtime-dir", path.display());
        };
        if text.len() + "/control.sock".len() > MAX_SOCKET_PATH || text.contains([',', '=']) {
            bail!("the runtime directory {text} cannot hold sockets (too long, or a comma or '=' in it); name another by --runtime-dir");
        }
        Ok(Self { path })
    }

    pub fn create(&self) -> Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path).with_context(|| format!("making the runtime directory {}", self.path.display()))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn qmp(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    pub fn plugin(&self) -> PathBuf {
        self.path.join("plugin.sock")
    }

    pub fn control(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Capabilities and parameters of QEMU's migration as they were before a checkpoint by stream changed them.
    pub fn migration_journal(&self) -> PathBuf {
        self.path.join("migration.json")
    }

    /// How far an adoption got.
    pub fn adoption(&self) -> PathBuf {
        self.path.join("adopt.json")
    }

    pub fn nbd(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    pub fn helper_log(&self) -> PathBuf {
        self.path.join("helper.log")
    }

    pub fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    pub fn helper_pid(&self) -> PathBuf {
        self.path.join("helper.pid")
    }

    /// The helper that holds [`RuntimeDir::lock_helper`].
    pub fn helper_pid_of_holder(&self) -> Result<Pid> {
        let text = read_limited(&self.helper_pid(), 32)?;
        let pid = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok()).filter(|pid| *pid > 1);
        pid.map(Pid::from_raw).with_context(|| format!("{} holds no process id", self.helper_pid().display()))
    }

    pub fn save_machine(&self, machine: &MachineFile) -> Result<()> {
        let text = serde_json::to_vec_pretty(machine).context("encoding machine.json")?;
        replace(&self.path.join("machine.json"), &text)
    }

    pub fn machine(&self) -> Result<MachineFile> {
        let path = self.path.join("machine.json");
        let text = read_limited(&path, MAX_MACHINE_FILE_BYTES).with_context(|| {
            format!("no machine is known at {}; start one by 'stillpoint run' or name its --runtime-dir", self.path.display())
        })?;
        let machine: MachineFile = serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
        if machine.format != MACHINE_FILE_FORMAT {
            bail!("{} has format {}; this build reads {MACHINE_FILE_FORMAT}", path.display(), machine.format);
        }
        Ok(machine)
    }

    /// The devices that the machine had when a helper first asked; `now` is remembered if none did.
    pub fn devices_at_start(&self, now: &[String]) -> Result<Vec<String>> {
        let path = self.path.join("devices.json");
        if !path.exists() {
            replace(&path, &serde_json::to_vec(now).context("encoding devices.json")?)?;
        }
        let text = read_limited(&path, MAX_MACHINE_FILE_BYTES)?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// A new machine of this name begins: what was known of an earlier one is gone.
    pub fn forget_earlier(&self) -> Result<()> {
        self.forget("devices.json")?;
        // Of another process: put back here, it would change what nobody changed.
        self.forget("migration.json")?;
        self.forget("writer-epoch")?;
        self.forget(MARKS)
    }

    /// What an earlier helper left behind in the way of marks of written pages. None if that is not known.
    pub fn marks(&self) -> Option<Marks> {
        serde_json::from_slice(&read_limited(&self.path.join(MARKS), MAX_MARKS_BYTES).ok()?).ok()
    }

    pub fn set_marks(&self, marks: Marks) -> Result<()> {
        replace(&self.path.join(MARKS), &serde_json::to_vec(&marks).context("encoding the record of marks")?)
    }

    /// From here on the kernel's marks alone do not tell what was written: a lease begins, whose pages die with its helper, or
    /// another process has used them.
    pub fn forget_exact_marks(&self) -> Result<()> {
        match self.marks() {
            Some(marks) => self.set_marks(Marks { is_exact: false, ..marks }),
            None => self.forget(MARKS),
        }
    }

    /// The highest writer epoch that this VM's instance has claimed.
    pub fn writer_epoch(&self) -> Option<Epoch> {
        let text = read_limited(&self.path.join("writer-epoch"), 32).ok()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok().map(Epoch)
    }

    pub fn set_writer_epoch(&self, epoch: Epoch) -> Result<()> {
        replace(&self.path.join("writer-epoch"), epoch.0.to_string().as_bytes())
    }

    fn forget(&self, name: &str) -> Result<()> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}/{name}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// One helper per machine: the lock ends with the process that holds it, however it dies.
    pub fn lock_helper(&self) -> Result<Flock<File>> {
        let path = self.path.join("helper.lock");
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let mut file = file.with_context(|| format!("opening {}", path.display()))?;
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((file, _)) => file,
            };
            if Instant::now() >= end {
                let pid = std::fs::read_to_string(self.helper_pid()).unwrap_or_default();
                return Err(refused(format!(
                    "a helper (pid {}) is attached to this machine already; use it, or replace it by 'stillpoint attach --take-over'",
                    pid.trim()
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn default_base() -> PathBuf {
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !nix::unistd::geteuid().is_root());
    own.map_or_else(|| PathBuf::from("/run"), PathBuf::from).join("stillpoint")
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let about = || format!("writing {}", path.display());
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).with_context(about)?;
    std::fs::rename(&new, path).with_context(about)
}

pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
    if bytes.len() as u64 > limit {
        bail!("{} is larger than {limit} bytes", path.display());
    }
    Ok(bytes)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn marks_count_from_one_certain_checkpoint() {
        let identity = |seq: u64, manifest: &str| CheckpointIdentity::new(CheckpointSeq(seq), manifest.as_bytes());
        let lineage = [identity(1, "one"), identity(2, "two")];
        let marks = |since| Marks { since, is_exact: true };
        assert_eq!(marks(identity(2, "two")).of(&lineage), Some(marks(identity(2, "two"))));
        assert!(marks(identity(1, "one")).of(&lineage).is_some(), "of an ancestor they hold more than is needed");
        assert_eq!(marks(identity(2, "another")).of(&lineage), None);
        assert_eq!(marks(identity(3, "three")).of(&lineage), None);
    }
}
