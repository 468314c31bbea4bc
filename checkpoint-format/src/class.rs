//! The class of each error of this crate: what cannot be parsed is damaged.

use error_class::classes;

use crate::{
    DigestParseError, EncodeError, EnvelopeError, IndexError, LayerError, LineageError,
    ManifestError, NameError, OtherCheckpoint, PackError, WorkingSetError,
};

classes! {
    EnvelopeError = Damaged;
    IndexError = Damaged;
    LayerError = Damaged;
    ManifestError = Damaged;
    PackError = Damaged;
    WorkingSetError = Damaged;

    DigestParseError = Failed;
    EncodeError = Failed;
    LineageError = Failed;
    NameError = Failed;
    OtherCheckpoint = Failed;
}
