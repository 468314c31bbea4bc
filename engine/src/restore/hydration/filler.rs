//! All pages, in the order of the packs, while no thread waits for one.

use super::faults::is_process_gone;
use super::record::Record;
use super::working_set::{self, FirstPages};
use super::{Inner, parts_of};
use crate::kill_point::{self, Filling};
use crate::restore::backoff::Backoff;
use crate::restore::source::{Run, Source};
use anyhow::{Context, Result, bail, ensure};
use checkpoint_format::{
    FRAME_PAGES, FrameRead, LocatedRun, PAGE_SIZE, PageCount, PageLocation, PageMap, PageRange,
};
use futures::StreamExt;
use std::sync::Arc;
use tokio::task::AbortHandle;
use vm::error::{Class, class_of};

static ZEROS: [u8; FRAME_PAGES * PAGE_SIZE] = [0; FRAME_PAGES * PAGE_SIZE];

/// Whether these pages hold something else than zeros.
pub(super) fn is_data(run: &LocatedRun) -> bool {
    matches!(run.location, PageLocation::Data { .. })
}

/// Bytes of the pages in `runs` that are not zero.
pub(super) fn data_bytes(runs: impl Iterator<Item = LocatedRun>) -> u64 {
    runs.filter(is_data).map(|run| run.pages.byte_len().0).sum()
}

/// Until all pages are here, or QEMU has ended. Then no faults are read any more.
pub(super) async fn fill(inner: Arc<Inner>, map: Option<PageMap>, faults: AbortHandle) {
    let map = match map {
        Some(map) => map,
        None => inner.open_at_last().await,
    };
    let map = Arc::new(map);
    if let Some(first) = &inner.first
        && let Err(error) = fill_first(&inner, first).await
    {
        // It is tried again with all others.
        tracing::debug!(error = format!("{error:#}"), "reading what the guest needs first");
    }
    let mut backoff = Backoff::new();
    while let Err(error) = fill_all(&inner, &map).await {
        if is_process_gone(&error) {
            return;
        }
        inner.state.failed(&error);
        backoff.wait().await;
    }
    kill_point::point("restore.hydrated");
    if let Err(error) = Record::remove(&inner.runtime) {
        tracing::error!(
            error = format!("{error:#}"),
            "the record of the hydration is left; the next helper looks for missing pages again"
        );
    }
    kill_point::point("restore.recorded");
    faults.abort();
    inner.state.finish();
    if let Some(first) = &inner.first {
        first.save(&inner).await;
    }
}

/// The pages that the guest needed first the last time, and those that it wrote last, in the order
/// of the packs, in large reads.
async fn fill_first(inner: &Arc<Inner>, first: &FirstPages) -> Result<()> {
    let reader = inner.reader().await;
    let source = reader.source();
    let mut wanted = first.known(inner).await.clone();
    let changed = source.changed_last(&inner.space, working_set::MOST).await?;
    working_set::all(&changed).for_each(|pages| wanted.insert(pages));
    let mut map = PageMap::new(inner.space.clone(), inner.size());
    for pages in working_set::all(&wanted) {
        for run in reader.locate_frames(&inner.space, pages).await? {
            map.record(&run);
        }
    }
    fill_data(inner, source, &map, Filling::First).await
}

async fn fill_all(inner: &Arc<Inner>, map: &Arc<PageMap>) -> Result<()> {
    fill_data(inner, inner.reader().await.source(), map, Filling::Rest).await?;
    kill_point::point("restore.zeros");
    let (of, map) = (Arc::clone(inner), Arc::clone(map));
    let parts = parts_of(map.runs());
    tokio::task::spawn_blocking(move || fill_zeros(&of, &map, &parts))
        .await
        .context("internal error: installing pages panicked")?
}

/// All data of `map`, in the order of the packs.
async fn fill_data(
    inner: &Arc<Inner>,
    source: &Source,
    map: &PageMap,
    part: Filling,
) -> Result<()> {
    let of = Arc::clone(inner);
    let is_wanted = move |read: &FrameRead| {
        let present = of.present();
        read.parts.iter().any(|part| present.absent_in(part.pages).next().is_some())
    };
    let mut batches = std::pin::pin!(source.read_wanted(map, is_wanted));
    let mut damage = None;
    loop {
        kill_point::hold_filler(part).await;
        inner.state.no_thread_waits().await;
        let Some(batch) = batches.next().await else { break };
        let batch = match batch {
            Ok(batch) => batch,
            // All others first.
            Err(error) if class_of(&error) == Class::Damaged => {
                inner.state.failed(&error);
                damage = Some(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        inner.state.succeeded();
        inner.state.no_thread_waits().await;
        install(inner, batch).await?;
        kill_point::point("restore.filling");
    }
    damage.map_or(Ok(()), Err)
}

async fn install(inner: &Arc<Inner>, batch: Vec<Run>) -> Result<()> {
    let inner = Arc::clone(inner);
    let install = move || -> Result<()> {
        for (pages, bytes) in batch {
            let made = inner.install(pages, &bytes)?;
            inner.state.add_done(made);
        }
        Ok(())
    };
    tokio::task::spawn_blocking(install)
        .await
        .context("internal error: installing pages panicked")?
}

/// The short runs of zeros between the data. All data must be here: what is missing is zero then.
fn fill_zeros(inner: &Inner, map: &PageMap, parts: &[PageRange]) -> Result<()> {
    for part in parts {
        for hole in inner.missing.missing_in(*part)? {
            if let Some(run) = map.runs_in(hole).find(is_data) {
                bail!("internal error: pages {} have not arrived", run.pages);
            }
            for piece in hole.chunks(PageCount(FRAME_PAGES as u64)) {
                inner.missing.install(piece.start, &ZEROS[..piece.byte_len().as_usize()])?;
            }
        }
        let left = inner.missing.missing_in(*part)?;
        ensure!(left.is_empty(), "pages are missing again: {:?}", left[0]);
    }
    Ok(())
}
