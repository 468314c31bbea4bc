//! What QEMU does in the background, jobs and exports: waiting for it, ending it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use thiserror::Error;

use crate::qmp::replies::{BlockExportInfo, JobInfo, JobStatus};
use crate::qmp::{Qmp, QmpError};

/// How long ending a job may take.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// First and longest pause between two looks.
const FIRST_POLL: Duration = Duration::from_micros(500);
const LONGEST_POLL: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum JobError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("QEMU's job {job} failed: {why}")]
    Failed { job: String, why: String },
    #[error("QEMU still has {what} after {after:?}; it may be hung on slow storage")]
    Stuck { what: String, after: Duration },
}

impl JobError {
    /// Whether the same command may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Failed { .. } | Self::Stuck { .. } => true,
        }
    }
}

/// Sleeps a little longer each time, up to a limit and until a deadline.
pub(crate) struct Looks {
    begun: Instant,
    timeout: Duration,
    pause: Duration,
}

impl Looks {
    pub(crate) fn new() -> Self {
        Self::within(TIMEOUT)
    }

    /// With the connection's timeout of one command: a caller with slow storage sets it there,
    /// once.
    fn on(qmp: &Qmp) -> Self {
        Self::within(qmp.timeout())
    }

    pub(crate) fn within(timeout: Duration) -> Self {
        Self { begun: Instant::now(), timeout, pause: FIRST_POLL }
    }

    pub(crate) async fn again(&mut self, what: impl Fn() -> String) -> Result<(), JobError> {
        if self.begun.elapsed() >= self.timeout {
            return Err(JobError::Stuck { what: what(), after: self.timeout });
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_POLL);
        Ok(())
    }
}

/// Runs a `blockdev-create` job to its end.
pub(crate) async fn create_image(qmp: &Qmp, job: &str, options: Value) -> Result<(), JobError> {
    qmp.execute_json("blockdev-create", json!({ "job-id": job, "options": options })).await?;
    conclude(qmp, job).await
}

/// Waits until a job that was started has ended, and takes it off QEMU's list.
pub(crate) async fn conclude(qmp: &Qmp, job: &str) -> Result<(), JobError> {
    let mut looks = Looks::on(qmp);
    loop {
        let found = qmp.query_jobs().await?.into_iter().find(|row| row.id == job);
        let Some(row) = found else {
            return Err(JobError::Failed { job: job.into(), why: "it vanished".into() });
        };
        if row.status == JobStatus::Concluded {
            qmp.execute_json("job-dismiss", json!({ "id": job })).await?;
            return row.error.map_or(Ok(()), |why| Err(JobError::Failed { job: job.into(), why }));
        }
        looks.again(|| format!("the unfinished job {job}")).await?;
    }
}

/// Asks a job to go. It may take a while, and it may be gone already: refusals are for the next
/// look to judge.
pub(crate) async fn ask_to_end(qmp: &Qmp, job: &JobInfo) -> Result<(), QmpError> {
    let (command, arguments) = match (&job.status, job.r#type.as_str()) {
        (JobStatus::Concluded, _) => ("job-dismiss", json!({ "id": job.id })),
        (JobStatus::Aborting | JobStatus::Null, _) => return Ok(()),
        (_, "create") => ("job-cancel", json!({ "id": job.id })),
        _ => ("block-job-cancel", json!({ "device": job.id, "force": true })),
    };
    tolerate_refusal(qmp.execute_json(command, arguments).await)
}

/// Removes the exports that `ours` picks and waits until their clients are gone. Returns how many
/// there were.
pub(crate) async fn remove_exports(
    qmp: &Qmp,
    ours: impl Fn(&str) -> bool,
) -> Result<usize, JobError> {
    let mut looks = Looks::on(qmp);
    let mut found = 0;
    loop {
        let mut left = qmp.query_block_exports().await?;
        left.retain(|export| ours(&export.id));
        found = found.max(left.len());
        if left.is_empty() {
            return Ok(found);
        }
        for BlockExportInfo { id, .. } in &left {
            tolerate_refusal(
                qmp.execute_json("block-export-del", json!({ "id": id, "mode": "hard" })).await,
            )?;
        }
        looks.again(|| format!("the exports {:?}", ids(&left))).await?;
    }
}

fn ids(exports: &[BlockExportInfo]) -> Vec<&str> {
    exports.iter().map(|export| export.id.as_str()).collect()
}

/// For clean-up, where a refusal usually means that the thing is gone or going; the next look
/// tells.
pub(crate) fn tolerate_refusal(result: Result<Value, QmpError>) -> Result<(), QmpError> {
    match result {
        Err(error) if error.is_refusal() => {
            tracing::debug!(%error, "tolerated while cleaning up");
            Ok(())
        }
        other => other.map(drop),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::qmp::test::pair;

    /// A job gets as long as the connection gives a command: who knows of slow storage says so
    /// there.
    #[tokio::test]
    async fn a_job_is_waited_for_as_long_as_a_command() {
        let (qmp, mut peer, _directory) = pair().await;
        let patient = qmp.with_timeout(Duration::from_millis(300));
        let script = async {
            while let Some((command, id)) = peer.command().await {
                let busy = json!([{ "id": "j", "type": "create", "status": "running" }]);
                peer.answer(id, if command["execute"] == "query-jobs" { busy } else { json!({}) })
                    .await;
            }
        };
        let begun = Instant::now();
        let made = tokio::select! {
            made = create_image(&patient, "j", json!({})) => made,
            () = script => unreachable!("the client goes first"),
        };
        assert!(
            matches!(made, Err(JobError::Stuck { after, .. }) if after == Duration::from_millis(300)),
            "{made:?}"
        );
        assert!(begun.elapsed() < TIMEOUT / 2, "{:?}", begun.elapsed());
    }
}
