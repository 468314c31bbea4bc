//! After a helper that was killed in the middle of a stream.

use std::path::Path;

use super::MigrationError;
use super::journal::Journal;
use super::session::undo;
use super::status::Progress;
use crate::paused;
use crate::qmp::Qmp;

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

/// Brings QEMU back to the state before the session that `journal` tells of: cancels its migration, lets the guest run if
/// it was stopped by it, puts capabilities and parameters back, and removes the journal. Does nothing without a journal,
/// and may be called again. A migration of somebody else is [`MigrationError::Busy`], and the journal stays.
#[tracing::instrument(skip_all)]
pub async fn recover(qmp: &Qmp, journal: &Path) -> Result<Recovered, MigrationError> {
    let Some(journal) = Journal::read(journal)? else { return Ok(Recovered::default()) };
    let progress = Progress::query(qmp).await?;
    let cancelled = progress.is_running();
    if cancelled && !journal.entry.settings.is_ours(qmp).await? {
        return Err(MigrationError::Busy { status: progress.status });
    }
    let resumed = paused::resume_abandoned(qmp).await?;
    undo(qmp, &journal, cancelled).await?;
    journal.remove()?;
    let recovered = Recovered { found: true, cancelled, resumed };
    tracing::warn!(?recovered, "put QEMU back after a helper that ended in the middle of a migration stream");
    Ok(recovered)
}
