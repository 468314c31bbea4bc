//! QEMU's jobs: waiting for one, ending them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::CaptureError;
use crate::qmp::{Qmp, QmpError};

/// How long creating an empty overlay or ending a job may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest pause between two looks.
const FIRST_LOOK: Duration = Duration::from_micros(500);
const LONGEST_LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) kind: String,
    pub(crate) status: String,
    pub(crate) error: Option<String>,
}

pub(crate) async fn list(qmp: &Qmp) -> Result<Vec<Job>, QmpError> {
    let reply = qmp.execute_json("query-jobs", Value::Null).await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let job = |row: &Value| Job {
        id: text(&row["id"]),
        kind: text(&row["type"]),
        status: text(&row["status"]),
        error: row["error"].as_str().map(Into::into),
    };
    Ok(reply.as_array().into_iter().flatten().map(job).collect())
}

/// Sleeps a little longer each time, up to a limit and until a deadline.
pub(crate) struct Looks {
    deadline: Instant,
    pause: Duration,
}

impl Looks {
    pub(crate) fn new() -> Self {
        Self { deadline: Instant::now() + PATIENCE, pause: FIRST_LOOK }
    }

    pub(crate) async fn again(&mut self, what: impl Fn() -> String) -> Result<(), CaptureError> {
        if Instant::now() >= self.deadline {
            return Err(CaptureError::Stuck { what: what(), after: PATIENCE });
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_LOOK);
        Ok(())
    }
}

/// Runs a `blockdev-create` job to its end.
pub(crate) async fn create_image(qmp: &Qmp, job: &str, options: Value) -> Result<(), CaptureError> {
    qmp.execute_json("blockdev-create", json!({ "job-id": job, "options": options })).await?;
    let mut looks = Looks::new();
    loop {
        let found = list(qmp).await?.into_iter().find(|row| row.id == job);
        let Some(row) = found else {
            return Err(CaptureError::Job { job: job.into(), why: "it vanished".into() });
        };
        if row.status == "concluded" {
            qmp.execute_json("job-dismiss", json!({ "id": job })).await?;
            return row.error.map_or(Ok(()), |why| Err(CaptureError::Job { job: job.into(), why }));
        }
        looks.again(|| format!("the unfinished job {job}")).await?;
    }
}

/// Asks a job to go. It may take a while, and it may be gone already: refusals are for the next look to judge.
pub(crate) async fn ask_to_end(qmp: &Qmp, job: &Job) -> Result<(), QmpError> {
    let (command, arguments) = match (job.status.as_str(), job.kind.as_str()) {
        ("concluded", _) => ("job-dismiss", json!({ "id": job.id })),
        ("aborting" | "null", _) => return Ok(()),
        (_, "create") => ("job-cancel", json!({ "id": job.id })),
        _ => ("block-job-cancel", json!({ "device": job.id, "force": true })),
    };
    match qmp.execute_json(command, arguments).await {
        Err(error) if error.is_refusal() => {
            tracing::debug!(%error, job = job.id, "a job did not take its end yet");
            Ok(())
        }
        other => other.map(drop),
    }
}
