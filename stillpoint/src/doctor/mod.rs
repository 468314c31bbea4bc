//! `stillpoint doctor`: what this host can do, found out by trying each thing as `run` and the
//! helper would.
//!
//! `stillpoint doctor --qmp SOCKET` looks at one running VM instead: see [`running`].
//!
//! Nothing is left behind and no store is touched. A row that says `no` makes checkpoints
//! impossible; `warn` names something that works less well than it could.

mod host;
mod places;
mod qemu;
mod running;

use crate::cli::DoctorArgs;
use crate::exit::REFUSED;
use crate::terminal::{out, print_json};
use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use std::borrow::Cow;
use std::process::ExitCode;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Ok,
    Warn,
    No,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::No => "no",
        }
    }
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Row {
    check: Cow<'static, str>,
    state: State,
    /// What was found.
    detail: String,
    /// What to do about it, unless it is fine.
    remedy: Option<String>,
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

pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    if let Some(monitor) = &args.qmp {
        return running::run(monitor, args.json);
    }
    let mut rows = host::check();
    rows.extend(qemu::check(&args.qemu));
    rows.extend(places::check());
    let can = !rows.iter().any(|row| row.state == State::No);
    if args.json {
        print_json(&json!({ "checkpoints_possible": can, "checks": rows }))?;
    } else {
        out!("{}", table(&rows, "on this host").trim_end());
    }
    Ok(if can { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) })
}

fn table(rows: &[Row], place: &str) -> String {
    let width = rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Row { check, state, detail, remedy } in rows {
        text += &format!("{:4}  {check:width$}  {detail}\n", state.word());
        if let Some(remedy) = remedy {
            text += &format!("{:4}  {:width$}  to do: {remedy}\n", "", "");
        }
    }
    text + &verdict(rows, place) + "\n"
}

fn verdict(rows: &[Row], place: &str) -> String {
    let count = |state| rows.iter().filter(|row| row.state == state).count();
    match (count(State::No), count(State::Warn)) {
        (0, 0) => format!("Checkpoints can be taken {place}."),
        (0, warnings) => format!(
            "Checkpoints can be taken {place}; {warnings} of {} checks have warnings.",
            rows.len()
        ),
        (failures, _) => format!(
            "No checkpoints can be taken {place}: {failures} of {} checks say 'no'.",
            rows.len()
        ),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_table_lines_up_and_says_what_to_do() {
        let rows = [Row::ok("a", "fine"), Row::no("longer", "absent", "install it")];
        let text = table(&rows, "on this host");
        assert_eq!(
            text,
            "ok    a       fine\n\
             no    longer  absent\n              to do: install it\n\
             No checkpoints can be taken on this host: 1 of 2 checks say 'no'.\n"
        );
        assert!(
            verdict(&[Row::warn("a", "b", "c")], "here").starts_with("Checkpoints can be taken")
        );
    }
}
