//! What can be wrong with a stream, where in it, and what to do.

use thiserror::Error;

/// Every offset counts bytes from the beginning of the stream.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum StreamReadError {
    #[error("cannot read QEMU's migration stream after {at} bytes, inside {inside}: {source}")]
    Io { at: u64, inside: &'static str, source: std::io::Error },
    #[error(
        "the migration stream ended after {at} bytes inside {inside}; QEMU's migration failed or was cancelled: \
         `query-migrate` and QEMU's own output say why"
    )]
    CutOff { at: u64, inside: &'static str },
    #[error(
        "this is no migration stream that is understood: it begins with {found} where {expected} was expected; {advice}"
    )]
    NotUnderstood { found: String, expected: &'static str, advice: &'static str },
    #[error(
        "the migration stream has {found} at byte {at} where {expected} was expected; it is damaged, or this QEMU writes \
         a form that is not supported"
    )]
    Malformed { at: u64, found: String, expected: String },
    #[error("the migration stream has {what} at byte {at}, which is not supported; {advice}")]
    Unsupported { at: u64, what: String, advice: String },
    #[error("{what} at byte {at} of the migration stream takes {found}, over the limit of {limit}")]
    TooLarge { at: u64, what: &'static str, found: u64, limit: u64 },
    #[error(
        "the migration stream ends at byte {at} without a description of the device sections, and without one they cannot be \
         told apart; start the VM without `-machine suppress-vmdesc=on` (or the migration was cancelled just there: \
         `query-migrate` says so)"
    )]
    NoDescription { at: u64 },
    #[error(
        "the description of the device sections at byte {at} of the migration stream is not understood: {source}"
    )]
    Description { at: u64, source: serde_json::Error },
    #[error("this migration stream was given up after an earlier error")]
    GivenUp,
}

impl StreamReadError {
    /// The stream stopped short: what was read of it is sound, and QEMU knows why there is no more.
    pub fn is_cut_off(&self) -> bool {
        matches!(self, Self::CutOff { .. } | Self::Io { .. })
    }

    pub(crate) fn malformed(
        at: u64,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Malformed { at, found: found.into(), expected: expected.into() }
    }

    pub(super) fn unsupported(at: u64, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Unsupported { at, what: what.into(), advice: advice.into() }
    }
}
