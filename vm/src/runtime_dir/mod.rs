//! The directory of one running VM: its sockets, its log, and what the launcher knew about it. It
//! lives as long as QEMU does (a tmpfs suits it) and is all that a new helper needs to take a VM
//! over.

mod private;
mod records;
mod rollback;

use crate::error::{VmError, refused};
use crate::files;
use crate::process;
use anyhow::{Context, Result, anyhow};
use checkpoint_format::{Epoch, VmName};
use nix::fcntl::{Flock, OFlag};
use nix::unistd::Pid;
use private::Owner;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use records::{External, Failure, Marks, RestoreTarget, VmFile};
pub use rollback::{RollbackUnderWay, RolledBack};

/// `sun_path` of a unix socket, less its final zero.
const MAX_SOCKET_PATH: usize = 107;
/// A saved VM has a few kilobytes of arguments.
const MAX_VM_FILE_BYTES: u64 = 4 << 20;
/// A host has some hundred locks of 60 bytes a line.
const MAX_LOCKS_BYTES: u64 = 16 << 20;
const HELPER_FAILURE: &str = "helper.failure";
const MARKS: &str = "marks.json";
const MAX_MARKS_BYTES: u64 = 1024;

/// No other helper, and no restore, uses the runtime directory while it is held.
pub type HelperLock = Flock<File>;

/// The directory of one VM; its methods name the files in it.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    base: PathBuf,
    path: PathBuf,
}

impl RuntimeDir {
    /// The directory of VM `name` below `base` (default: see `default_base`). One that exists and
    /// that others could change is refused.
    ///
    /// # Errors
    /// Refused as said; of class usage if the path is too long for a socket in it.
    pub fn new(base: Option<&Path>, name: &VmName) -> Result<Self, VmError> {
        let directory = Self::locate(base, name)?;
        private::open(&directory.base, name.as_str(), Owner::Trusted)?;
        Ok(directory)
    }

    /// The same for a command that only asks the helper: root may ask another user's.
    ///
    /// # Errors
    /// Refused if others could change it.
    pub fn of_helper(base: Option<&Path>, name: &VmName) -> Result<Self, VmError> {
        let directory = Self::locate(base, name)?;
        private::open(&directory.base, name.as_str(), Owner::Asked)?;
        Ok(directory)
    }

    /// All below `base` that are of this user, each with what is known of its VM.
    pub fn known(base: Option<&Path>) -> Vec<(Self, VmFile)> {
        let base = base.map_or_else(default_base, Path::to_owned);
        let names = std::fs::read_dir(&base).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().to_str()?.parse::<VmName>().ok());
        let directories = names.filter_map(|name| Self::new(Some(&base), &name).ok());
        directories
            .filter_map(|directory| directory.vm().ok().map(|file| (directory, file)))
            .collect()
    }

    fn locate(base: Option<&Path>, name: &VmName) -> Result<Self> {
        let base = base.map_or_else(default_base, Path::to_owned);
        let base =
            std::path::absolute(base).context("making the runtime directory's path absolute")?;
        let path = base.join(name.as_str());
        let Some(text) = path.to_str() else {
            return Err(refused(format!(
                "the runtime directory {} is not valid UTF-8; name another by --runtime-dir",
                path.display()
            )));
        };
        if text.len() + "/control.sock".len() > MAX_SOCKET_PATH || text.contains([',', '=']) {
            return Err(refused(format!(
                "the runtime directory {text} cannot hold sockets (too long, at most {} bytes, or a comma or '=' in it); name another by --runtime-dir",
                MAX_SOCKET_PATH - "/control.sock".len()
            )));
        }
        Ok(Self { base, path })
    }

    /// Makes the directory, for its owner alone.
    ///
    /// # Errors
    /// Refused if what is there is not a directory of this user.
    pub fn create(&self) -> Result<(), VmError> {
        Ok(private::create(&self.base, self.name())?)
    }

    fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// The directory itself, checked again.
    fn directory(&self) -> Result<OwnedFd> {
        let directory = private::open(&self.base, self.name(), Owner::Trusted)?;
        directory.with_context(|| format!("there is no runtime directory {}", self.path.display()))
    }

    /// A file of it, up to `limit` bytes.
    ///
    /// # Errors
    /// If it cannot be read or is longer.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, VmError> {
        let directory = self.directory()?;
        let read = private::read_file(&directory, name, limit);
        Ok(read.with_context(|| format!("reading {}/{name}", self.path.display()))?)
    }

    /// Writes a file of it, at once or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), VmError> {
        let directory = self.directory()?;
        let written = private::replace_file(&directory, name, bytes);
        Ok(written.with_context(|| format!("writing {}/{name}", self.path.display()))?)
    }

    fn open(&self, name: &str, flags: OFlag) -> Result<File> {
        let directory = self.directory()?;
        private::open_file(&directory, name, flags)
            .with_context(|| format!("opening {}/{name}", self.path.display()))
    }

    /// The helper's log, to be written at its end.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open_helper_log(&self) -> Result<File, VmError> {
        Ok(self.open("helper.log", OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND)?)
    }

    /// Why the helper that was started last has ended, if it failed.
    pub fn helper_failure(&self) -> Option<Failure> {
        serde_json::from_slice(&self.read(HELPER_FAILURE, MAX_VM_FILE_BYTES).ok()?).ok()
    }

    /// Writes down why a helper ended.
    pub fn set_helper_failure(&self, failure: &Failure) {
        let text = serde_json::to_vec(failure).unwrap_or_default();
        if let Err(error) = self.replace(HELPER_FAILURE, &text) {
            tracing::warn!(error = format!("{error:#}"), "the failure was not written down");
        }
    }

    /// A new helper begins.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn forget_helper_failure(&self) -> Result<(), VmError> {
        self.forget(HELPER_FAILURE)
    }

    /// QEMU's log, empty.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create_qemu_log(&self) -> Result<File, VmError> {
        Ok(self.open("qemu.log", OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC)?)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's monitor.
    pub fn qmp(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// The plugin's socket.
    pub fn plugin(&self) -> PathBuf {
        self.path.join("plugin.sock")
    }

    /// The helper's control socket.
    pub fn control(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Capabilities and parameters of QEMU's migration as they were before a checkpoint by stream
    /// changed them.
    pub fn migration_journal(&self) -> PathBuf {
        self.path.join("migration.json")
    }

    /// How far an adoption got.
    pub fn adoption(&self) -> PathBuf {
        self.path.join("adopt.json")
    }

    /// What a restore has made so far.
    pub fn restore_record(&self) -> PathBuf {
        self.path.join("restore.json")
    }

    /// The socket of QEMU's NBD server.
    pub fn nbd(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    /// The socket of the helper's own NBD server, which has the blocks of a restored VM's disks
    /// that have not arrived.
    pub fn blocks(&self) -> PathBuf {
        self.path.join("blocks.sock")
    }

    /// The helper's log.
    pub fn helper_log(&self) -> PathBuf {
        self.path.join("helper.log")
    }

    /// QEMU's log.
    pub fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// The file with the helper's process ID.
    pub fn helper_pid(&self) -> PathBuf {
        self.path.join("helper.pid")
    }

    /// The helper that holds [`RuntimeDir::lock_helper`].
    ///
    /// # Errors
    /// If the kernel lists no holder.
    pub fn helper_pid_of_holder(&self) -> Result<Pid, VmError> {
        let text = self.read("helper.pid", 32)?;
        let pid = std::str::from_utf8(&text)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .filter(|pid| *pid > 1);
        let pid = pid.map(Pid::from_raw);
        Ok(pid.with_context(|| format!("{} holds no process id", self.helper_pid().display()))?)
    }

    /// Writes down what was launched.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_vm(&self, vm: &VmFile) -> Result<(), VmError> {
        let text = serde_json::to_vec_pretty(vm).context("encoding machine.json")?;
        self.replace("machine.json", &text)
    }

    /// Whether what is known of the VM was written down so lately. A clock that was set back says
    /// no.
    pub fn launched_within(&self, time: Duration) -> bool {
        let written =
            std::fs::metadata(self.path.join("machine.json")).and_then(|facts| facts.modified());
        written.is_ok_and(|written| written.elapsed().is_ok_and(|age| age < time))
    }

    /// What was launched.
    ///
    /// # Errors
    /// Refused if there is no VM of this name; fails if its file is of another format or damaged.
    pub fn vm(&self) -> Result<VmFile, VmError> {
        let path = self.path.join("machine.json");
        if !path.exists() {
            return Err(refused(format!(
                "no VM is known at {}; start one by 'stillpoint run', attach one by --qmp, or name its --runtime-dir",
                self.path.display()
            ))
            .into());
        }
        let text = self.read("machine.json", MAX_VM_FILE_BYTES)?;
        let vm: VmFile = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        let (has, reads) = (vm.format, VmFile::FORMAT);
        if has != reads {
            let path = path.display();
            return Err(anyhow!("{path} has format {has}; this build reads {reads}").into());
        }
        Ok(vm)
    }

    /// The devices that the VM had when a helper first asked; `now` is remembered if none did.
    pub(crate) fn devices_at_start(&self, now: &[String]) -> Result<Vec<String>> {
        let path = self.path.join("devices.json");
        if !path.exists() {
            self.replace(
                "devices.json",
                &serde_json::to_vec(now).context("encoding devices.json")?,
            )?;
        }
        let text = self.read("devices.json", MAX_VM_FILE_BYTES)?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// A new VM of this name begins: what was known of an earlier one is gone.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn forget_earlier(&self) -> Result<(), VmError> {
        self.forget("devices.json")?;
        // The settings of another process: restoring them here would change settings that no helper
        // has changed.
        self.forget("migration.json")?;
        self.forget("writer-epoch")?;
        self.forget_rollbacks()?;
        self.forget(MARKS)
    }

    /// What an earlier helper left behind in the way of marks of written pages. None if that is not
    /// known.
    pub fn marks(&self) -> Option<Marks> {
        serde_json::from_slice(&self.read(MARKS, MAX_MARKS_BYTES).ok()?).ok()
    }

    /// Writes down what the marks of written pages count from.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_marks(&self, marks: Marks) -> Result<(), VmError> {
        self.replace(MARKS, &serde_json::to_vec(&marks).context("encoding the record of marks")?)
    }

    /// From here on the kernel's marks alone do not tell what was written: a claim begins, whose
    /// pages die with its helper, or another process has used them.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn forget_exact_marks(&self) -> Result<(), VmError> {
        match self.marks() {
            Some(marks) => self.set_marks(Marks { is_exact: false, ..marks }),
            None => Ok(self.forget(MARKS)?),
        }
    }

    /// The highest writer epoch that this VM's instance has claimed.
    pub fn writer_epoch(&self) -> Option<Epoch> {
        let text = self.read("writer-epoch", 32).ok()?;
        std::str::from_utf8(&text).ok()?.trim().parse().ok().map(Epoch)
    }

    /// Writes down the epoch that the helper has claimed.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_writer_epoch(&self, epoch: Epoch) -> Result<(), VmError> {
        self.replace("writer-epoch", epoch.0.to_string().as_bytes())
    }

    /// Removes a file of the directory; one that is missing is fine.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn forget(&self, name: &str) -> Result<(), VmError> {
        let directory = self.directory()?;
        let removed = private::remove_file(&directory, name);
        Ok(removed.with_context(|| format!("removing {}/{name}", self.path.display()))?)
    }

    /// One helper per VM: the lock ends with the process that holds it, however it dies.
    ///
    /// # Errors
    /// Refused while another helper holds it.
    pub fn lock_helper(&self) -> Result<HelperLock, VmError> {
        let file = self.open("helper.lock", OFlag::O_WRONLY | OFlag::O_CREAT)?;
        files::lock(file).map_err(|_| {
            let pid = self
                .helper_pid_of_holder()
                .map_or_else(|_| "unknown".to_owned(), |pid| pid.to_string());
            refused(format!(
                "a helper (pid {pid}) is attached to this VM already; use it, or replace it by 'stillpoint attach --take-over'"
            ))
            .into()
        })
    }
}

impl RuntimeDir {
    /// Whether `pid` holds [`RuntimeDir::lock_helper`], as the kernel tells.
    pub fn is_locked_by(&self, pid: Pid) -> bool {
        let Ok(facts) = std::fs::symlink_metadata(self.path.join("helper.lock")) else {
            return false;
        };
        let Ok(table) = files::read_limited(Path::new("/proc/locks"), MAX_LOCKS_BYTES) else {
            return false;
        };
        String::from_utf8_lossy(&table)
            .lines()
            .any(|line| flock(line, facts.ino()) == Some(pid.as_raw().unsigned_abs()))
    }
}

/// Who holds a lock by `flock` on `file`, in words.
pub fn flock_holder(file: &File) -> Option<String> {
    let inode = file.metadata().ok()?.ino();
    let table = files::read_limited(Path::new("/proc/locks"), MAX_LOCKS_BYTES).ok()?;
    let pid = String::from_utf8_lossy(&table).lines().find_map(|line| flock(line, inode))?;
    let words = process::open(pid).and_then(|process| process::command_line(&process));
    let line = words.unwrap_or_default().join(&b' ');
    Some(format!("process {pid} ({})", String::from_utf8_lossy(&line)))
}

/// The holder of an inode's lock, not one that waits for it, which procfs takes for the same:
/// `1: FLOCK  ADVISORY  WRITE 815 00:15:4711 0 EOF`. The device is
/// not compared: some file systems show another one there.
fn flock(line: &str, inode: u64) -> Option<u32> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, "FLOCK", _, _, holder, place, ..] = fields.as_slice() else { return None };
    let is_it = place.rsplit(':').next().is_some_and(|number| number.parse() == Ok(inode));
    is_it.then(|| holder.parse().ok())?
}

/// Root's is `/run/stillpoint`; a user's is in their own run directory, or in /tmp where they have
/// none.
fn default_base() -> PathBuf {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/stillpoint");
    }
    // Another user's variable may still be set.
    let is_own = |path: &PathBuf| {
        path.is_absolute()
            && std::fs::metadata(path)
                .is_ok_and(|facts| facts.is_dir() && facts.uid() == user.as_raw())
    };
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_own);
    let session =
        session.or_else(|| Some(PathBuf::from(format!("/run/user/{user}"))).filter(is_own));
    session.map_or_else(
        || PathBuf::from(format!("/tmp/stillpoint-{user}")),
        |path| path.join("stillpoint"),
    )
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::error::{Class, EngineError, Phase};
    use checkpoint_format::{CheckpointId, CheckpointIdentity};

    #[test]
    fn marks_count_from_one_certain_checkpoint() {
        let identity = |id: u64, manifest: &str| {
            CheckpointIdentity::new(CheckpointId(id), manifest.as_bytes())
        };
        let lineage = [identity(1, "one"), identity(2, "two")];
        let marks = |since| Marks { since, is_exact: true };
        assert_eq!(marks(identity(2, "two")).of(&lineage), Some(marks(identity(2, "two"))));
        assert!(
            marks(identity(1, "one")).of(&lineage).is_some(),
            "of an ancestor they hold more than is needed"
        );
        assert_eq!(marks(identity(2, "another")).of(&lineage), None);
        assert_eq!(marks(identity(3, "three")).of(&lineage), None);
    }

    #[test]
    fn runtime_lock_names_its_holder() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        assert!(!runtime.is_locked_by(Pid::this()));
        let lock = runtime.lock_helper().unwrap();
        assert!(runtime.is_locked_by(Pid::this()) && !runtime.is_locked_by(Pid::from_raw(1)));
        drop(lock);
        assert!(!runtime.is_locked_by(Pid::this()));
        assert_eq!(flock("1: FLOCK  ADVISORY  WRITE 815 00:15:4711 0 EOF", 4711), Some(815));
        assert_eq!(
            flock("1: -> FLOCK  ADVISORY  WRITE 815 00:15:4711 0 EOF", 4711),
            None,
            "it waits for the lock"
        );
        assert_eq!(flock("1: POSIX  ADVISORY  WRITE 815 00:15:4711 0 EOF", 4711), None);
    }

    #[test]
    fn runtime_directory_must_be_short_enough_for_sockets() {
        let long = PathBuf::from(format!("/{}", "x".repeat(100)));
        let error = RuntimeDir::new(Some(&long), &"m".parse().unwrap()).unwrap_err();
        assert_eq!(error.class(), Class::Refused);
    }

    #[test]
    fn failure_of_a_helper_keeps_class_and_phase() {
        let error = EngineError::new(Phase::Upload, refused("it runs elsewhere"));
        let failure = Failure::of(&error.context("answering"));
        let sent = serde_json::to_value(&failure).unwrap();
        assert_eq!(
            sent,
            serde_json::json!({
                "message": "answering: it runs elsewhere",
                "exit_code": 3,
                "class": "refused",
                "phase": "upload"
            })
        );
        let received = EngineError::from(serde_json::from_value::<Failure>(sent).unwrap());
        assert_eq!((received.class(), received.phase()), (Class::Refused, Phase::Upload));
        assert_eq!(received.explain(), "answering: it runs elsewhere");
        // An earlier version sends neither.
        let sent = serde_json::json!({ "message": "x", "exit_code": 4 });
        let received = EngineError::from(serde_json::from_value::<Failure>(sent).unwrap());
        assert_eq!((received.class(), received.phase()), (Class::Store, Phase::Unknown));
    }
}
