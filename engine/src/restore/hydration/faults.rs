//! Threads of QEMU that wait for a page get it, before all others.

use super::Inner;
use crate::kill_point;
use crate::restore::backoff::Backoff;
use crate::restore::on_demand::Content;
use anyhow::{Context, Error, Result};
use checkpoint_format::{PAGE_SIZE, PageIndex};
use dirty_tracker::{MissingPages, TrackerError};
use serde_json::Value;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A read that takes longer is shown in the status, and continues.
const SLOW: Duration = Duration::from_secs(2);
/// QEMU stops when the vCPUs do, and one may wait for a page.
const STOP: Duration = Duration::from_secs(2);
/// Tries to read what is damaged before the guest is stopped: another replica may be whole.
const TRIES: u32 = 2;

/// Faults that were read and have no task yet; more wait in the kernel.
const QUEUE: usize = 256;
const LISTEN_AGAIN: Duration = Duration::from_millis(100);

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The faults of one VM, as the kernel reports them to a thread. It ends when this is dropped.
pub(super) struct Faults {
    inner: Arc<Inner>,
    pages: mpsc::Receiver<PageIndex>,
    _stop: PipeWriter,
}

impl Faults {
    pub(super) fn listen(inner: &Arc<Inner>) -> Result<Self> {
        let about = "listening for page faults";
        let (stopped, stop) = std::io::pipe().context(about)?;
        let (found, pages) = mpsc::channel(QUEUE);
        let of = Arc::clone(inner);
        let listen = move || listen(&of.missing, &stopped, &found);
        std::thread::Builder::new().name("faults".into()).spawn(listen).context(about)?;
        Ok(Self { inner: Arc::clone(inner), pages, _stop: stop })
    }

    /// Until QEMU ends. There is a task for each thread of QEMU that waits.
    pub(super) async fn serve(mut self) {
        let mut tasks = JoinSet::new();
        while let Some(page) = self.pages.recv().await {
            while tasks.try_join_next().is_some() {}
            tasks.spawn(answer(Arc::clone(&self.inner), page));
        }
    }
}

fn listen(missing: &MissingPages, stopped: &PipeReader, found: &mpsc::Sender<PageIndex>) {
    loop {
        match missing.wait_for_faults(stopped.as_fd()) {
            Ok(Some(pages)) => {
                if pages.into_iter().any(|page| found.blocking_send(page).is_err()) {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) if error.is_process_gone() => return,
            Err(error) => {
                tracing::error!(%error, "reading page faults");
                std::thread::sleep(LISTEN_AGAIN);
            }
        }
    }
}

/// However long it takes; from the deadline on the guest is stopped.
async fn answer(inner: Arc<Inner>, page: PageIndex) {
    let _waiting = inner.state.begin_waiting();
    if let Some(first) = &inner.first {
        first.note(page);
    }
    let mut bringing = std::pin::pin!(bring_at_last(&inner, page));
    if let Some(deadline) = inner.state.record().deadline {
        if tokio::time::timeout(deadline, &mut bringing).await.is_ok() {
            return;
        }
        stop(&inner, &inner.state.overdue(page, deadline)).await;
    }
    bringing.await;
}

async fn bring_at_last(inner: &Arc<Inner>, page: PageIndex) {
    let (mut backoff, mut damaged) = (Backoff::new(), 0);
    while let Err(error) = bring(inner, page).await {
        if is_process_gone(&error) {
            return;
        }
        if inner.state.failed(&error.context(format!("page {page} of {}", inner.space))) {
            damaged += 1;
            if damaged == TRIES {
                stop(inner, "it needs a page that is damaged in the store").await;
            }
        }
        backoff.wait().await;
    }
    inner.state.succeeded();
}

pub(super) fn is_process_gone(error: &Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<TrackerError>().is_some_and(TrackerError::is_process_gone)
    })
}

async fn bring(inner: &Arc<Inner>, page: PageIndex) -> Result<()> {
    let reader = slowly(inner, inner.reader()).await;
    let parts = slowly(inner, reader.read_around(&inner.space, page)).await?;
    kill_point::point("restore.fault");
    let mut parts = parts.into_iter();
    let own = parts.next().map(|(_, content)| content);
    let bytes = match &own {
        Some(Content::Data(bytes)) => &bytes[..],
        Some(Content::Zero | Content::Unknown) | None => &ZEROS[..],
    };
    // Also if it is known to exist: the thread may have begun to wait before.
    let made = inner.missing.install(page, bytes)?;
    inner.present().insert(page);
    if let Some(Content::Data(_)) = own {
        inner.state.add_done(made);
    }
    let inner = Arc::clone(inner);
    let rest = move || -> Result<()> {
        for (pages, content) in parts {
            if let Content::Data(bytes) = content {
                let made = inner.install(pages, &bytes)?;
                inner.state.add_done(made);
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(rest).await.context("internal error: installing pages panicked")?
}

/// Waits for `work`; if it takes long, the status says so.
async fn slowly<T>(inner: &Inner, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    match tokio::time::timeout(SLOW, &mut work).await {
        Ok(done) => done,
        Err(_) => {
            inner.state.slow();
            work.await
        }
    }
}

/// The guest goes no further; the vCPU that needs the page cannot anyway.
async fn stop(inner: &Inner, why: &str) {
    tracing::error!(why, "the guest is stopped");
    let Some(qmp) = inner.qmp.get() else { return };
    // If no answer comes: QEMU has asked all vCPUs to stop, and waits for the one that waits.
    let stop = qmp.execute_json("stop", Value::Null);
    if let Ok(Err(error)) = tokio::time::timeout(STOP, stop).await {
        tracing::error!(%error, "stopping the guest");
    }
}
