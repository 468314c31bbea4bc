//! Page buffers, and the digest tables that the pages are compared with. They move as one value
//! from phase to phase, into a task that may block, and back.
//!
//! A task that panics loses them. A table that was partly changed could name a page that no
//! checkpoint holds, so it is not used again: the next checkpoint reads new ones from the store.

use super::delta::{Delta, Space};
use super::precopy;
use super::staging::Staging;
use crate::pack::Entrance;
use anyhow::{Context, Error, Result};

pub(super) struct Buffers {
    /// Copied pages.
    pub staging: Staging,
    /// The tables of digests, and the frames under way.
    pub delta: Delta,
}

impl Buffers {
    /// Sends the staged pages and empties the staging memory.
    pub(super) async fn upload_staging(self, entrance: Entrance) -> Result<Self, Aborted<Self>> {
        let upload = move |buffers: &mut Self| {
            let uploaded = precopy::upload(&buffers.staging, &mut buffers.delta, &entrance);
            buffers.staging.clear(buffers.staging.capacity());
            uploaded
        };
        Ok(blocking(self, upload).await?.0)
    }

    /// The checkpoint is durable, or nothing differs from its parent.
    pub(super) fn acknowledge(self) -> (Staging, Vec<Space>) {
        (self.staging, self.delta.acknowledge())
    }

    /// The checkpoint failed.
    pub(super) fn fail(self) -> (Staging, Vec<Space>) {
        (self.staging, self.delta.fail())
    }
}

/// Work that failed, and what it was done on.
#[derive(Debug)]
pub(super) struct Aborted<T> {
    pub error: Error,
    /// `None`: a task that panicked had it, or it was dropped, which restores it.
    pub left: Option<T>,
}

impl<T> Aborted<T> {
    pub(super) fn new(error: impl Into<Error>, left: T) -> Self {
        Self { error: error.into(), left: Some(left) }
    }

    pub(super) fn lost(error: impl Into<Error>) -> Self {
        Self { error: error.into(), left: None }
    }

    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Aborted<U> {
        Aborted { error: self.error, left: self.left.map(change) }
    }
}

/// For steps that own what they work on.
pub(super) trait OrKeep<T> {
    /// The result of a step beside `state`, which is kept if the step failed.
    fn or_keep<S>(self, state: S) -> Result<(S, T), Aborted<S>>;
}

impl<T, E: Into<Error>> OrKeep<T> for Result<T, E> {
    fn or_keep<S>(self, state: S) -> Result<(S, T), Aborted<S>> {
        match self {
            Ok(value) => Ok((state, value)),
            Err(error) => Err(Aborted::new(error, state)),
        }
    }
}

/// Runs a job on a thread that may block, from this call on, whether the result is waited for or
/// not. The state goes there as one value and comes back, whatever the job's result.
pub(super) fn blocking<S, R>(
    mut state: S,
    job: impl FnOnce(&mut S) -> Result<R> + Send + 'static,
) -> impl Future<Output = Result<(S, R), Aborted<S>>> + Send
where
    S: Send + 'static,
    R: Send + 'static,
{
    let task = tokio::task::spawn_blocking(move || {
        let result = job(&mut state);
        (state, result)
    });
    async move {
        let (state, result) = task
            .await
            .context("internal error: a copy task panicked")
            .map_err(Aborted::<S>::lost)?;
        result.or_keep(state)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::bail;
    use checkpoint_format::{DigestTable, PageCount, PageIndex, PageRange, SpaceName, SpaceTable};

    fn buffers(staging: Staging) -> Buffers {
        let name = SpaceName::ram("pc.ram").unwrap();
        let table = SpaceTable::new([name.clone()]).unwrap();
        let pages = PageCount(8);
        let spaces = vec![Space::new(name, pages, DigestTable::dense(pages))];
        Buffers { staging, delta: Delta::new(spaces, &table).unwrap() }
    }

    fn fill(buffers: &mut Buffers) {
        let one = PageRange::single(PageIndex(1));
        buffers.staging.push(0, one).unwrap().fill(1);
    }

    #[tokio::test]
    async fn buffers_come_back_from_a_job_that_fails() {
        let fails = |buffers: &mut Buffers| -> Result<()> {
            fill(buffers);
            bail!("no")
        };
        let Aborted { error, left } =
            blocking(buffers(Staging::default()), fails).await.err().unwrap();
        assert_eq!(error.to_string(), "no");
        let (mut staging, spaces) = left.unwrap().fail();
        assert_eq!(spaces.len(), 1);
        staging.clear(PageCount(0));
        assert_eq!(staging.free(), Staging::default().capacity());
    }

    /// The helper's staging memory is whole, whatever becomes of that which a checkpoint took.
    #[tokio::test]
    async fn buffers_that_a_task_panicked_with_leave_a_whole_staging_behind() {
        let mut helper = Staging::default();
        let taken = buffers(std::mem::take(&mut helper));
        let panics = |buffers: &mut Buffers| -> Result<()> {
            fill(buffers);
            panic!("as a copy task might")
        };
        let Aborted { error, left } = blocking(taken, panics).await.err().unwrap();
        assert!(left.is_none());
        assert!(format!("{error:#}").contains("a copy task panicked"), "{error:#}");
        assert!(helper.capacity() > PageCount(0) && helper.free() == helper.capacity());
        assert_eq!(helper.capacity(), Staging::default().capacity());
    }

    #[tokio::test]
    async fn job_begins_before_it_is_waited_for() {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let begun = move |(): &mut ()| Ok(sender.send(())?);
        let job = blocking((), begun);
        tokio::task::spawn_blocking(move || receiver.recv()).await.unwrap().unwrap();
        job.await.unwrap();
    }
}
