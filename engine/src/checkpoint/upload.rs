//! Phase `upload`: what the pause captured goes to the packer while the guest runs: disks first,
//! because QEMU must save each block that the guest overwrites meanwhile into the fleecing overlay;
//! then the device state; then the staged memory.

use super::Report;
use super::buffers::{Aborted, Buffers, OrKeep};
use super::carried::Resumed;
use super::delta::Delta;
use super::outcome::Phases;
use super::source::{SavedState, Taken};
use super::staging::{SpaceNumber, space_number};
use super::underway::{Captured, Failed, FailedStore, Site, Storing, Underway, Uploaded};
use super::window::Window;
use crate::kill_point;
use crate::pack::Packer;
use anyhow::{Context, Result, bail};
use checkpoint_format::{
    ByteLen, ByteOffset, FRAME_PAGES, PAGE_SIZE, PageCount, PageIndex, PageRange, SpaceKind,
    SpaceName,
};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use qmp_bridge::capture::{CapturedDisk, CapturedDisks};
use qmp_bridge::device_sections::repeated_section;
use qmp_bridge::nbd::{Content, ContentRange, ContextExtents, NbdClient, content_ranges, context};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::instrument;
use vm::error::{Phase, refused};
use vm::inventory::{Inventory, unchanged};

/// A disk's extents, and what earlier tries stored of it, are looked up for this much of it at a
/// time. The latter takes 2 MiB, and that of another part may wait in the queue.
const WINDOW: u64 = 512 << 20;
/// One NBD read: a frame.
const READ_BYTES: u64 = (FRAME_PAGES * PAGE_SIZE) as u64;
/// NBD reads of one disk under way: 2 MiB.
const READS: usize = 8;
/// Disks read at once, so that a VM with a hundred of them needs no more memory than one with four.
const DISKS: usize = 4;
/// Pieces of all disks waiting for the comparison: 4 MiB.
const QUEUE: usize = 16;

enum Piece {
    Data(SpaceNumber, u64, Vec<u8>),
    Zero(SpaceNumber, PageRange),
    /// What follows is of this part of the disk.
    Part(SpaceNumber, Option<Window>),
}

impl Captured {
    #[instrument(name = "upload", level = "debug", skip_all)]
    pub(super) async fn upload(
        self,
        site: &Site<'_>,
        phases: &mut Phases,
    ) -> Result<Uploaded, Failed> {
        let Self { underway, storing, taken } = self;
        let Taken { buffers, mut claimed, devices, moment } = taken;
        let upload = Upload { underway: &underway, storing: &storing, site };
        let sent = upload.send(buffers, &mut claimed.disks, devices, phases).await;
        let (buffers, state_bytes) = match sent {
            Ok(sent) => sent,
            Err(Aborted { error, left }) => {
                let store = FailedStore::Storing(storing);
                return Err(Failed::captured(error, underway, store, left, claimed));
            }
        };
        kill_point::point("upload");
        phases.enter(Phase::Commit);
        let begun = Instant::now();
        match storing.finish().await {
            Ok(stored) => {
                phases.since("upload", begun);
                kill_point::point("uploaded");
                Ok(Uploaded { underway, stored, buffers, claimed, moment, state_bytes })
            }
            Err(Aborted { error, left }) => {
                let store = FailedStore::Ended(left);
                Err(Failed::captured(error, underway, store, Some(buffers), claimed))
            }
        }
    }
}

struct Upload<'a> {
    underway: &'a Underway,
    storing: &'a Storing,
    site: &'a Site<'a>,
}

impl Upload<'_> {
    /// Returns the length of the device state.
    async fn send(
        &self,
        buffers: Buffers,
        disks: &mut CapturedDisks,
        devices: SavedState,
        phases: &mut Phases,
    ) -> Result<(Buffers, ByteLen), Aborted<Buffers>> {
        let checked = self.underway.inventory.check_vm(self.site.vm).await;
        let (mut buffers, ()) = checked.or_keep(buffers)?;
        phases.enter(Phase::Upload);
        let begun = Instant::now();
        let read = self.read_disks(disks, &mut buffers.delta).await;
        let (mut buffers, ()) = read.context("reading the disks' instant").or_keep(buffers)?;
        phases.since("upload.disks", begun);
        kill_point::point("upload.disks");
        let begun = Instant::now();
        let sent = self.send_state(devices, &mut buffers.delta).await;
        let (buffers, state_bytes) = sent.or_keep(buffers)?;
        let buffers = buffers.upload_staging(self.storing.packer.entrance()).await?;
        phases.since("upload.memory", begun);
        let (buffers, ()) = self.check_unchanged().await.or_keep(buffers)?;
        Ok((buffers, state_bytes))
    }

    /// To be called when no node of the capture is above the disks any more.
    async fn check_unchanged(&self) -> Result<()> {
        let Inventory { drives, .. } = &self.underway.inventory;
        self.underway.inventory.check_disks(self.site.vm).await?;
        let written = self.site.layers.changed(drives);
        let what = written.map(|path| format!("the layer {} was written to", path.display()));
        Ok(unchanged(what)?)
    }

    async fn read_disks(&self, captured: &mut CapturedDisks, delta: &mut Delta) -> Result<()> {
        if captured.disks().is_empty() {
            return Ok(());
        }
        captured.export().await?;
        let Storing { packer, resumed, .. } = self.storing;
        let (pieces, queue) = mpsc::channel(QUEUE);
        let mut readers: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        for disk in captured.disks() {
            let number = disk_number(delta, disk);
            let number = number.with_context(|| format!("disk {} has no space", disk.name))?;
            let space = &delta.spaces()[usize::from(number)];
            // What no earlier checkpoint says anything about is read by where it is allocated; else
            // every block counts.
            let is_fresh = self.underway.parent.is_none() || !space.in_lineage;
            let space = (number, space.name.clone());
            readers.push(Box::pin(read_disk(
                captured,
                disk,
                space,
                is_fresh,
                resumed,
                pieces.clone(),
                self.site.report,
            )));
        }
        drop(pieces);
        let readers =
            futures::stream::iter(readers).buffer_unordered(DISKS).try_collect::<Vec<()>>();
        let collector = collect(delta, packer, queue);
        let (read, collected) = tokio::join!(readers, collector);
        // A reader only reports that its queue was closed; the collector knows why.
        collected?;
        if read.is_err() {
            // A broken point-in-time copy fails each read; this returns the cause.
            captured.verify().await?;
        }
        read?;
        captured.verify().await?;
        captured.release().await?;
        Ok(())
    }

    async fn send_state(&self, devices: SavedState, delta: &mut Delta) -> Result<ByteLen> {
        let state = devices.read()?;
        if let Some(name) = repeated_section(&state) {
            return Err(refused(format!(
                "this QEMU saves two devices under one name, {name}, and would load the state of both into the first; \
                 start the VM with a newer QEMU, or without the second device"
            )));
        }
        let mut state = state.into_bytes();
        let len = ByteLen(state.len() as u64);
        state.resize(state.len().next_multiple_of(PAGE_SIZE), 0);
        let number = delta.spaces().iter().position(|space| space.name.kind() == SpaceKind::State);
        let number = space_number(number.context("the device state has no space")?)?;
        // A restore forgets the pages that a shrunken space lost, so the table must too.
        delta.truncate(number, PageCount::covering(len));
        let mut jobs = Vec::new();
        delta.offer(number, PageIndex(0), &state, &mut jobs);
        delta.flush(&mut jobs);
        self.storing.packer.send(&mut jobs).await?;
        Ok(len)
    }
}

fn is_disk(name: &SpaceName, disk: &CapturedDisk) -> bool {
    name.kind() == SpaceKind::Disk && name.local() == disk.name
}

fn disk_number(delta: &Delta, disk: &CapturedDisk) -> Option<SpaceNumber> {
    delta
        .spaces()
        .iter()
        .position(|space| is_disk(&space.name, disk))
        .and_then(|place| SpaceNumber::try_from(place).ok())
}

/// Owns the queue: when this ends, for any reason, the readers find it closed and end too.
async fn collect(
    delta: &mut Delta,
    packer: &Packer,
    mut queue: mpsc::Receiver<Piece>,
) -> Result<()> {
    let mut jobs = Vec::new();
    while let Some(piece) = queue.recv().await {
        match piece {
            Piece::Part(space, carried) => delta.enter(space, carried),
            Piece::Zero(space, pages) => delta.offer_zero(space, pages, &mut jobs),
            Piece::Data(space, offset, mut bytes) => {
                bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
                delta.offer(space, PageIndex::containing(ByteOffset(offset)), &bytes, &mut jobs);
            }
        }
        packer.send(&mut jobs).await?;
    }
    delta.flush(&mut jobs);
    packer.send(&mut jobs).await
}

async fn read_disk(
    captured: &CapturedDisks,
    disk: &CapturedDisk,
    (space, name): (SpaceNumber, SpaceName),
    is_fresh: bool,
    resumed: &Resumed,
    pieces: mpsc::Sender<Piece>,
    report: &Report,
) -> Result<()> {
    let client = captured.connect(disk).await?;
    let mut offset = 0;
    while offset < disk.bytes {
        let len = WINDOW.min(disk.bytes - offset);
        report.say(&format!("disk {}", disk.name), offset, disk.bytes);
        let mut ranges = ranges(&client, disk, offset, len, is_fresh).await?;
        let part = ContentRange { start: offset, end: offset + len, content: Content::Data };
        let carried = resumed.window(&name, pages(part)).await?;
        carried.iter().for_each(|carried| add_carried(&mut ranges, carried, disk.bytes));
        pieces.send(Piece::Part(space, carried)).await.context("the comparison has ended")?;
        read_window(&client, space, &ranges, &pieces).await?;
        offset += len;
    }
    client.close().await;
    Ok(())
}

async fn ranges(
    client: &NbdClient,
    disk: &CapturedDisk,
    offset: u64,
    len: u64,
    is_fresh: bool,
) -> Result<Vec<ContentRange>> {
    let contexts = client.block_status(offset, len).await?;
    let [allocation, changes] = contexts.as_slice() else {
        bail!(
            "QEMU answered {} meta contexts for disk {} where 2 were asked for",
            contexts.len(),
            disk.name
        );
    };
    let mut changes =
        if disk.changes.is_none() && !is_fresh { everything(changes) } else { changes.clone() };
    if disk.changes.is_some() {
        changes.set_from(disk.certain_until, context::STATE_DIRTY);
    }
    Ok(content_ranges(allocation, &changes, PAGE_SIZE as u64, disk.bytes))
}

/// A disk whose bitmap was lost while its lineage continues: whatever the layers or earlier
/// checkpoints hold, each block is looked at as it is now.
fn everything(changes: &ContextExtents) -> ContextExtents {
    let mut all = changes.clone();
    all.context = context::ALLOCATION_DEPTH.to_owned();
    all.extents.iter_mut().for_each(|extent| extent.flags = 1);
    all
}

async fn read_window(
    client: &NbdClient,
    space: SpaceNumber,
    ranges: &[ContentRange],
    pieces: &mpsc::Sender<Piece>,
) -> Result<()> {
    let cut = ranges.iter().copied().flat_map(cut);
    let reads = futures::stream::iter(cut).map(|range| async move {
        Ok::<_, anyhow::Error>(match range.content {
            Content::Zero => Piece::Zero(space, pages(range)),
            Content::Data => {
                let len = u32::try_from(range.end - range.start).context("a read of a frame")?;
                Piece::Data(space, range.start, client.read(range.start, len).await?)
            }
        })
    });
    let mut reads = reads.buffered(READS);
    while let Some(piece) = reads.try_next().await? {
        pieces.send(piece).await.context("the comparison has ended")?;
    }
    Ok(())
}

/// Adds to `ranges` all that an earlier try stored, also what they leave out: a block that the
/// guest has discarded since, say.
pub(super) fn add_carried(ranges: &mut Vec<ContentRange>, carried: &Window, disk_bytes: u64) {
    let asked: Vec<PageRange> = ranges.iter().copied().map(pages).collect();
    let mut asked = asked.into_iter().peekable();
    let mut missing = Vec::new();
    for mut held in carried.held() {
        while !held.is_empty() {
            while asked.next_if(|asked| asked.end <= held.start).is_some() {}
            let gap_end = asked.peek().map_or(held.end, |next| next.start.min(held.end));
            if held.start < gap_end {
                missing.push(PageRange::new(held.start, gap_end));
            }
            held.start = asked.peek().map_or(held.end, |next| next.end.min(held.end)).max(gap_end);
        }
    }
    let data = |pages: PageRange| {
        let bytes = pages.bytes();
        ContentRange { start: bytes.start, end: bytes.end.min(disk_bytes), content: Content::Data }
    };
    ranges.extend(missing.into_iter().map(data));
    ranges.sort_by_key(|range| range.start);
}

/// Data in pieces of a frame; zeros as they are.
fn cut(range: ContentRange) -> impl Iterator<Item = ContentRange> {
    let step = if range.content == Content::Data { READ_BYTES } else { u64::MAX };
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min(start.saturating_add(step));
        let piece =
            (start < range.end).then_some(ContentRange { start, end, content: range.content });
        start = end;
        piece
    })
}

fn pages(range: ContentRange) -> PageRange {
    let end = PageCount::covering(ByteLen(range.end));
    PageRange::new(PageIndex::containing(ByteOffset(range.start)), PageIndex(end.0))
}
