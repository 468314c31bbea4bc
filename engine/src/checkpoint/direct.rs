//! The memory of a guest that does not run, in a QEMU without our plugin: read from QEMU's process,
//! without any command that would change the run state. Replaces `pre-copy` and `pause`.
//!
//! The guest does not wait for it, so there is no time limit. If the owner resumes the guest
//! meanwhile, the checkpoint fails.

use super::buffers::{Aborted, Buffers, blocking};
use super::delta::Delta;
use super::source::{
    CaptureContext, Claimed, MemorySource, Moment, NotTaken, SavedState, Taken, capture_disks,
};
use crate::pack::Entrance;
use anyhow::{Context, Result, anyhow, bail, ensure};
use checkpoint_format::{FRAME_PAGES, PAGE_SIZE, PageCount, SpaceKind};
use futures::future::BoxFuture;
use qmp_bridge::capture::{CapturedDisks, PreparedDisks};
use qmp_bridge::device_state::DeviceStateFile;
use qmp_bridge::{Paused, Qmp};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;
use tracing::instrument;
use vm::error::Phase;
use vm::process_memory::ProcessMemory;

/// QEMU's process, whose guest does not run.
pub(super) struct ProcessMemorySource {
    pub qmp: Qmp,
    pub pid: u32,
    /// For the file of the device state.
    pub directory: PathBuf,
}

impl MemorySource for ProcessMemorySource {
    fn capture<'a>(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        context: CaptureContext<'a>,
    ) -> BoxFuture<'a, Result<Taken, NotTaken>> {
        Box::pin(self.read(buffers, disks, context))
    }
}

impl ProcessMemorySource {
    #[instrument(name = "direct", level = "debug", skip_all)]
    async fn read(
        self: Box<Self>,
        buffers: Buffers,
        disks: PreparedDisks,
        context: CaptureContext<'_>,
    ) -> Result<Taken, NotTaken> {
        context.phases.enter(Phase::Memory);
        context.report.say("memory", 0, 0);
        let begun = Instant::now();
        let (paused, state_file, memory) = match self.stop().await {
            Ok(stopped) => stopped,
            Err(error) => return Err(NotTaken::before(Aborted::new(error, buffers), disks)),
        };
        let run_state = paused.before();
        let entrance = context.packer.entrance();
        let taken = take(buffers, disks, &paused, &state_file, memory, entrance).await;
        let ended =
            paused.resume().await.map(drop).context("checking that the guest was not resumed");
        context.phases.since("memory", begun);
        let (buffers, disks, pages_dirty) = taken?;
        if let Err(error) = ended {
            return Err(NotTaken::after(error, Some(buffers), disks));
        }
        Ok(Taken {
            buffers,
            claimed: Claimed { claim: None, disks },
            devices: SavedState::File(state_file),
            moment: Moment {
                run_state,
                pause: Duration::ZERO,
                brief_stops: Vec::new(),
                pages_dirty,
            },
        })
    }

    async fn stop(&self) -> Result<(Paused, DeviceStateFile, ProcessMemory)> {
        let state_file = DeviceStateFile::prepare(&self.qmp, &self.directory).await?;
        let memory = ProcessMemory::open(&self.qmp, self.pid).await?;
        let paused = Paused::stop(&self.qmp).await.context("watching the guest")?;
        Ok((paused, state_file, memory))
    }
}

async fn take(
    buffers: Buffers,
    disks: PreparedDisks,
    paused: &Paused,
    state_file: &DeviceStateFile,
    memory: ProcessMemory,
    entrance: Entrance,
) -> Result<(Buffers, CapturedDisks, PageCount), NotTaken> {
    if paused.before().is_live() {
        let error = anyhow!("the guest was resumed since this checkpoint began; take it again");
        return Err(NotTaken::before(Aborted::new(error, buffers), disks));
    }
    let disks = match capture_disks(disks, paused).await {
        Ok(disks) => disks,
        Err(error) => return Err(NotTaken { error, buffers: Some(buffers), disks: None }),
    };
    if let Err(error) = state_file.save(paused).await.context("saving the device state") {
        return Err(NotTaken::after(error, Some(buffers), disks));
    }
    let read = move |buffers: &mut Buffers| read_all(&memory, &mut buffers.delta, &entrance);
    match blocking(buffers, read).await {
        Ok((buffers, pages)) => Ok((buffers, disks, pages)),
        Err(Aborted { error, left }) => Err(NotTaken::after(error, left, disks)),
    }
}

/// Offers every page of the guest's memory. Returns how many were read.
fn read_all(memory: &ProcessMemory, delta: &mut Delta, entrance: &Entrance) -> Result<PageCount> {
    let ram: Vec<_> = delta
        .spaces()
        .iter()
        .filter(|space| space.name.kind() == SpaceKind::Ram)
        .map(|space| (space.name.clone(), space.pages))
        .collect();
    ensure!(ram.len() == memory.blocks().len(), "the VM's RAM blocks have changed; try again");
    let (mut buffer, mut jobs, mut read) =
        (vec![0; FRAME_PAGES * PAGE_SIZE], Vec::new(), PageCount(0));
    for (number, (name, pages)) in (0..).zip(&ram) {
        let block = usize::from(number);
        if memory.blocks()[block].name != name.local() {
            bail!("the VM's RAM blocks have changed; try again");
        }
        for piece in pages.all().chunks(PageCount(FRAME_PAGES as u64)) {
            let bytes = &mut buffer[..piece.byte_len().as_usize()];
            memory.read(block, piece, bytes)?;
            delta.offer(number, piece.start, bytes, &mut jobs);
            entrance.send(&mut jobs)?;
            read.0 += piece.byte_len().0 / PAGE_SIZE as u64;
        }
        delta.flush(&mut jobs);
        entrance.send(&mut jobs)?;
    }
    Ok(read)
}
