//! How a command ends: its exit code, which derives from the class of its error.

use std::process::ExitCode;
use vm::error::{Class, EngineError, Phase, class_of, explain, phase_of};
use vm::runtime_dir::Failure;

/// See `stillpoint --help`.
pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const REFUSED: u8 = 3;
pub const STORE: u8 = 4;
pub const DAMAGED: u8 = 5;

pub fn code_of(error: &anyhow::Error) -> u8 {
    match class_of(error) {
        Class::Failed => FAILED,
        Class::Usage => USAGE,
        Class::Refused => REFUSED,
        Class::Store => STORE,
        Class::Damaged => DAMAGED,
    }
}

pub fn class_of_code(code: u8) -> Class {
    match code {
        USAGE => Class::Usage,
        REFUSED => Class::Refused,
        STORE => Class::Store,
        DAMAGED => Class::Damaged,
        _ => Class::Failed,
    }
}

pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(code_of(error))
}

/// An error as it is sent to another process of ours.
pub fn failure_of(error: &anyhow::Error) -> Failure {
    Failure {
        message: explain(error),
        exit_code: code_of(error),
        class: Some(class_of(error)),
        phase: phase_of(error),
    }
}

/// The error that another process of ours reported.
pub fn error_of(failure: Failure) -> EngineError {
    let class = failure.class.unwrap_or_else(|| class_of_code(failure.exit_code));
    EngineError::of_other(class, failure.phase.unwrap_or(Phase::Unknown), failure.message)
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::Context;
    use vm::error::{classed, damaged, refused};

    #[test]
    fn exit_codes_derive_from_classes() {
        let below = |error: anyhow::Error| Err::<(), _>(error).context("restoring m").unwrap_err();
        assert_eq!(code_of(&below(refused("it runs elsewhere"))), REFUSED);
        assert_eq!(code_of(&below(damaged("a pack"))), DAMAGED);
        assert_eq!(code_of(&anyhow::anyhow!("x")), FAILED);
        for code in FAILED..=DAMAGED {
            assert_eq!(code_of(&classed(class_of_code(code), "x")), code);
        }
    }

    #[test]
    fn error_of_a_helper_keeps_class_and_phase() {
        let error = EngineError::new(Phase::Upload, refused("it runs elsewhere"));
        let failure = failure_of(&anyhow::Error::from(error).context("answering"));
        let sent = serde_json::to_value(&failure).unwrap();
        assert_eq!(
            sent,
            serde_json::json!({
                "message": "answering: it runs elsewhere",
                "exit_code": 3,
                "class": "refused",
                "phase": "upload"
            })
        );
        let received = error_of(serde_json::from_value(sent).unwrap());
        assert_eq!((received.class(), received.phase()), (Class::Refused, Phase::Upload));
        assert_eq!(received.explain(), "answering: it runs elsewhere");
        // An earlier version sends neither.
        let sent = serde_json::json!({ "message": "x", "exit_code": 4 });
        let received = error_of(serde_json::from_value(sent).unwrap());
        assert_eq!((received.class(), received.phase()), (Class::Store, Phase::Unknown));
    }
}
