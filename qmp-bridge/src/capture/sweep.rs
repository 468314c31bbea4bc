//! Takes everything of a capture out of QEMU except bitmaps, whatever state it is in: exports, then jobs, then nodes.
//!
//! It goes by what QEMU lists, not by what we remember, so that it is the same for a finished capture, an aborted
//! one and one whose helper was killed in any phase; and it can be run again.

use serde_json::{Value, json};

use super::{CaptureError, names};
use crate::jobs::{self, Looks, remove_exports, tolerate_refusal};
use crate::qmp::{Qmp, QmpError};

/// What was found and removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Swept {
    pub(super) exports: usize,
    pub(super) jobs: usize,
    pub(super) nodes: usize,
}

pub(super) async fn sweep(qmp: &Qmp) -> Result<Swept, CaptureError> {
    Ok(Swept { exports: remove_exports(qmp, names::is_ours).await?, jobs: end_jobs(qmp).await?, nodes: nodes(qmp).await? })
}

/// Stops QEMU's NBD server. It may not run.
pub(super) async fn stop_server(qmp: &Qmp) -> Result<(), QmpError> {
    tolerate_refusal(qmp.execute_json("nbd-server-stop", Value::Null).await)
}

/// Ends all jobs of ours; with the backup jobs, copying before write.
pub(super) async fn end_jobs(qmp: &Qmp) -> Result<usize, CaptureError> {
    let mut looks = Looks::new();
    let mut found = 0;
    loop {
        let mut ours = jobs::list(qmp).await?;
        ours.retain(|job| names::is_ours(&job.id));
        found = found.max(ours.len());
        if ours.is_empty() {
            return Ok(found);
        }
        for job in &ours {
            jobs::ask_to_end(qmp, job).await?;
        }
        looks.again(|| format!("jobs {:?}", ours.iter().map(|job| &job.id).collect::<Vec<_>>())).await?;
    }
}

/// Overlays go before the files under them; a node still in use is tried again until its user is gone.
async fn nodes(qmp: &Qmp) -> Result<usize, CaptureError> {
    let mut looks = Looks::new();
    let mut found = 0;
    loop {
        let reply = qmp.execute_json("query-named-block-nodes", json!({ "flat": true })).await?;
        let names = reply.as_array().into_iter().flatten().filter_map(|row| row["node-name"].as_str());
        let mut ours: Vec<&str> = names.filter(|name| names::is_ours(name)).collect();
        found = found.max(ours.len());
        if ours.is_empty() {
            return Ok(found);
        }
        // `…-o` sorts behind `…-f` of the same disk.
        ours.sort_unstable_by(|left, right| right.cmp(left));
        for name in &ours {
            tolerate_refusal(qmp.execute_json("blockdev-del", json!({ "node-name": name })).await)?;
        }
        looks.again(|| format!("block nodes {ours:?}")).await?;
    }
}
