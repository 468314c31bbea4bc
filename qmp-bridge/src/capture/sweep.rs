//! Takes everything of a capture out of QEMU except bitmaps, whatever state it is in: exports, then
//! what stands above the disks, then jobs, then nodes.
//!
//! It goes by what QEMU lists under this instance's names, not by what we remember, so that it is
//! the same for a finished capture, an aborted one and one whose helper was killed in any phase;
//! and it can be run again. Nothing with another name is touched.

use serde_json::json;

use super::{CaptureError, filter};
use crate::fdset;
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
    let exports = remove_exports(qmp, |id| qmp.names().owns(id)).await?;
    delete_above(qmp).await?;
    filter::remove_all(qmp).await?;
    let swept = Swept { exports, jobs: end_jobs(qmp).await?, nodes: nodes(qmp).await? };
    fdset::remove_all(qmp).await?;
    Ok(swept)
}

/// Whether a capture of this instance is there, in whatever state.
pub(super) async fn has_nodes(qmp: &Qmp) -> Result<bool, QmpError> {
    Ok(!ours(qmp).await?.is_empty())
}

/// What reads through a filter keeps the filter where it is.
async fn delete_above(qmp: &Qmp) -> Result<(), CaptureError> {
    let mut looks = Looks::new();
    loop {
        let readers: Vec<String> = ours(qmp)
            .await?
            .into_iter()
            .filter(|(_, driver)| driver == "snapshot-access")
            .map(|(name, _)| name)
            .collect();
        if readers.is_empty() {
            return Ok(());
        }
        for name in &readers {
            delete(qmp, name).await?;
        }
        looks.again(|| format!("block nodes {readers:?}")).await?;
    }
}

/// Ends all jobs of ours; with the backup jobs, copying before write.
async fn end_jobs(qmp: &Qmp) -> Result<usize, CaptureError> {
    let mut looks = Looks::new();
    let mut found = 0;
    loop {
        let mut ours = qmp.query_jobs().await?;
        ours.retain(|job| qmp.names().owns(&job.id));
        found = found.max(ours.len());
        if ours.is_empty() {
            return Ok(found);
        }
        for job in &ours {
            jobs::ask_to_end(qmp, job).await?;
        }
        looks
            .again(|| format!("jobs {:?}", ours.iter().map(|job| &job.id).collect::<Vec<_>>()))
            .await?;
    }
}

/// A node that another stands on is refused and tried again when that one is gone.
async fn nodes(qmp: &Qmp) -> Result<usize, CaptureError> {
    let mut looks = Looks::new();
    let mut found = 0;
    loop {
        let mut ours = ours(qmp).await?;
        found = found.max(ours.len());
        if ours.is_empty() {
            return Ok(found);
        }
        // From the top down, so that one pass is enough.
        ours.sort_by_key(|(_, driver)| {
            ["copy-before-write", "qcow2", "file"].iter().position(|known| known == driver)
        });
        for (name, _) in &ours {
            delete(qmp, name).await?;
        }
        looks.again(|| format!("block nodes {ours:?}")).await?;
    }
}

/// Name and driver of each block node of ours.
async fn ours(qmp: &Qmp) -> Result<Vec<(String, String)>, QmpError> {
    let mut nodes = qmp.query_block_nodes().await?;
    nodes.retain(|node| qmp.names().owns(&node.node_name));
    Ok(nodes.into_iter().map(|node| (node.node_name, node.drv)).collect())
}

async fn delete(qmp: &Qmp, node: &str) -> Result<(), QmpError> {
    tolerate_refusal(qmp.execute_json("blockdev-del", json!({ "node-name": node })).await)
}
