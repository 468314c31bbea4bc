//! `stillpoint doctor`: prints what this host, or with `--qmp` one running VM, can do.

use crate::cli::DoctorArgs;
use crate::terminal::{out, print_json};
use anyhow::{Context, Result};
use engine::doctor::{self, Report, Row, State};
use std::process::ExitCode;
use vm::error::Class;

pub(crate) async fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let (report, json, place) = match &args.qmp {
        Some(monitor) => {
            let found = doctor::running::look(monitor).await;
            let json = serde_json::to_value(&found).context("encoding the result")?;
            (found.report, json, "of this VM")
        }
        None => {
            let report = doctor::host(&args.qemu);
            let json = serde_json::to_value(&report).context("encoding the result")?;
            (report, json, "on this host")
        }
    };
    if args.json {
        print_json(&json)?;
    } else {
        out!("{}", table(&report, place).trim_end());
    }
    let refused = ExitCode::from(Class::Refused.exit_code());
    Ok(if report.checkpoints_possible { ExitCode::SUCCESS } else { refused })
}

fn table(report: &Report, place: &str) -> String {
    let rows = &report.checks;
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

    fn row(check: &'static str, state: State, detail: &str, remedy: Option<&str>) -> Row {
        Row {
            check: check.into(),
            state,
            detail: detail.to_owned(),
            remedy: remedy.map(str::to_owned),
        }
    }

    #[test]
    fn the_table_lines_up_and_says_what_to_do() {
        let rows = vec![
            row("a", State::Ok, "fine", None),
            row("longer", State::No, "absent", Some("install it")),
        ];
        let text = table(&rows.into(), "on this host");
        assert_eq!(
            text,
            "ok    a       fine\n\
             no    longer  absent\n              to do: install it\n\
             No checkpoints can be taken on this host: 1 of 2 checks say 'no'.\n"
        );
        assert!(
            verdict(&[row("a", State::Warn, "b", Some("c"))], "here")
                .starts_with("Checkpoints can be taken")
        );
    }
}
