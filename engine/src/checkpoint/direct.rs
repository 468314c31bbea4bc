//! A guest that does not run, in a QEMU without our plugin: it is read as it stands, and nothing is
//! ordered of QEMU that would change its run state. What `pre-copy passes` and `pause` are for
//! others.
//!
//! No guest waits for it, so it may take its time. If its owner lets it run meanwhile, the
//! checkpoint fails.

use super::outcome::Phases;
use super::precopy::blocking;
use super::prepare::{Run, SavedState};
use super::{Checkpointer, Report};
use crate::pack::Entrance;
use anyhow::{Context, Result, bail, ensure};
use checkpoint_format::{FRAME_PAGES, PAGE_SIZE, PageCount, SpaceKind};
use qmp_bridge::Paused;
use qmp_bridge::device_state::DeviceStateFile;
use std::time::Instant;
use tracing::instrument;
use vm::process_memory::ProcessMemory;

use super::delta::Delta;

impl Checkpointer {
    #[instrument(name = "direct", level = "debug", skip_all)]
    pub(super) async fn read_process_memory(
        &mut self,
        run: &mut Run,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<()> {
        report.say("memory", 0, 0);
        let begun = Instant::now();
        let state_file = DeviceStateFile::prepare(&self.vm.qmp, self.vm.runtime.path()).await?;
        let memory = ProcessMemory::open(&self.vm.qmp, self.vm.pid).await?;
        let paused = Paused::stop(&self.vm.qmp).await.context("watching the guest")?;
        let taken = match paused.before().is_live() {
            true => Err(anyhow::anyhow!(
                "the guest was let run since this checkpoint began; take it again"
            )),
            false => self.take_directly(run, &paused, &state_file, memory).await,
        };
        run.run_state = paused.before();
        let ended =
            paused.resume().await.map(drop).context("looking whether the guest was left alone");
        phases.since("memory", begun);
        taken.and(ended)?;
        run.device_state = Some(SavedState::File(state_file));
        Ok(())
    }

    async fn take_directly(
        &mut self,
        run: &mut Run,
        paused: &Paused,
        file: &DeviceStateFile,
        memory: ProcessMemory,
    ) -> Result<()> {
        run.pause_disks(paused).await?;
        file.save(paused).await.context("saving the device state")?;
        let entrance = run.packer.as_ref().context("the packer is gone")?.entrance();
        let delta = run.delta.take().context("the tables are gone")?;
        let (delta, read) =
            blocking(delta, move |delta| read_all(&memory, delta, &entrance)).await?;
        run.delta = Some(delta);
        run.pages_dirty.0 += read?.0;
        Ok(())
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
    for (number, (name, pages)) in ram.iter().enumerate() {
        if memory.blocks()[number].name != name.local() {
            bail!("the VM's RAM blocks have changed; try again");
        }
        for piece in pages.all().chunks(PageCount(FRAME_PAGES as u64)) {
            let bytes = &mut buffer[..piece.byte_len().as_usize()];
            memory.read(number, piece, bytes)?;
            delta.offer(number as u16, piece.start, bytes, &mut jobs);
            entrance.send(&mut jobs)?;
            read.0 += piece.byte_len().0 / PAGE_SIZE as u64;
        }
        delta.flush(&mut jobs);
        entrance.send(&mut jobs)?;
    }
    Ok(read)
}
