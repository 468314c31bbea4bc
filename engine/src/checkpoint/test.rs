//! The phases beside a scripted VM, with a memory source that is scripted too: what each end of
//! `capture` leaves.

use super::buffers::{Aborted, blocking};
use super::source::{CaptureContext, FailedDisks, MemorySource, NotTaken, Taken};
use super::staging::Staging;
use super::*;
use anyhow::anyhow;
use buffers::Buffers;
use checkpoint_format::{PageIndex, PageRange, VmName};
use futures::future::BoxFuture;
use outcome::Kind;
use qmp_bridge::capture::PreparedDisks;
use scripted_vm::{Body, ScriptedQemu, Version};
use vm::runtime_dir::{RuntimeDir, VmFile};

const PAGES: usize = 256;

/// A VM without disks, and a helper with one checkpoint of it.
struct Scene {
    qemu: ScriptedQemu,
    body: Body,
    checkpointer: Checkpointer,
    report: Report,
    _directory: tempfile::TempDir,
}

/// How the tracker's source ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It has one page more than the tracker.
    Well,
    /// Before it begins.
    Refused,
    /// After the instant was taken.
    Late,
    /// Its copying task panics.
    Panicked,
}

struct Scripted {
    tracker: Box<dyn MemorySource>,
    end: End,
}

/// Of `pc.ram`.
const SCRIPTED_PAGE: PageIndex = PageIndex(77);

impl MemorySource for Scripted {
    fn capture<'a>(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        context: CaptureContext<'a>,
    ) -> BoxFuture<'a, Result<Taken, NotTaken>> {
        Box::pin(async move {
            let Self { tracker, end } = *self;
            if end == End::Refused {
                return Err(NotTaken::before(Aborted::new(anyhow!("scripted"), buffers), disks));
            }
            if end == End::Panicked {
                let panics = |_: &mut Buffers| -> Result<()> { panic!("scripted") };
                let panicked = blocking(buffers, panics).await.err().unwrap();
                return Err(NotTaken::before(panicked, disks));
            }
            let mut taken = tracker.capture(buffers, disks, context).await?;
            if end == End::Late {
                return Err(NotTaken {
                    error: anyhow!("scripted"),
                    buffers: Some(taken.buffers),
                    disks: Some(FailedDisks::Captured(taken.claimed.disks)),
                });
            }
            let page = PageRange::single(SCRIPTED_PAGE);
            taken.buffers.staging.push(0, page).unwrap().fill(0xab);
            Ok(taken)
        })
    }
}

impl Scene {
    async fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("sp-").tempdir().unwrap();
        let name: VmName = "vm".parse().unwrap();
        let runtime = RuntimeDir::new(Some(&directory.path().join("run")), &name).unwrap();
        runtime.create().unwrap();
        let body = Body::start(directory.path(), &runtime.plugin(), (PAGES, 16), &[]);
        let qemu = ScriptedQemu::new(Version::V10_0, body.ram());
        qemu.with(|state| (0..32).for_each(|page| state.ram.fill(0, page, page as u8 + 1)));
        qemu.listen(&runtime.qmp()).unwrap();
        let machine_type = Version::V10_0.machine_type();
        let file = VmFile {
            format: VmFile::FORMAT,
            name,
            store: format!("file://{}/store", directory.path().display()),
            instance: "scripted".into(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            pid: Some(body.pid()),
            qemu_version: "10.0.2".into(),
            arguments: ["-machine", &machine_type, "-m", "1M"].map(str::to_owned).to_vec(),
            machine_type,
            accelerator: "tcg".into(),
            ram_bytes: (PAGES * 4096) as u64,
            ram_block: "pc.ram".into(),
            directory: directory.path().to_owned(),
            fleecing: directory.path().to_owned(),
            restored_from: None,
            external: None,
        };
        runtime.save_vm(&file).unwrap();
        let checkpointer = Checkpointer::new(Vm::attach(runtime).await.unwrap());
        let (report, _) = mpsc::channel(1);
        let mut scene =
            Self { qemu, body, checkpointer, report: Report(report), _directory: directory };
        assert_eq!(scene.checkpoint().await.kind, Kind::Full);
        scene
    }

    async fn checkpoint(&mut self) -> Outcome {
        self.checkpointer.take(Choice::default(), &self.report).await.unwrap()
    }

    async fn scripted(&mut self, end: End) -> Result<Outcome> {
        let mut phases = Phases::begin(Phase::Prepare);
        let Self { checkpointer, report, .. } = self;
        let prepared = checkpointer.prepare(Choice::default(), &mut phases, report).await;
        let mut prepared = prepared.unwrap();
        prepared.source = Box::new(Scripted { tracker: prepared.source, end });
        checkpointer.finish(prepared, &mut phases, report).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_brings_the_memory_of_a_checkpoint() {
    let mut scene = Scene::new().await;
    scene.body.write(&[3]);
    let outcome = scene.scripted(End::Well).await.unwrap();
    assert_eq!((outcome.kind, outcome.bytes_changed), (Kind::Incremental, 2 * 4096));
    let base = scene.checkpointer.base.as_ref().unwrap();
    let digest = checkpoint_format::PageDigest::of(&[0xab; 4096]);
    assert_eq!(base.spaces[0].table.get(SCRIPTED_PAGE), Some(digest));
}

/// What was written before the failure comes with the next checkpoint, which needs no look at the
/// store for its tables, but where a task took them along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_that_fails_leaves_everything_to_the_next_checkpoint() {
    for end in [End::Refused, End::Late, End::Panicked] {
        let mut scene = Scene::new().await;
        scene.body.write(&[3, 4]);
        let error = scene.scripted(end).await.expect_err("scripted");
        let words = if end == End::Panicked { "a copy task panicked" } else { "scripted" };
        assert!(format!("{error:#}").contains(words), "{end:?}: {error:#}");
        assert_eq!(scene.qemu.with(|state| state.run_state.clone()), "running", "{end:?}");
        let Checkpointer { staging, base, .. } = &scene.checkpointer;
        assert_eq!(staging.capacity(), Staging::default().capacity(), "{end:?}");
        assert_eq!(staging.free(), staging.capacity(), "{end:?}");
        assert_eq!(base.is_some(), end != End::Panicked, "{end:?}");
        assert!(base.as_ref().is_none_or(|base| !base.spaces.is_empty()), "{end:?}");
        scene.body.write(&[9]);
        let next = scene.checkpoint().await;
        // Three pages of memory; the device state may be stored once more.
        assert_eq!(next.kind, Kind::Incremental, "{end:?}");
        assert!([3 * 4096, 4 * 4096].contains(&next.bytes_changed), "{end:?}: {next:?}");
    }
}
