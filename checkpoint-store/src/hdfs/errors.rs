//! What the client's errors mean for a store.

use std::io::ErrorKind;

use hdfs_native::HdfsError;

use crate::error::{Op, StoreError};
use crate::path::StorePath;

/// What it means for a call when its answer is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// It changes nothing: it can be repeated.
    None,
    /// It changes something, and repeating it is fine.
    Idempotent,
    /// It changes something, and whether it did must be found out.
    Once,
}

pub(super) fn explain(op: Op, path: &StorePath, effect: Effect, error: HdfsError) -> StoreError {
    let shown = path.to_string();
    let reason = error.to_string();
    match &error {
        HdfsError::FileNotFound(_) => StoreError::NotFound { op, path: shown },
        HdfsError::AlreadyExists(_) => StoreError::AlreadyExists { op, path: shown },
        HdfsError::RPCError(class, message) | HdfsError::FatalRPCError(class, message) => {
            remote(op, path, class, message)
        }
        HdfsError::IOError(io) if never_sent(io.kind()) => unavailable(op, shown, reason),
        HdfsError::IOError(_) if effect == Effect::Once => {
            StoreError::Uncertain { op, path: shown, reason }
        }
        HdfsError::IOError(_)
        | HdfsError::DataTransferError(_)
        | HdfsError::ChecksumError
        | HdfsError::BlocksNotFound(_)
        | HdfsError::OperationFailed(_) => unavailable(op, shown, reason),
        HdfsError::SASLError(_) | HdfsError::GSSAPIError(..) | HdfsError::NoSASLMechanism => {
            StoreError::Denied { op, path: shown, reason }
        }
        _ => StoreError::Failed { op, path: shown, reason },
    }
}

fn unavailable(op: Op, path: String, reason: String) -> StoreError {
    StoreError::Unavailable { op, path, reason }
}

/// Connection errors that come before the request.
fn never_sent(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::AddrNotAvailable
            | ErrorKind::NotConnected
    )
}

/// An exception that the NameNode answered with: the call had no effect.
fn remote(op: Op, path: &StorePath, class: &str, message: &str) -> StoreError {
    let shown = path.to_string();
    let short = class.rsplit('.').next().unwrap_or(class);
    // The rest of the message is a stack trace.
    let first_line = message.lines().next().unwrap_or_default();
    let reason = format!("{short}: {first_line}");
    match short {
        // A claim is gone when its file is: the directory was removed under the writer.
        "FileNotFoundException" | "LeaseExpiredException" => {
            StoreError::NotFound { op, path: shown }
        }
        "FileAlreadyExistsException" | "AlreadyBeingCreatedException" => {
            StoreError::AlreadyExists { op, path: shown }
        }
        // What a rename onto a name of the other kind says.
        "IOException" if message.contains("must both be directories") => {
            StoreError::AlreadyExists { op, path: shown }
        }
        "AccessControlException" | "AuthorizationException" | "SaslException" | "InvalidToken" => {
            StoreError::Denied { op, path: shown, reason }
        }
        "DSQuotaExceededException"
        | "NSQuotaExceededException"
        | "QuotaExceededException"
        | "QuotaByStorageTypeExceededException" => StoreError::Full { op, path: shown, reason },
        "PathIsNotDirectoryException" | "ParentNotDirectoryException" | "InvalidPathException" => {
            StoreError::Failed { op, path: shown, reason }
        }
        // Safe mode, standby, too few DataNodes, and whatever else passes.
        _ => unavailable(op, shown, reason),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn explained(effect: Effect, error: HdfsError) -> StoreError {
        explain(Op::RenameDir, &StorePath::root(), effect, error)
    }

    #[test]
    fn a_lost_answer_is_uncertain_only_where_it_matters() {
        let lost = || HdfsError::IOError(io::Error::from(ErrorKind::ConnectionReset));
        assert!(matches!(explained(Effect::Once, lost()), StoreError::Uncertain { .. }));
        assert!(matches!(explained(Effect::Idempotent, lost()), StoreError::Unavailable { .. }));
        let refused = HdfsError::IOError(io::Error::from(ErrorKind::ConnectionRefused));
        assert!(matches!(explained(Effect::Once, refused), StoreError::Unavailable { .. }));
    }

    #[test]
    fn exceptions_by_class() {
        let remote = |class: &str| {
            explained(Effect::Once, HdfsError::RPCError(class.into(), "why\n\tat x".into()))
        };
        assert!(remote("java.io.FileNotFoundException").is_not_found());
        assert!(
            remote("org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException").is_not_found()
        );
        assert!(matches!(
            remote("org.apache.hadoop.security.AccessControlException"),
            StoreError::Denied { .. }
        ));
        let safe_mode = remote("org.apache.hadoop.hdfs.server.namenode.SafeModeException");
        assert!(safe_mode.is_retryable());
        assert!(!safe_mode.to_string().contains("\tat"), "{safe_mode}");
        assert!(matches!(
            remote("org.apache.hadoop.hdfs.protocol.DSQuotaExceededException"),
            StoreError::Full { .. }
        ));
    }
}
