//! What a restore has made so far, so that a failed one leaves everything as it found it.
//!
//! The record is written into the runtime directory before anything is made, and removed right
//! before the guest may run. A restore that was killed left it there; the next one of that name
//! begins by undoing it.

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use vm::error::refused;
use vm::launch;
use vm::process;
use vm::runtime_dir::{HelperLock, RuntimeDir};

const FILE: &str = "restore.json";
/// Where the runtime directory's own files wait meanwhile.
const BEFORE: &str = "before-restore";
/// Files of the runtime directory that stay where they are.
const STAY: &[&str] = &[FILE, BEFORE, "helper.lock", "helper.log"];
const MAX_BYTES: u64 = 4 << 20;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// Directories that were missing, the outermost first.
    directories: Vec<PathBuf>,
    /// Files and sockets that were missing.
    files: Vec<PathBuf>,
    /// The new QEMU: its number and when it began.
    qemu: Option<(u32, u64)>,
    /// Whether all that was in the runtime directory has been set aside; what is there then is new.
    is_set_aside: bool,
    /// Whether the runtime directory was missing.
    made_runtime: bool,
    /// Whether its base was missing, too.
    made_base: bool,
}

pub(super) struct Undo {
    runtime: RuntimeDir,
    record: Record,
    /// No other restore, and no helper, uses the runtime directory meanwhile.
    name: HelperLock,
    /// No other restore fills the VM's directory meanwhile.
    _directory: Option<Flock<File>>,
}

impl Undo {
    /// Undoes what a killed restore of this name left, and begins with a runtime directory without
    /// another VM's files.
    pub(super) fn begin(runtime: &RuntimeDir) -> Result<Self> {
        if !runtime.restore_record().exists() {
            launch::refuse_alive(runtime)?;
        }
        let made_runtime = !runtime.path().exists();
        let made_base = runtime.path().parent().is_some_and(|base| !base.exists());
        runtime.create()?;
        let name = runtime.lock_helper()?;
        let earlier = Self::left(runtime)?;
        let made_runtime =
            made_runtime || earlier.as_ref().is_some_and(|record| record.made_runtime);
        let made_base = made_base || earlier.as_ref().is_some_and(|record| record.made_base);
        if let Some(record) = earlier {
            tracing::warn!("undoing what an earlier restore left that was killed");
            undo(runtime, &record).context("undoing an earlier restore that was killed")?;
            std::fs::remove_file(runtime.restore_record())
                .context("forgetting an earlier restore")?;
        }
        // Of one that was killed when it had succeeded.
        remove_tree(&runtime.path().join(BEFORE))?;
        let record = Record { made_runtime, made_base, ..Record::default() };
        Ok(Self { runtime: runtime.clone(), record, name, _directory: None })
    }

    fn left(runtime: &RuntimeDir) -> Result<Option<Record>> {
        if !runtime.restore_record().exists() {
            return Ok(None);
        }
        let text = runtime.read(FILE, MAX_BYTES)?;
        let read = serde_json::from_slice(&text);
        read.map(Some).with_context(|| {
            format!("{} is damaged; remove it", runtime.restore_record().display())
        })
    }

    /// Makes the VM's directory, in which `files` will be made. Refuses what exists already.
    pub(super) fn make_directory(&mut self, dir: &Path, files: Vec<PathBuf>) -> Result<()> {
        if let Some(path) = files.iter().find(|path| path.symlink_metadata().is_ok()) {
            return Err(refused(format!(
                "{} exists already; name another directory by --dir, or remove it",
                path.display()
            )));
        }
        let missing = dir.ancestors().take_while(|path| !path.exists()).map(Path::to_owned);
        self.record.directories = missing.collect::<Vec<_>>().into_iter().rev().collect();
        self.save()?;
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("making {}", dir.display()))?;
        let folder = File::open(dir).with_context(|| format!("opening {}", dir.display()))?;
        self._directory = match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Some(lock),
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(refused(format!(
                    "another restore is filling {}; wait for it",
                    dir.display()
                )));
            }
            Err((_, error)) => {
                tracing::warn!(%error, "{} cannot be locked; no other restore may use it meanwhile", dir.display());
                None
            }
        };
        self.record.files = files;
        self.save()?;
        self.set_aside()
    }

    /// The files of an earlier VM of this name are put back if this restore fails.
    fn set_aside(&mut self) -> Result<()> {
        let before = self.runtime.path().join(BEFORE);
        for (name, path) in entries(self.runtime.path())? {
            if !STAY.contains(&name.as_str()) {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&before)
                    .context("making room in the runtime directory")?;
                std::fs::rename(&path, before.join(&name))
                    .with_context(|| format!("setting {} aside", path.display()))?;
            }
        }
        self.record.is_set_aside = true;
        self.save()
    }

    pub(super) fn started(&mut self, pid: u32) -> Result<()> {
        self.record.qemu = process::started(pid).map(|started| (pid, started));
        self.save()
    }

    fn save(&self) -> Result<()> {
        let text =
            serde_json::to_vec(&self.record).context("internal error: encoding restore.json")?;
        Ok(self.runtime.replace(FILE, &text)?)
    }

    /// The guest is about to run: no later restore undoes this one.
    pub(super) fn forget(&self) -> Result<()> {
        remove_file(&self.runtime.restore_record())
    }

    /// The guest runs, and this process is its helper.
    pub(super) fn keep(self) -> HelperLock {
        if let Err(error) = remove_tree(&self.runtime.path().join(BEFORE)) {
            tracing::warn!(
                error = format!("{error:#}"),
                "files of an earlier VM of this name are left in the runtime directory"
            );
        }
        self.name
    }

    /// Puts everything back. What cannot be is named in the log.
    pub(super) fn run(self) {
        let done = undo(&self.runtime, &self.record).and_then(|()| {
            if self.record.made_runtime {
                remove_tree(self.runtime.path())?;
                if let Some(base) = self.runtime.path().parent().filter(|_| self.record.made_base) {
                    // Another VM may have its directory there by now.
                    let _ = std::fs::remove_dir(base);
                }
                return Ok(());
            }
            remove_file(&self.runtime.restore_record())
        });
        if let Err(error) = done {
            tracing::warn!(
                error = format!("{error:#}"),
                "the failed restore has left something; the next one tries again to remove it"
            );
        }
    }
}

fn undo(runtime: &RuntimeDir, record: &Record) -> Result<()> {
    if let Some((pid, started)) = record.qemu {
        process::end(pid, started)?;
    }
    for file in record.files.iter().filter(|file| is_made(file)) {
        remove_file(file)?;
    }
    for directory in record.directories.iter().rev() {
        // Fails if it is not empty: another process has made files in it since.
        let _ = std::fs::remove_dir(directory);
    }
    let before = runtime.path().join(BEFORE);
    let made = if record.is_set_aside { entries(runtime.path())? } else { Vec::new() };
    for (_, path) in made.iter().filter(|(name, _)| !STAY.contains(&name.as_str())) {
        remove_tree(path)?;
    }
    let aside = if before.exists() { entries(&before)? } else { Vec::new() };
    for (name, path) in aside {
        std::fs::rename(&path, runtime.path().join(&name))
            .with_context(|| format!("putting {} back", path.display()))?;
    }
    remove_tree(&before)
}

/// What a restore makes; a device in its place was there before.
fn is_made(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|facts| {
        let kind = facts.file_type();
        kind.is_file() || kind.is_socket() || kind.is_symlink()
    })
}

fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>> {
    let about = || format!("listing {}", directory.display());
    let list = std::fs::read_dir(directory).with_context(about)?;
    list.map(|entry| {
        entry
            .with_context(about)
            .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
    })
    .collect()
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A link is removed, never followed.
fn remove_tree(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(facts) if facts.is_dir() => {
            std::fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))
        }
        Ok(_) => remove_file(path),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn listed(path: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            entries(path).unwrap().into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    fn runtime(place: &Path) -> RuntimeDir {
        RuntimeDir::new(Some(&place.join("run")), &"m".parse().unwrap()).unwrap()
    }

    fn make(undo: &mut Undo, dir: &Path) {
        undo.make_directory(dir, vec![dir.join("disk"), dir.join("log")]).unwrap();
        std::fs::write(dir.join("disk"), "new").unwrap();
        undo.runtime.replace("machine.json", b"new").unwrap();
        undo.runtime.replace("marks.json", b"new").unwrap();
    }

    #[test]
    fn failed_restore_leaves_all_as_it_was() {
        let place = tempfile::tempdir().unwrap();
        let runtime = runtime(place.path());
        let mut undo = Undo::begin(&runtime).unwrap();
        make(&mut undo, &place.path().join("a/b"));
        undo.run();
        assert_eq!(listed(place.path()), [""; 0]);
        // What was there stays: other files of the directory, and what was known of an earlier VM.
        let dir = place.path().join("a");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("theirs"), "old").unwrap();
        runtime.create().unwrap();
        runtime.replace("machine.json", b"old").unwrap();
        let mut undo = Undo::begin(&runtime).unwrap();
        make(&mut undo, &dir);
        undo.run();
        assert_eq!(listed(&dir), ["theirs"]);
        assert_eq!(listed(runtime.path()), ["helper.lock", "machine.json"]);
        assert_eq!(runtime.read("machine.json", 9).unwrap(), b"old");
    }

    #[test]
    fn killed_restore_is_undone_by_the_next() {
        let place = tempfile::tempdir().unwrap();
        let (runtime, dir) = (runtime(place.path()), place.path().join("a"));
        runtime.create().unwrap();
        runtime.replace("machine.json", b"old").unwrap();
        let mut killed = Undo::begin(&runtime).unwrap();
        make(&mut killed, &dir);
        assert!(Undo::begin(&runtime).is_err(), "two restores of one name at once");
        drop(killed);
        assert!(runtime.restore_record().exists() && dir.join("disk").exists());
        let mut next = Undo::begin(&runtime).unwrap();
        assert!(!runtime.restore_record().exists() && !dir.exists());
        make(&mut next, &dir);
        next.forget().unwrap();
        drop(next.keep());
        assert_eq!(listed(runtime.path()), ["helper.lock", "machine.json", "marks.json"]);
        assert_eq!(runtime.read("machine.json", 9).unwrap(), b"new");
    }

    #[test]
    fn restore_touches_nothing_that_exists() {
        let place = tempfile::tempdir().unwrap();
        let runtime = runtime(place.path());
        let mut undo = Undo::begin(&runtime).unwrap();
        std::fs::write(place.path().join("disk"), "old").unwrap();
        assert!(undo.make_directory(place.path(), vec![place.path().join("disk")]).is_err());
        undo.run();
        assert_eq!(std::fs::read(place.path().join("disk")).unwrap(), b"old");
        let mut first = Undo::begin(&runtime).unwrap();
        make(&mut first, &place.path().join("a"));
        let other =
            RuntimeDir::new(Some(&place.path().join("run")), &"n".parse().unwrap()).unwrap();
        let mut second = Undo::begin(&other).unwrap();
        let error = second
            .make_directory(&place.path().join("a"), vec![place.path().join("a/other")])
            .unwrap_err();
        assert!(error.to_string().contains("another restore"), "{error}");
        second.run();
        assert!(place.path().join("a/disk").exists());
        first.forget().unwrap();
        drop(first.keep());
    }
}
