//! A rollback that an earlier helper of the VM did not complete.

use engine::checkpoint::Checkpointer;

/// The guest of such a VM stays stopped: its log says why.
pub(crate) fn warn_of_half(checkpointer: &Checkpointer) {
    match checkpointer.half_rolled_back() {
        Ok(None) => {}
        Ok(Some(record)) => tracing::warn!(
            to = %record.to, since = record.since,
            "a rollback is not complete; the guest stays stopped until it is repeated"
        ),
        Err(error) => tracing::warn!(error = error.explain(), "the record of a rollback"),
    }
}
