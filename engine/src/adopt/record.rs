//! `adopt.json`: the stage of an adoption, for the next helper if this one is killed.
//!
//! Everything before [`Stage::Decided`] means that the old QEMU is the VM, everything from there on
//! that the new one is. The file is replaced by a rename before what it says takes effect.
//!
//! ```text
//! started -> moving -> decided -> resuming -> running -> (removed)
//!    |          |         |           |
//!    +----------+---------+-----------+--> (removed): the old QEMU continues
//! ```
//! `decided` means that the new QEMU was not told to run yet; when it dies there, the old one has
//! everything that it had. `resuming` means that it may have run; then the old one continues only
//! if no disk was written since.

use super::line::Later;
use anyhow::{Context, Result, bail};
use qmp_bridge::migration::Found;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vm::process;
use vm::runtime_dir::{RuntimeDir, VmFile};

const FORMAT: u32 = 1;
/// It holds a VM's arguments, as machine.json does.
const MAX_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// The new QEMU may have been started; the old one has not noticed.
    Started,
    /// The old one's migration was set up.
    Moving,
    /// Memory, devices and disks are the new one's. It has not run.
    Decided,
    /// It got `cont`.
    Resuming,
    /// It has run.
    Running,
}

/// Which of the two is the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Stage {
    pub(super) fn vm(self) -> Side {
        match self {
            Self::Started | Self::Moving => Side::Source,
            Self::Decided | Self::Resuming | Self::Running => Side::Destination,
        }
    }

    fn next(self) -> Option<Self> {
        match self {
            Self::Started => Some(Self::Moving),
            Self::Moving => Some(Self::Decided),
            Self::Decided => Some(Self::Resuming),
            Self::Resuming => Some(Self::Running),
            Self::Running => None,
        }
    }
}

/// A process that is not taken for a later one of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub pid: u32,
    /// In the kernel's ticks since boot.
    pub started: u64,
}

impl Process {
    pub(super) fn of(pid: u32) -> Option<Self> {
        process::started(pid).map(|started| Self { pid, started })
    }

    pub(super) fn lives(self) -> bool {
        process::started(self.pid) == Some(self.started)
    }
}

/// An image as it was when the old QEMU had given it away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageMark {
    pub path: PathBuf,
    bytes: u64,
    modified: (i64, i64),
}

impl ImageMark {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let facts =
            std::fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            bytes: facts.size(),
            modified: (facts.mtime(), facts.mtime_nsec()),
        })
    }

    fn is_untouched(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    stage: Stage,
    pub source: Process,
    /// The old QEMU's monitor.
    pub monitor: PathBuf,
    /// None until it has been started.
    pub destination: Option<Process>,
    /// The old QEMU's migration settings, as they were.
    pub found: Found,
    /// What the VM is afterwards.
    pub file: VmFile,
    pub later: Later,
    /// The writable images at the decision.
    pub images: Vec<ImageMark>,
}

impl Record {
    pub(super) fn begin(
        source: Process,
        monitor: PathBuf,
        found: Found,
        file: VmFile,
        later: Later,
    ) -> Self {
        Self {
            format: FORMAT,
            stage: Stage::Started,
            source,
            monitor,
            destination: None,
            found,
            file,
            later,
            images: Vec::new(),
        }
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    /// The next stage, on disk before this returns.
    pub(super) fn advance(&mut self, to: Stage, runtime: &RuntimeDir) -> Result<()> {
        if self.stage.next() != Some(to) {
            bail!("an adoption cannot go from {:?} to {to:?}", self.stage);
        }
        self.stage = to;
        self.save(runtime)
    }

    /// It need not survive a power cut, which neither QEMU survives.
    pub(super) fn save(&self, runtime: &RuntimeDir) -> Result<()> {
        let text = serde_json::to_vec(self).context("encoding adopt.json")?;
        Ok(runtime.replace("adopt.json", &text)?)
    }

    pub(super) fn read(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let path = runtime.adoption();
        if !path.exists() {
            return Ok(None);
        }
        let text = runtime.read("adopt.json", MAX_BYTES)?;
        let record: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        if record.format != FORMAT {
            bail!("{} has format {}; this build reads {FORMAT}", path.display(), record.format);
        }
        Ok(Some(record))
    }

    pub(super) fn remove(runtime: &RuntimeDir) -> Result<()> {
        match std::fs::remove_file(runtime.adoption()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", runtime.adoption().display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether the old QEMU may be let continue although the decision fell: the new one is dead and
    /// has written no disk.
    pub(super) fn can_be_undone(&self) -> bool {
        match self.stage {
            Stage::Started | Stage::Moving | Stage::Decided => true,
            Stage::Resuming => self.images.iter().all(ImageMark::is_untouched),
            Stage::Running => false,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::io::Write;

    fn record(images: Vec<ImageMark>) -> Record {
        let file = VmFile {
            format: VmFile::FORMAT,
            name: "m".parse().unwrap(),
            store: "file:///s".to_owned(),
            instance: "i".to_owned(),
            qemu: "/q".into(),
            pid: None,
            qemu_version: "10.0.2".to_owned(),
            machine_type: "pc".to_owned(),
            accelerator: "tcg".to_owned(),
            ram_bytes: 4096,
            ram_block: "pc.ram".to_owned(),
            arguments: Vec::new(),
            directory: "/".into(),
            fleecing: "/var/tmp".into(),
            restored_from: None,
            external: None,
        };
        let source = Process::of(std::process::id()).unwrap();
        Record {
            images,
            ..Record::begin(source, "/m".into(), Found::default(), file, Later::default())
        }
    }

    #[test]
    fn stages_come_in_their_order_and_are_on_disk() {
        let place = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(place.path()), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        assert_eq!(Record::read(&runtime).unwrap(), None);
        let mut record = record(Vec::new());
        record.save(&runtime).unwrap();
        assert!(
            record.advance(Stage::Decided, &runtime).is_err(),
            "nothing is decided before it moves"
        );
        for (stage, side) in [
            (Stage::Moving, Side::Source),
            (Stage::Decided, Side::Destination),
            (Stage::Resuming, Side::Destination),
            (Stage::Running, Side::Destination),
        ] {
            record.advance(stage, &runtime).unwrap();
            let read = Record::read(&runtime).unwrap().unwrap();
            assert_eq!((read.stage(), read.stage().vm()), (stage, side));
            assert_eq!(read, record);
        }
        assert!(record.advance(Stage::Running, &runtime).is_err());
        Record::remove(&runtime).unwrap();
        Record::remove(&runtime).unwrap();
        assert_eq!(Record::read(&runtime).unwrap(), None);
    }

    #[test]
    fn a_vm_that_may_have_run_is_undone_only_if_its_disks_are_untouched() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        image.write_all(b"disk").unwrap();
        let mut record = record(vec![ImageMark::of(image.path()).unwrap()]);
        for (stage, can) in [
            (Stage::Moving, true),
            (Stage::Decided, true),
            (Stage::Resuming, true),
            (Stage::Running, false),
        ] {
            record.stage = stage;
            assert_eq!(record.can_be_undone(), can, "{stage:?}");
        }
        image.write_all(b"more").unwrap();
        record.stage = Stage::Resuming;
        assert!(!record.can_be_undone());
        record.stage = Stage::Decided;
        assert!(record.can_be_undone(), "another process wrote: the new QEMU got no `cont`");
    }

    #[test]
    fn a_later_process_of_the_same_number_is_another() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.lives() && !Process { started: own.started + 1, ..own }.lives());
        assert_eq!(Process::of(0), None);
    }
}
