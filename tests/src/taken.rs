//! A checkpoint, and where the guest was when it was taken.

use engine::checkpoint::outcome::Outcome;

/// How much more than what changed is stored; compression apart.
pub fn stored_over_changed(outcome: &Outcome) -> f64 {
    outcome.bytes_stored_raw as f64 / outcome.bytes_changed as f64
}

/// A checkpoint, and the guest's last steps that were seen before and after it.
#[derive(Clone, Debug)]
pub struct Taken {
    /// NAME@ID.
    pub name: String,
    pub outcome: Outcome,
    pub before: u64,
    pub after: u64,
}
