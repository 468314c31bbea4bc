//! A scripted VM with its disk, its runtime directory and a store, and helpers beside it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use checkpoint_format::{CheckpointId, SpaceName, VmName};
use checkpoint_store::{
    Fault, FaultRule, FaultyStore, MemoryStore, Mode, Repository, RepositoryOptions, RetryPolicy,
};
use engine::checkpoint::outcome::{Kind, Outcome};
use engine::checkpoint::{Checkpointer, Choice, Force, Report, StoreSession};
use engine::progress::Silent;
use engine::restore::Source;
use scripted_vm::{Act, Body, Gate, ScriptedQemu, State, Version};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use vm::error::{Class, class_of, explain};
use vm::memory_source::EngineChoice;
use vm::running::Vm;
use vm::runtime_dir::{RuntimeDir, VmFile};

pub(crate) const PAGE: usize = 4096;
/// Pages of `pc.ram` and of `vga.vram`.
const PAGES: (usize, usize) = (256, 16);
/// The only disk, at first.
pub(crate) const DISK: &str = "d0";
const DISK_BYTES: usize = 1 << 20;

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Tracker,
    Stream,
}

pub(crate) const BOTH: [By; 2] = [By::Tracker, By::Stream];

pub(crate) struct Scene {
    pub qemu: ScriptedQemu,
    pub body: Body,
    pub runtime: RuntimeDir,
    pub store: MemoryStore,
    pub file: VmFile,
    pub directory: TempDir,
    /// Capabilities and parameters as the owner set them.
    settings: Value,
    /// How often the guest has worked.
    works: usize,
}

/// A helper and what it sees of the store.
pub(crate) struct Helper {
    pub checkpointer: Checkpointer,
    pub store: FaultyStore,
}

/// A helper whose checkpoint is under way.
pub(crate) struct Running {
    task: JoinHandle<(Helper, Result<Outcome, anyhow::Error>)>,
    store: FaultyStore,
}

pub(crate) fn name() -> VmName {
    "vm".parse().unwrap()
}

/// Retries soon, gives up soon.
fn options() -> RepositoryOptions {
    let retry = RetryPolicy {
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(5),
        give_up_after: Duration::from_millis(400),
        ..RetryPolicy::default()
    };
    RepositoryOptions { retry, call_limit: Duration::from_millis(300), ..Default::default() }
}

pub(crate) async fn open(store: impl checkpoint_store::Store + 'static) -> Repository {
    Repository::open_with(Arc::new(store), Mode::CreateIfMissing, options()).await.unwrap()
}

/// Neither zero nor compressible.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state ^ (state >> 29)).to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

/// Of this scene alone: an instance is looked for among all processes of the host.
fn instance(directory: &std::path::Path) -> String {
    let name = directory.file_name().unwrap().to_str().unwrap();
    format!("scripted{}", name.trim_start_matches("sp-").to_lowercase())
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self::with(Version::V10_0, DISK_BYTES)
    }

    pub(crate) fn with(version: Version, disk_bytes: usize) -> Self {
        Self::build(version, Some(disk_bytes), None)
    }

    /// With a read-only disk `cd` beside the other: a layer.
    pub(crate) fn with_layer(content: Vec<u8>) -> Self {
        Self::build(Version::V10_0, Some(DISK_BYTES), Some(content))
    }

    /// With that disk alone.
    pub(crate) fn read_only(content: Vec<u8>) -> Self {
        Self::build(Version::V10_0, None, Some(content))
    }

    fn build(version: Version, disk_bytes: Option<usize>, layer: Option<Vec<u8>>) -> Self {
        let directory = tempfile::Builder::new().prefix("sp-").tempdir().unwrap();
        let runtime = RuntimeDir::new(Some(&directory.path().join("run")), &name()).unwrap();
        runtime.create().unwrap();
        let disks = [(DISK, disk_bytes.map(noise), false), ("cd", layer, true)];
        let disks = disks.into_iter().filter_map(|(name, content, read_only)| {
            Some((name, directory.path().join(format!("{name}.img")), content?, read_only))
        });
        let disks: Vec<_> = disks.collect();
        let open = |(_, path, content, _): &(&str, PathBuf, Vec<u8>, bool)| {
            std::fs::write(path, content).unwrap();
            File::options().read(true).write(true).open(path).unwrap()
        };
        let files: Vec<File> = disks.iter().map(open).collect();
        let body = Body::start(directory.path(), &runtime.plugin(), PAGES, &files);
        let qemu = ScriptedQemu::new(version, body.ram());
        qemu.with(|state| (0..32).for_each(|page| state.ram.fill(0, page, page as u8 + 1)));
        let mut arguments =
            ["-machine", &version.machine_type(), "-m", "1M"].map(str::to_owned).to_vec();
        for (name, path, content, read_only) in disks {
            let mut drive = format!(
                "if=none,id={name},node-name={name}-node,format=raw,file={}",
                path.display()
            );
            drive += if read_only { ",read-only=on" } else { "" };
            let device = format!("virtio-blk-pci,id={name}-dev,drive={name}");
            arguments.extend(["-drive".into(), drive, "-device".into(), device]);
            qemu.with(|state| {
                state.blocks.add_disk(name, &path, content, read_only);
                let path = format!("/machine/peripheral/{name}-dev");
                state.devices.push((path, "virtio-blk-pci".into()));
            });
        }
        qemu.listen(&runtime.qmp()).unwrap();
        let file = VmFile {
            format: VmFile::FORMAT,
            name: name(),
            store: format!("file://{}/store", directory.path().display()),
            instance: instance(directory.path()),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            pid: Some(body.pid()),
            qemu_version: "10.0.2".into(),
            machine_type: version.machine_type(),
            accelerator: "tcg".into(),
            ram_bytes: (PAGES.0 * PAGE) as u64,
            ram_block: "pc.ram".into(),
            arguments,
            directory: directory.path().to_owned(),
            fleecing: directory.path().to_owned(),
            restored_from: None,
            external: None,
        };
        runtime.save_vm(&file).unwrap();
        let store = MemoryStore::new();
        let mut scene =
            Self { qemu, body, runtime, store, file, directory, settings: Value::Null, works: 0 };
        scene.settings = scene.settings_now();
        scene
    }

    fn settings_now(&self) -> Value {
        self.qemu.with(|state| serde_json::json!([state.capabilities, state.parameters]))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) async fn vm(&self) -> Vm {
        Vm::attach(self.runtime.clone()).await.unwrap()
    }

    /// A helper whose store is the scene's; faults of one helper's store are its own.
    pub(crate) async fn helper(&self) -> Helper {
        let store = FaultyStore::new(Arc::new(self.store.clone()));
        let repository = open(store.clone()).await;
        let session = StoreSession::claim(repository, &self.file, &self.runtime, Force::No).await;
        let session = session.unwrap();
        Helper { checkpointer: Checkpointer::with_session(self.vm().await, session), store }
    }

    /// A helper that opens the store by its URL, as real ones do.
    pub(crate) async fn helper_by_url(&self) -> Helper {
        let store = FaultyStore::new(Arc::new(self.store.clone()));
        Helper { checkpointer: Checkpointer::new(self.vm().await), store }
    }

    /// With one checkpoint by the tracker.
    pub(crate) async fn begun() -> (Self, Helper) {
        let scene = Self::new();
        let mut helper = scene.helper().await;
        helper.take(By::Tracker).await.unwrap();
        (scene, helper)
    }

    /// The guest writes to memory and disk, each time elsewhere: what a failed checkpoint took must
    /// not be in the next one for another reason.
    pub(crate) fn guest_works(&mut self) {
        let (offset, byte) = self.next_place();
        let at = usize::from(byte);
        self.body.write(&[3 + at, 100 + at, 200 + at]);
        self.qemu.with(|state| state.blocks.write(DISK, offset, &[byte; 512]));
    }

    /// Where on the disk the guest writes next, and what.
    fn next_place(&mut self) -> (usize, u8) {
        self.works += 1;
        (8192 + self.works * 2 * PAGE, self.works as u8)
    }

    /// The guest writes to its disk as soon as it runs again, after a checkpoint's instant.
    fn guest_works_after_pause(&mut self) {
        let (offset, byte) = self.next_place();
        let write = move |state: &mut State| state.blocks.write(DISK, offset, &[byte; 512]);
        self.qemu.on("cont", Act::after(write));
    }

    /// As a kill ends it: connections first, and nothing reaches the store any more.
    pub(crate) async fn kill(&self, helper: Running) {
        self.qemu.sever();
        helper.store.inject(FaultRule::any(Fault::HangBefore));
        helper.task.abort();
        let _ = helper.task.await;
    }

    pub(crate) async fn repository(&self) -> Repository {
        open(self.store.clone()).await
    }

    pub(crate) async fn checkpoints(&self) -> Vec<u64> {
        let ids = self.repository().await.checkpoints(&name()).await.unwrap();
        ids.into_iter().map(|id| id.0).collect()
    }

    /// The guest runs, and nothing of a checkpoint is left in QEMU but what the next needs.
    pub(crate) fn assert_at_rest(&self, about: &str) {
        self.qemu.with(|state| {
            assert_eq!(state.run_state, "running", "{about}");
            assert_eq!(state.blocks.extra_nodes(), [""; 0], "{about}");
            assert_eq!(state.blocks.job_ids(), [""; 0], "{about}");
            let objects: Vec<&str> = state.objects.iter().map(|(id, _)| id.as_str()).collect();
            assert_eq!(objects, [""; 0], "{about}");
            let recording = state.blocks.bitmaps(DISK);
            let own = recording.iter().filter(|(name, _)| !name.contains("/size-"));
            assert!(
                own.clone().count() <= 1 && own.clone().all(|(_, on)| *on),
                "{about}: {recording:?}"
            );
        });
        assert_eq!(self.settings_now(), self.settings, "{about}");
        assert!(!self.runtime.migration_journal().exists(), "{about}");
    }

    /// The checkpoint holds what memory and disk are now.
    pub(crate) async fn assert_exact(&self, id: CheckpointId) {
        let (repository, name) = (self.repository().await, name());
        let source = Source::open(&repository, &name, id, Arc::new(Silent)).await.unwrap();
        let whole = async |space: SpaceName| {
            let record = source.manifest().space(&space).unwrap_or_else(|| panic!("no {space}"));
            source.read_whole(record).await.unwrap()
        };
        for (part, block) in ["pc.ram", "vga.vram"].into_iter().enumerate() {
            let stored = whole(SpaceName::ram(block).unwrap()).await;
            for (page, bytes) in stored.chunks(PAGE).enumerate() {
                let now = self.qemu.with(|state| state.ram.page(part, page));
                assert!(bytes == now, "page {page} of {block} in {id}");
            }
        }
        let stored = whole(SpaceName::disk(&format!("{DISK}-node")).unwrap()).await;
        let now = self.qemu.with(|state| state.blocks.read(DISK));
        let differs = stored.iter().zip(&now).position(|(stored, now)| stored != now);
        assert!(differs.is_none() && stored.len() >= now.len(), "disk at {differs:?} in {id}");
    }

    /// After whatever went wrong: the next checkpoint builds on the newest and is exact.
    pub(crate) async fn assert_next(
        &mut self,
        helper: &mut Helper,
        by: By,
        about: &str,
    ) -> Outcome {
        self.guest_works();
        let newest = self.checkpoints().await.last().copied();
        let taken = helper.take(by).await;
        let taken = taken.unwrap_or_else(|error| panic!("{about}: {}", explain(&error)));
        assert_eq!(taken.parent.map(|id| id.0), newest, "{about}");
        let kind = if newest.is_some() { Kind::Incremental } else { Kind::Full };
        assert_eq!(taken.kind, kind, "{about}");
        self.assert_exact(taken.id).await;
        self.assert_at_rest(about);
        taken
    }

    /// The checkpoint fails so, the guest and QEMU are as they were, and the next one is whole.
    pub(crate) async fn assert_fails(&mut self, helper: &mut Helper, by: By, words: &str) -> Class {
        self.guest_works();
        self.guest_works_after_pause();
        let before = self.checkpoints().await;
        let class = helper.fails(by, words).await;
        self.qemu.forget_script();
        assert_eq!(self.checkpoints().await, before, "{words}");
        self.assert_at_rest(words);
        class
    }
}

impl Helper {
    /// Beside a VM that was restored or adopted, whose store is not the scene's.
    pub(crate) fn of(checkpointer: Checkpointer, scene: &Scene) -> Self {
        Self { checkpointer, store: FaultyStore::new(Arc::new(scene.store.clone())) }
    }

    pub(crate) async fn take(&mut self, by: By) -> Result<Outcome, anyhow::Error> {
        self.take_with(by, false).await
    }

    pub(crate) async fn take_with(&mut self, by: By, full: bool) -> Result<Outcome, anyhow::Error> {
        let engine = match by {
            By::Tracker => EngineChoice::Tracker,
            By::Stream => EngineChoice::Stream,
        };
        let choice = Choice { engine: Some(engine), stream: None, full };
        let (report, _) = tokio::sync::mpsc::channel(1);
        Ok(self.checkpointer.take(choice, &Report::to(report)).await?)
    }

    /// That it fails with these words; returns the class of the error.
    pub(crate) async fn fails(&mut self, by: By, words: &str) -> Class {
        let error = self.take(by).await.expect_err(words);
        let said = format!("{error:#}");
        assert!(said.contains(words), "{said:?} has no {words:?}");
        class_of(&error)
    }

    /// Begins a checkpoint.
    pub(crate) fn begin(mut self, by: By) -> Running {
        let store = self.store.clone();
        let task = tokio::spawn(async move {
            let taken = self.take(by).await;
            (self, taken)
        });
        Running { task, store }
    }

    /// Answers that QEMU does not give are waited for so long.
    pub(crate) fn wait_for_qemu(mut self, limit: Duration) -> Self {
        self.checkpointer.vm.qmp = self.checkpointer.vm.qmp.with_timeout(limit);
        self
    }
}

impl Running {
    /// Waits until a command of it has come to the gate.
    pub(crate) async fn at(&mut self, gate: &mut Gate, about: &str) {
        tokio::select! {
            () = gate.reached() => {}
            ended = &mut self.task => {
                let (_, taken) = ended.unwrap();
                panic!("{about}: it ended before: {:?}", taken.map(|taken| taken.id));
            }
        }
    }

    pub(crate) async fn end(self) -> (Helper, Result<Outcome, anyhow::Error>) {
        self.task.await.unwrap()
    }
}
