//! What this host can do, found by trying each thing as `run` and the helper would ([`host`]), and
//! what can be done with one running VM ([`running::look`]).
//!
//! Nothing is left behind and no store is touched. A row that says `no` makes checkpoints
//! impossible; `warn` names something that works less well than it could.

mod host;
mod places;
mod qemu;
pub mod running;

use serde::Serialize;
use std::borrow::Cow;

/// The verdict of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Checkpoints are possible, and something works less well than it could.
    Warn,
    /// No checkpoint is possible.
    No,
}

impl State {
    /// As a table shows it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::No => "no",
        }
    }
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name, in a few words.
    pub check: Cow<'static, str>,
    /// The verdict.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it, unless it is fine.
    pub remedy: Option<String>,
}

impl Row {
    fn ok(check: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self { check: check.into(), state: State::Ok, detail: detail.into(), remedy: None }
    }

    fn warn(
        check: impl Into<Cow<'static, str>>,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { state: State::Warn, remedy, ..Self::ok(check, detail) }
    }

    fn no(
        check: impl Into<Cow<'static, str>>,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { state: State::No, remedy, ..Self::ok(check, detail) }
    }
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// No row says `no`.
    pub checkpoints_possible: bool,
    /// In the order in which they were made.
    pub checks: Vec<Row>,
}

impl From<Vec<Row>> for Report {
    fn from(checks: Vec<Row>) -> Self {
        Self { checkpoints_possible: !checks.iter().any(|row| row.state == State::No), checks }
    }
}

/// Of this host, with the QEMU program of that name.
pub fn host(qemu: &str) -> Report {
    let mut rows = host::check();
    rows.extend(qemu::check(qemu));
    rows.extend(places::check());
    rows.into()
}
