//! The end of a stream that did not come to its own, also after a helper that was killed in the
//! middle of one.

use std::path::Path;

use super::activation;
use super::journal::Journal;
use crate::migration::status::check_idle;
use crate::migration::watch::cancel;
use crate::migration::{MigrationError, Progress, channel};
use crate::paused;
use crate::qmp::Qmp;

/// Kind of the object that says: this QEMU is the one that a journal tells of.
pub(super) const SESSION_MARKER: &str = "migration";

/// What [`recover`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// There was a journal.
    pub found: bool,
    /// A migration of the dead helper was still under way.
    pub cancelled: bool,
    /// The guest had been left stopped, and runs again.
    pub resumed: bool,
}

/// Brings QEMU back to the state before the session that `journal` tells of: cancels its migration,
/// lets the guest run if it was stopped by it, puts capabilities and parameters back, and removes
/// the journal. Does nothing without a journal, and may be called again. A migration of another
/// client is [`MigrationError::Busy`], and the journal stays.
///
/// A guest that is stopped after a migration is resumed only if the settings of the session are
/// still there: else its owner has migrated it since, perhaps to another host, where it runs.
///
/// # Errors
/// When another client migrates the VM, QEMU refuses to cancel the migration or to restore its
/// settings, or the journal cannot be read.
#[tracing::instrument(skip_all)]
pub async fn recover(qmp: &Qmp, journal: &Path) -> Result<Recovered, MigrationError> {
    let Some(journal) = Journal::read(journal)? else { return Ok(Recovered::default()) };
    let mut recovered = Recovered { found: true, ..Recovered::default() };
    // Without the marker this is another QEMU, or the helper died before it changed anything.
    if paused::marker_present(qmp, SESSION_MARKER).await? {
        recovered.cancelled = Progress::query(qmp).await?.status.is_running();
        if journal.entry.settings.is_ours(qmp).await? {
            recovered.resumed = paused::resume_switched_over(qmp).await?;
        } else {
            check_idle(qmp).await?;
        }
        recovered.resumed |= paused::resume_abandoned(qmp).await?;
        undo(qmp, &journal).await?;
    }
    journal.remove()?;
    tracing::warn!(
        ?recovered,
        "put QEMU back after a helper that ended in the middle of a migration stream"
    );
    Ok(recovered)
}

/// What an end and a recovery have in common. The journal goes after it has worked.
pub(super) async fn undo(qmp: &Qmp, journal: &Journal) -> Result<(), MigrationError> {
    cancel(qmp).await?;
    channel::close_unused(qmp).await?;
    paused::withdraw_switchover(qmp).await?;
    activation::remove(qmp, &journal.socket()).await?;
    journal.entry.settings.put_back(qmp).await?;
    paused::remove_marker(qmp, SESSION_MARKER).await?;
    Ok(())
}
