//! Which pages may differ from the checkpoint that the VM is set back to.

use super::check::Plan;
use crate::checkpoint::Checkpointer;
use crate::restore::on_demand::OnDemand;
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteLen, FrameNo, LocatedRun, PAGE_SIZE, PackPlace, PageCount, PageIndex, PageLocation,
    PageRange, PageSet, Slot, SpaceName,
};
use qmp_bridge::capture::{CapturePlaces, changes_since};
use std::collections::BTreeMap;
use vm::running::lock;

/// Pages by space.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted(pub BTreeMap<SpaceName, PageSet>);

impl Wanted {
    pub(super) fn insert(&mut self, space: &SpaceName, pages: &PageSet) {
        let set = self.0.entry(space.clone()).or_insert_with(|| PageSet::new(pages.len()));
        set.union_with(pages);
    }

    pub(super) fn union_with(&mut self, other: &Self) {
        other.0.iter().for_each(|(space, pages)| self.insert(space, pages));
    }

    pub(super) fn subtract(&mut self, other: &Self) {
        for (space, pages) in &mut self.0 {
            if let Some(other) = other.0.get(space) {
                pages.subtract(other);
            }
        }
    }

    pub(super) fn count(&self) -> PageCount {
        PageCount(self.0.values().map(|pages| pages.count().0).sum())
    }
}

/// What the checkpoints after `plan.to` have stored.
pub(super) async fn between(plan: &Plan) -> Result<Wanted> {
    let mut wanted = Wanted::default();
    for (space, pages) in plan.spaces() {
        let (to, now) = (&plan.to, &plan.now);
        let there = to.locate(&space, pages.all()).await?;
        let here = now.locate(&space, pages.all()).await?;
        wanted.insert(&space, &differing((to, &there), (now, &here), pages));
    }
    Ok(wanted)
}

/// What was written since the VM's last checkpoint; the guest may run.
pub(super) async fn written(checkpointer: &Checkpointer, plan: &Plan) -> Result<Wanted> {
    let vm = &checkpointer.vm;
    let mut wanted = Wanted::default();
    wanted.insert(&plan.main_memory, &written_to_memory(checkpointer).await?);
    let places = CapturePlaces { fleecing_dir: &vm.file.fleecing, nbd_socket: &vm.runtime.nbd() };
    let (disks, parent) = (&plan.standing.drives.disks, plan.parent.0);
    let tag = checkpointer.tag()?;
    for changes in changes_since(&vm.qmp, &tag, parent, disks, places).await? {
        let disk = disks.iter().find(|disk| disk.node == changes.node);
        let disk = disk.context("internal error: changes of no disk")?;
        let mut pages = PageSet::new(PageCount::covering(ByteLen(disk.virtual_size)));
        for range in changes.ranges {
            let page = PAGE_SIZE as u64;
            let end = PageIndex(range.end.div_ceil(page));
            pages.insert_range(PageRange::new(PageIndex(range.start / page), end));
        }
        wanted.insert(&SpaceName::disk(&disk.name)?, &pages);
    }
    Ok(wanted)
}

/// The pages of main memory that the tracker knows as written.
pub(super) async fn written_to_memory(checkpointer: &Checkpointer) -> Result<PageSet> {
    let tracker = checkpointer.vm.tracker()?;
    let block = checkpointer.vm.file.ram_block.clone();
    let scan = move || {
        let mut tracker = lock(&tracker);
        let id = tracker.find(&block).context("the tracker has no main memory")?;
        Ok(tracker.scan(id)?)
    };
    tokio::task::spawn_blocking(scan).await.context("internal error: scanning panicked")?
}

/// Where a page is, whatever the numbers of the lineage that it was looked up in.
#[derive(PartialEq, Eq)]
enum Place {
    Unknown,
    Zero,
    Data(PackPlace, FrameNo, Slot),
}

fn place(source: &OnDemand, run: &LocatedRun, at: PageIndex) -> Option<Place> {
    let place = match run.location {
        PageLocation::Unknown => Place::Unknown,
        PageLocation::Zero => Place::Zero,
        PageLocation::Data { pack, frame, slot } => {
            let pack = source.source().pack(pack).ok()?;
            let skipped = u8::try_from(at.0 - run.pages.start.0).ok()?;
            Place::Data(pack, frame, Slot(slot.0.checked_add(skipped)?))
        }
    };
    Some(place)
}

/// Both lists cover all pages in order. Two runs that begin at the same place are the same to the
/// end of the shorter.
fn differing(
    (to, there): (&OnDemand, &[LocatedRun]),
    (now, here): (&OnDemand, &[LocatedRun]),
    size: PageCount,
) -> PageSet {
    let mut pages = PageSet::new(size);
    let (mut there, mut here) = (there.iter().peekable(), here.iter().peekable());
    while let (Some(one), Some(other)) = (there.peek(), here.peek()) {
        let start = one.pages.start.max(other.pages.start);
        let end = one.pages.end.min(other.pages.end);
        let places = (place(to, one, start), place(now, other, start));
        if !matches!(places, (Some(old), Some(new)) if old == new) {
            pages.insert_range(PageRange::new(start, end));
        }
        if one.pages.end == end {
            there.next();
        }
        if here.peek().is_some_and(|run| run.pages.end == end) {
            here.next();
        }
    }
    pages
}
