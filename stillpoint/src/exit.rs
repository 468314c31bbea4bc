//! How a command ends: its exit code, which derives from the class of its error.

use std::process::ExitCode;
use vm::error::{Class, class_of_cause};

/// See `stillpoint --help`.
pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const REFUSED: u8 = 3;
pub const STORE: u8 = 4;
pub const DAMAGED: u8 = 5;

/// The end of another process of ours (a helper, a proof), which is this one's too.
#[derive(Debug)]
struct Passed {
    code: u8,
    message: String,
}

impl std::fmt::Display for Passed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Passed {}

pub fn coded(code: u8, message: impl Into<String>) -> anyhow::Error {
    Passed { code, message: message.into() }.into()
}

pub fn code_of(error: &anyhow::Error) -> u8 {
    let of = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<Passed>() {
        Some(passed) => Some(passed.code),
        None => class_of_cause(cause).map(code_of_class),
    };
    error.chain().find_map(of).unwrap_or(FAILED)
}

fn code_of_class(class: Class) -> u8 {
    match class {
        Class::Failed => FAILED,
        Class::Usage => USAGE,
        Class::Refused => REFUSED,
        Class::Store => STORE,
        Class::Damaged => DAMAGED,
    }
}

pub fn code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(code_of(error))
}

#[cfg(test)]
mod test {
    use super::*;
    use anyhow::Context;
    use vm::error::{damaged, refused};

    #[test]
    fn exit_codes_derive_from_classes_or_are_passed_on() {
        let below = |error: anyhow::Error| Err::<(), _>(error).context("restoring m").unwrap_err();
        assert_eq!(code_of(&below(refused("it runs elsewhere"))), REFUSED);
        assert_eq!(code_of(&below(damaged("a pack"))), DAMAGED);
        assert_eq!(code_of(&below(coded(2, "a proof's command line"))), 2);
        assert_eq!(code_of(&anyhow::anyhow!("x")), FAILED);
    }
}
