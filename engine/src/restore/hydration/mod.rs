//! Memory that arrives while the guest runs.
//!
//! The RAM file of a VM that was restored lazily is empty at first. A thread of QEMU that touches a
//! page which is not here waits in the kernel; a task reads such faults from the plugin's
//! userfaultfd, gets the page's frame from the store and installs the page, then the frame's other
//! pages. Beside it the filler brings all pages in the order of the packs, while no thread waits.
//!
//! Installed pages count as not written, and pages that are not here yet are as the checkpoint has
//! them: so an incremental checkpoint of the running VM takes only what the guest has written,
//! whatever has arrived. One that needs all memory is refused until it is here.
//!
//! Whatever fails is tried again: the guest waits for the page that it needs, and for no other. It
//! gets no page that is not verified: one that is damaged in the store stops it. If this process
//! ends, waiting threads continue to wait, and the next helper continues by the record in the
//! runtime directory. When all pages are here no thread waits for one again, and QEMU depends on no
//! helper.

mod faults;
mod filler;
mod parts;
mod record;
mod state;
mod working_set;

pub use state::{HydrationStatus, Trouble};

use super::backoff::Backoff;
use super::on_demand::{OnDemand, Origin};
use super::source::Source;
use crate::checkpoint::Arriving;
use crate::kill_point;
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, PageCount, PageMap, PageRange, PageSet, SpaceName, VmName};
use dirty_tracker::{BlockMemory, MissingPages, PluginHandles, TrackedBlock, TrackerError};
use parts::parts_of;
use qmp_bridge::Qmp;
use qmp_bridge::devices::{self, GuestDevice};
use record::Record;
use state::State;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::SetOnce;
use tokio::task::AbortHandle;
use vm::error::{EngineError, InPhase, Phase};
use vm::running::Vm;
use vm::runtime_dir::RuntimeDir;
use working_set::FirstPages;

/// Frames that are kept for the faults that follow.
const CACHE: ByteLen = ByteLen(32 << 20);
/// The most that a hydration holds in this process: frames that are kept, and those that the filler
/// is reading or has read.
pub const MEMORY: ByteLen = ByteLen(160 << 20);
/// The plugin answers at once.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A hydration under way, or done; it ends unfinished when the last of these is dropped.
#[derive(Clone)]
pub struct Hydration(Arc<Running>);

struct Running {
    inner: Arc<Inner>,
    tasks: Vec<AbortHandle>,
}

struct Inner {
    missing: MissingPages,
    space: SpaceName,
    runtime: RuntimeDir,
    state: State,
    /// Pages that exist; a page that is missing here may exist all the same.
    present: Mutex<PageSet>,
    /// Of a hydration that continues the filler opens it, when the store answers.
    reader: SetOnce<OnDemand>,
    /// Of a hydration that has just begun; one that continues has its first seconds behind it.
    first: Option<Arc<FirstPages>>,
    /// QEMU's monitor, once it is connected: it may answer only when a page has come.
    qmp: OnceLock<Qmp>,
}

/// Why memory cannot arrive while the guest of this VM runs; none if it can.
///
/// # Errors
/// If QEMU or the plugin does not answer.
pub(crate) async fn obstacle(vm: &Vm) -> Result<Option<String>> {
    if !vm.lock_tracker()?.handles().can_fill() {
        return Ok(Some(
            "QEMU may not wait for faults of the kernel; give its user access to /dev/userfaultfd, \
             or set the sysctl vm.unprivileged_userfaultfd to 1 ('stillpoint doctor' shows it)"
                .to_owned(),
        ));
    }
    let devices = devices::guest_devices(&vm.qmp).await.context("asking QEMU for its devices")?;
    Ok(devices.iter().any(GuestDevice::is_balloon).then(|| {
        "the VM has a balloon, which discards pages, and those would be waited for".to_owned()
    }))
}

impl Hydration {
    /// Begins to fill the main RAM block of a VM whose guest has not run, and whose state is not
    /// loaded yet. All its memory counts as not written from here on. If a thread of QEMU waits for
    /// a page as long as `deadline`, the guest is stopped.
    ///
    /// # Errors
    /// When QEMU's memory cannot be registered, or the runtime directory cannot be written.
    pub(crate) async fn begin(
        vm: &Vm,
        checkpoint_of: &VmName,
        source: &Source,
        deadline: Option<Duration>,
    ) -> Result<Self> {
        let block = &vm.file.ram_block;
        let space = SpaceName::ram(block)?;
        let map = source.map(&space).await?;
        let parts = parts_of(map.runs());
        let (record, missing) = {
            let mut tracker = vm.lock_tracker()?;
            let id = tracker.find(block).with_context(|| format!("no RAM block {block}"))?;
            let tracked = tracker.block(id)?.clone();
            let record = Record {
                instance: vm.file.instance.clone(),
                store: vm.file.store.clone(),
                vm: checkpoint_of.clone(),
                checkpoint: source.identity(),
                block: block.clone(),
                host_address: tracked.host_address,
                bytes: tracked.bytes,
                total_bytes: filler::data_bytes(map.runs()),
                deadline,
            };
            record.save(&vm.runtime)?;
            let missing = MissingPages::begin(tracker.handles(), tracked, &parts)?;
            tracker.protect_all()?;
            tracker.set_arriving(id, true)?;
            (record, missing)
        };
        let reader = OnDemand::new(source.clone(), CACHE);
        let reader = SetOnce::new_with(Some(reader));
        let mut inner = Inner::new(missing, space, vm.runtime.clone(), record, reader)?;
        inner.first = Some(Arc::default());
        let hydration = Self::start(inner, Some(map))?;
        hydration.set_monitor(&vm.qmp);
        Ok(hydration)
    }

    /// Continues what an earlier helper of this VM has begun and not ended; none if there is
    /// nothing. To be called before anything is asked of QEMU, which may be waiting for a page.
    ///
    /// # Errors
    /// When the record cannot be read, or QEMU's memory is not where it says.
    pub async fn resume(runtime: &RuntimeDir) -> Result<Option<Self>, EngineError> {
        Self::resumed(runtime).await.in_phase(Phase::Attach)
    }

    async fn resumed(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let instance = || Ok(runtime.vm()?.instance);
        let Some(record) = Record::load(runtime, instance)? else { return Ok(None) };
        let (socket, wanted) = (runtime.plugin(), record.clone());
        let connect = move || {
            let handles = PluginHandles::connect(&socket, PLUGIN_TIMEOUT)?;
            let memory = handles.ram(&wanted.block)?.with_context(|| {
                format!("QEMU has no memory file for RAM block {}", wanted.block)
            })?;
            let block = TrackedBlock {
                name: wanted.block,
                host_address: wanted.host_address,
                bytes: wanted.bytes,
                memory: BlockMemory::Shared(memory),
            };
            Ok::<_, anyhow::Error>(MissingPages::resume(&handles, block)?)
        };
        let missing = tokio::task::spawn_blocking(connect)
            .await
            .context("internal error: the task that connects to the plugin panicked")?
            .context("continuing to fill the guest's memory")?;
        let space = SpaceName::ram(&record.block)?;
        let inner = Inner::new(missing, space, runtime.clone(), record, SetOnce::new())?;
        inner.missing.wake_all()?;
        tracing::info!(
            checkpoint = %inner.state.record().checkpoint.id,
            "the guest's memory is still arriving; this helper continues to fill it"
        );
        Ok(Some(Self::start(inner, None)?))
    }

    /// `map`: where the pages are; none if that is still to be read.
    fn start(inner: Inner, map: Option<PageMap>) -> Result<Self> {
        let inner = Arc::new(inner);
        kill_point::point("restore.listening");
        let faults = faults::Faults::listen(&inner)?;
        let faults = tokio::spawn(faults.serve()).abort_handle();
        let filler = tokio::spawn(filler::fill(Arc::clone(&inner), map, faults.clone()));
        let mut tasks = vec![filler.abort_handle(), faults];
        if let Some(first) = &inner.first {
            let save = working_set::save_in_time(Arc::clone(&inner), Arc::clone(first));
            tasks.push(tokio::spawn(save).abort_handle());
        }
        Ok(Self(Arc::new(Running { inner, tasks })))
    }

    /// Of QEMU, to stop its guest if it needs what is damaged.
    pub fn set_monitor(&self, qmp: &Qmp) {
        // The first one stays.
        let _ = self.0.inner.qmp.set(qmp.clone());
    }

    /// Where it comes from.
    pub(super) fn origin(&self) -> Origin {
        self.0.inner.origin()
    }

    /// How far it is, and what is in its way.
    pub fn status(&self) -> HydrationStatus {
        self.0.inner.state.status()
    }
}

impl Arriving for Hydration {
    fn is_done(&self) -> bool {
        self.0.inner.state.is_done()
    }

    fn describe(&self) -> String {
        let status = self.status();
        let (done, total) = (status.done_bytes, status.total_bytes);
        let percent = (done * 100).checked_div(total).unwrap_or(0);
        let away = status.store_away.or(status.damaged).map_or_else(String::new, |trouble| {
            format!("; since {} it cannot be read: {}", trouble.since, trouble.message)
        });
        format!("{percent} % of its memory has arrived from {}{away}", status.store)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Inner {
    fn new(
        missing: MissingPages,
        space: SpaceName,
        runtime: RuntimeDir,
        record: Record,
        reader: SetOnce<OnDemand>,
    ) -> Result<Self> {
        let all = PageCount::covering(ByteLen(record.bytes));
        let mut present = PageSet::full(all);
        for hole in missing.missing_in(all.all())? {
            present.remove_range(hole);
        }
        Ok(Self {
            missing,
            space,
            runtime,
            state: State::new(record),
            present: Mutex::new(present),
            reader,
            first: None,
            qmp: OnceLock::new(),
        })
    }

    /// Of the whole space.
    fn size(&self) -> PageCount {
        PageCount::covering(ByteLen(self.state.record().bytes))
    }

    fn present(&self) -> MutexGuard<'_, PageSet> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The checkpoint's reader, as soon as the store answers.
    async fn reader(&self) -> &OnDemand {
        self.reader.wait().await
    }

    /// Where the pages are, as soon as the store answers: then there is a reader, too.
    async fn open_at_last(&self) -> PageMap {
        let mut backoff = Backoff::new();
        loop {
            match self.open().await {
                Ok(map) => return map,
                Err(error) => self.state.failed(&error),
            };
            backoff.wait().await;
        }
    }

    fn origin(&self) -> Origin {
        let Record { store, vm, checkpoint, .. } = self.state.record().clone();
        Origin { store, vm, checkpoint }
    }

    async fn open(&self) -> Result<PageMap> {
        let source = self.origin().open().await?;
        let map = source.map(&self.space).await?;
        let to_come: u64 = {
            let present = self.present();
            let data = map.runs().filter(filler::is_data);
            data.flat_map(|run| present.absent_in(run.pages)).map(|run| run.byte_len().0).sum()
        };
        self.state.add_done(filler::data_bytes(map.runs()) - to_come);
        self.state.succeeded();
        let reader = OnDemand::new(source, CACHE);
        self.reader.set(reader).ok().context("internal error: a reader was opened twice")?;
        Ok(map)
    }

    /// Makes those of these pages that do not exist. Returns how many bytes were made.
    fn install(&self, pages: PageRange, bytes: &[u8]) -> Result<u64, TrackerError> {
        let absent: Vec<PageRange> = self.present().absent_in(pages).collect();
        let mut made = 0;
        for part in absent {
            let start = PageRange::new(pages.start, part.start).byte_len().as_usize();
            let bytes = &bytes[start..start + part.byte_len().as_usize()];
            made += self.missing.install(part.start, bytes)?;
            self.present().insert_range(part);
        }
        Ok(made)
    }
}
