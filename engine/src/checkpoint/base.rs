//! What the next checkpoint builds on: the last durable one, and digests of all that it holds.

use super::delta::Space;
use super::held::{HeldLineage, Listing};
use super::parent::{Ancestry, Parent};
use crate::lineage::{NEW_LINEAGE_AFTER, is_lost};
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteLen, CheckpointId, ContentDigest, DigestTable, Manifest, PageCount, SpaceKind, SpaceName,
};
use checkpoint_store::Repository;
use std::collections::{BTreeSet, HashMap};
use vm::running::Vm;
use vm::runtime_dir::Marks;

/// Digests of disk pages in memory, over all disks: those of 4 GiB of content.
const DISK_TABLES: ByteLen = ByteLen(16 << 20);
/// Device state has a few hundred KiB; digests for 64 MiB of it.
const STATE_TABLE: ByteLen = ByteLen(256 << 10);

/// The layers below each writable disk, by node.
pub(super) type Chains = HashMap<String, Vec<ContentDigest>>;

/// What the next checkpoint builds on. A checkpoint takes it apart and puts it together again when
/// it ends.
pub(super) struct Base {
    pub history: History,
    /// What the parent holds, in the order of the spaces' numbers.
    pub spaces: Vec<Space>,
}

/// The parent, and how far the marks of written pages can be believed. They are looked up together
/// and hold together: marks count from one certain checkpoint, and a store may have lost that one.
pub(super) struct History {
    /// The parent and its ancestors. Empty: the next checkpoint is full.
    pub lineage: HeldLineage,
    /// The tracker knows every page written since the parent. Otherwise its first claim has all
    /// pages that exist, and those that do not exist must be compared as zeros.
    pub is_exact: bool,
    /// The disks' bitmaps record at least since the parent.
    are_bitmaps_of_lineage: bool,
    /// As the parent recorded them.
    pub chains: Chains,
}

impl Base {
    /// Looks up what this VM's last durable checkpoint is, if it is of this VM's lineage at all.
    pub(super) async fn find(
        vm: &Vm,
        repository: &Repository,
        disks: &[(SpaceName, PageCount)],
        marks: Option<Marks>,
    ) -> Result<Self> {
        let vm_name = &vm.file.name;
        let listing = Listing::read(repository, vm_name).await?;
        let names = names(vm, disks)?;
        let tables = empty_tables(names.clone(), disks.len());
        let Some((ancestry, tables)) = own_lineage(vm, repository, &listing, tables).await? else {
            tracing::info!(%vm_name, "the store has no checkpoint of this life of the VM; the next one is full");
            return Ok(Self::full(
                HeldLineage::new(vm_name, None, BTreeSet::new(), &listing),
                names,
                disks.len(),
            ));
        };
        let manifest = ancestry.manifest()?;
        let marks = match marks {
            Some(marks) => marks.of(&ancestry.identities(repository, marks.since.id).await),
            None => None,
        };
        let is_known = vm.has_tracker() && marks.is_some_and(|marks| marks.is_exact);
        let is_exact = is_known && vm.lock_tracker()?.resume_protection();
        tracing::info!(%vm_name, parent = %manifest.id, is_exact, has_bitmaps = marks.is_some(), "continuing a lineage");
        let mut spaces = spaces(vm, disks, tables);
        spaces
            .iter_mut()
            .for_each(|space| space.in_lineage = manifest.space(&space.name).is_some());
        let chains = chains(manifest);
        let parent = ancestry.parent()?;
        let lineage = HeldLineage::new(vm_name, Some(parent), ancestry.into_needed(), &listing);
        let are_bitmaps_of_lineage = marks.is_some();
        Ok(Self { history: History { lineage, is_exact, are_bitmaps_of_lineage, chains }, spaces })
    }

    fn full(lineage: HeldLineage, names: Vec<(SpaceName, PageCount)>, disks: usize) -> Self {
        let sizes: Vec<PageCount> = names.iter().map(|(_, pages)| *pages).collect();
        let tables = empty_tables(names, disks);
        let spaces = tables
            .into_iter()
            .zip(sizes)
            .map(|((name, table), pages)| Space::new(name, pages, table))
            .collect();
        let history = History {
            lineage,
            is_exact: false,
            are_bitmaps_of_lineage: false,
            chains: Chains::new(),
        };
        Self { history, spaces }
    }

    /// The next checkpoint is full: nothing is known of what any page holds.
    pub(super) fn begin_again(&mut self) {
        self.history.lineage.clear();
        self.history.is_exact = false;
        self.history.are_bitmaps_of_lineage = false;
        for space in &mut self.spaces {
            space.table.truncate(PageCount(0));
            space.in_lineage = false;
        }
    }

    /// A disk that stands on other layers than its parent did (a stream or commit at run time) may
    /// show other content where nothing was written: then all is stored again.
    pub(super) fn follow_chains(&mut self, chains: Chains) {
        let is_same = |(node, chain): (&String, &Vec<ContentDigest>)| {
            self.history.chains.get(node).is_none_or(|before| before == chain)
        };
        if self.history.parent().is_some() && !chains.iter().all(is_same) {
            tracing::info!(
                "a disk stands on other layers than before; the next checkpoint is full"
            );
            self.begin_again();
        }
        self.history.chains = chains;
    }

    /// A lineage begins because it `is_wanted`, or because the last one is long.
    pub(super) fn begin_lineage_if_due(&mut self, is_wanted: bool) {
        if is_wanted || self.history.is_long() {
            tracing::info!(is_wanted, "the next checkpoint is full and begins a lineage");
            self.begin_again();
        }
    }

    /// After a hot-plug: spaces of disks that came get an empty table, those of disks that went are
    /// dropped.
    pub(super) fn adapt(&mut self, vm: &Vm, disks: &[(SpaceName, PageCount)]) -> Result<()> {
        let names = names(vm, disks)?;
        let same = |(space, (name, pages)): (&Space, &(SpaceName, PageCount))| {
            space.name == *name && space.pages == *pages
        };
        if self.spaces.len() == names.len() && self.spaces.iter().zip(&names).all(same) {
            return Ok(());
        }
        let mut old = std::mem::take(&mut self.spaces);
        for ((name, table), (_, pages)) in
            empty_tables(names.clone(), disks.len()).into_iter().zip(names)
        {
            let found =
                old.iter().position(|space| space.name == name).map(|place| old.swap_remove(place));
            let in_lineage = found.as_ref().is_some_and(|space| space.in_lineage);
            let table = found.map_or(table, |space| resized(space, pages));
            let mut space = Space::new(name, pages, table);
            space.in_lineage = in_lineage;
            self.spaces.push(space);
        }
        Ok(())
    }
}

impl History {
    /// None: the next checkpoint is full.
    pub(super) fn parent(&self) -> Option<CheckpointId> {
        self.lineage.parent().map(|parent| parent.identity.id)
    }

    /// The checkpoint that the disks' bitmaps are to be believed from.
    pub(super) fn parent_of_bitmaps(&self) -> Option<CheckpointId> {
        self.parent().filter(|_| self.are_bitmaps_of_lineage)
    }

    pub(super) fn next(&self) -> CheckpointId {
        self.lineage.newest().map_or(CheckpointId::FIRST, |newest| newest.next())
    }

    /// Whether the lineage is so long that another has to begin.
    pub(super) fn is_long(&self) -> bool {
        self.lineage.parent().is_some_and(|parent| parent.checkpoints >= NEW_LINEAGE_AFTER)
    }

    /// A checkpoint is durable; what it was given of the marks counts from it. Returns the marks'
    /// new meaning.
    pub(super) fn advance(&mut self, checkpoint: Parent) -> Marks {
        let since = checkpoint.identity;
        self.lineage.add(checkpoint);
        // A bitmap was begun on every disk in its pause.
        self.are_bitmaps_of_lineage = true;
        Marks { since, is_exact: self.is_exact }
    }

    /// What the marks count from, if that is the parent.
    pub(super) fn marks(&self) -> Option<Marks> {
        let parent = self.lineage.parent().filter(|_| self.are_bitmaps_of_lineage);
        parent.map(|parent| Marks { since: parent.identity, is_exact: self.is_exact })
    }
}

/// What is known of a disk's pages stays true when it changes its size, but for those that it
/// loses. A RAM block's table is as long as the block.
fn resized(space: Space, pages: PageCount) -> DigestTable {
    let mut table = space.table;
    if space.pages != pages {
        match space.name.kind() {
            SpaceKind::Disk => table.truncate(pages),
            _ => return empty_tables(vec![(space.name, pages)], 1).remove(0).1,
        }
    }
    table
}

fn chains(manifest: &Manifest) -> Chains {
    let writable = manifest.disks.iter().filter(|disk| !disk.read_only);
    writable
        .map(|disk| (disk.node.clone(), disk.backing.iter().map(|layer| layer.digest).collect()))
        .collect()
}

/// The lineage that the next checkpoint continues with, and the digests of what it holds. One that
/// has lost an ancestor, or is damaged, is not built on: no restore could use what comes after.
async fn own_lineage(
    vm: &Vm,
    repository: &Repository,
    listing: &Listing,
    mut tables: Vec<(SpaceName, DigestTable)>,
) -> Result<Option<(Ancestry, Vec<(SpaceName, DigestTable)>)>> {
    let known = &listing.checkpoints;
    let read = async {
        let Some(parent) = parent(vm, repository, known).await? else { return Ok(None) };
        let ancestry = Ancestry::read(repository, &vm.file.name, parent, known).await?;
        let digests = ancestry.digests(repository, &mut tables).await;
        digests.context("reading what the last checkpoint holds")?;
        Ok(Some(ancestry))
    };
    match read.await {
        Ok(found) => Ok(found.map(|ancestry| (ancestry, tables))),
        Err(error) if is_lost(&error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "the last checkpoint cannot be built on; the next one is full"
            );
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The one that this instance was set back to, if it has taken none since; else the newest that it
/// took, else the one that it was restored from (which need not be the newest).
async fn parent(
    vm: &Vm,
    repository: &Repository,
    known: &[CheckpointId],
) -> Result<Option<CheckpointId>> {
    let Some(newest) = known.last() else { return Ok(None) };
    let manifest = crate::lineage::manifest(repository, &vm.file.name, *newest).await?;
    let is_own = manifest.instance == vm.file.instance;
    if let Some(back) = vm.runtime.rolled_back(&vm.file.instance) {
        // What this instance took before it was set back is another branch, also if the store has
        // lost the newest of it: the marks of what was written say nothing of that.
        let is_since = is_own && *newest > back.newest;
        return Ok(Some(if is_since { *newest } else { back.to }).filter(|id| known.contains(id)));
    }
    if is_own {
        return Ok(Some(*newest));
    }
    Ok(vm.file.restored_from.filter(|id| known.contains(id)))
}

/// RAM blocks in the tracker's order, then disks, then the device state: a space's place is its
/// number.
fn names(vm: &Vm, disks: &[(SpaceName, PageCount)]) -> Result<Vec<(SpaceName, PageCount)>> {
    let mut names = vm.ram_spaces()?;
    names.extend(disks.iter().cloned());
    names.push((SpaceName::device_state(), PageCount(0)));
    Ok(names)
}

fn empty_tables(names: Vec<(SpaceName, PageCount)>, disks: usize) -> Vec<(SpaceName, DigestTable)> {
    let share = ByteLen(DISK_TABLES.0 / disks.max(1) as u64);
    let table = |name: &SpaceName, pages| match name.kind() {
        SpaceKind::Ram => DigestTable::dense(pages),
        SpaceKind::Disk => DigestTable::sparse(share),
        SpaceKind::State | SpaceKind::Layer => DigestTable::sparse(STATE_TABLE),
    };
    names
        .into_iter()
        .map(|(name, pages)| {
            let table = table(&name, pages);
            (name, table)
        })
        .collect()
}

fn spaces(
    vm: &Vm,
    disks: &[(SpaceName, PageCount)],
    tables: Vec<(SpaceName, DigestTable)>,
) -> Vec<Space> {
    let sizes = vm.ram_spaces().into_iter().flatten().chain(disks.iter().cloned());
    let sizes: HashMap<SpaceName, PageCount> = sizes.collect();
    let pages = |name: &SpaceName| sizes.get(name).copied().unwrap_or(PageCount(0));
    tables
        .into_iter()
        .map(|(name, table)| {
            let pages = pages(&name);
            Space::new(name, pages, table)
        })
        .collect()
}
