//! How a command ends: the message (printed once, each fact once) and the exit code.

use checkpoint_store::StoreError;
use qmp_bridge::migration::MigrationError;
use std::process::ExitCode;

/// See `stillpoint --help`.
pub const FAILED: u8 = 1;
pub const REFUSED: u8 = 3;
pub const STORE: u8 = 4;
pub const DAMAGED: u8 = 5;

/// An error whose exit code is known where it is made.
#[derive(Debug)]
pub struct Coded {
    code: u8,
    message: String,
}

impl std::fmt::Display for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Coded {}

pub fn coded(code: u8, message: impl Into<String>) -> anyhow::Error {
    Coded { code, message: message.into() }.into()
}

pub fn refused(message: impl Into<String>) -> anyhow::Error {
    coded(REFUSED, message)
}

pub fn damaged(message: impl Into<String>) -> anyhow::Error {
    coded(DAMAGED, message)
}

pub fn code_of(error: &anyhow::Error) -> u8 {
    error.chain().find_map(code_of_cause).unwrap_or(FAILED)
}

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(coded) = cause.downcast_ref::<Coded>() {
        return Some(coded.code);
    }
    if let Some(store) = cause.downcast_ref::<StoreError>() {
        return Some(store_code(store));
    }
    if let Some(migration) = cause.downcast_ref::<MigrationError>() {
        return migration_code(migration);
    }
    let damaged = cause.is::<checkpoint_format::PackError>() || cause.is::<checkpoint_format::ManifestError>();
    (damaged || cause.is::<checkpoint_format::LayerError>()).then_some(DAMAGED)
}

/// QEMU or its machine is not in a state in which it can be streamed.
fn migration_code(error: &MigrationError) -> Option<u8> {
    matches!(error, MigrationError::Busy { .. } | MigrationError::Unsupported { .. }).then_some(REFUSED)
}

fn store_code(error: &StoreError) -> u8 {
    match error {
        StoreError::Fenced { .. } | StoreError::WriterHeld { .. } => REFUSED,
        StoreError::Corrupt { .. } | StoreError::PastEnd { .. } => DAMAGED,
        _ => STORE,
    }
}

pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(code_of(error))
}

/// The chain on one line, without a cause that its context already quotes.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_code_is_found_below_its_context() {
        let error = Err::<(), _>(refused("it runs elsewhere")).context("restoring m").unwrap_err();
        assert_eq!(code_of(&error), REFUSED);
        assert_eq!(explain(&error), "restoring m: it runs elsewhere");
        assert_eq!(code_of(&anyhow::anyhow!("x")), FAILED);
        let busy = anyhow::Error::from(MigrationError::Busy { status: "active".to_owned() });
        assert_eq!(code_of(&busy.context("preparing")), REFUSED);
    }
}
