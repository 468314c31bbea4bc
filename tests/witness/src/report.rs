//! What the witness says, one line each, on standard output (the serial port of the guest).
//!
//! `WITNESS start …`, `WITNESS step=…` every `report_ms`, `WITNESS CONTRADICTION …`,
//! `WITNESS REFUSED …`. `table=`, `journal=` and `base=` turn from `ok` to `BAD` at the first
//! contradiction and never turn back, so that the last line alone tells whether all went well.

use std::fmt::Display;
use std::io::{self, Write};

/// A VM that is thoroughly wrong must not drown its serial port: after these, every thousandth is
/// printed.
const PRINTED_CONTRADICTIONS: u64 = 200;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Table,
    Journal,
    Base,
}

#[derive(Default)]
pub(crate) struct Report {
    table: u64,
    journal: u64,
    base: u64,
}

impl Report {
    pub(crate) fn contradictions(&self) -> u64 {
        self.table + self.journal + self.base
    }

    /// Counts a contradiction, and gives the line to print if it is one of the first.
    fn count(&mut self, part: Part, step: u64, what: &dyn Display) -> Option<String> {
        let (name, counter) = match part {
            Part::Table => ("table", &mut self.table),
            Part::Journal => ("journal", &mut self.journal),
            Part::Base => ("base", &mut self.base),
        };
        *counter += 1;
        let total = self.contradictions();
        let printed = total <= PRINTED_CONTRADICTIONS || total.is_multiple_of(1000);
        printed
            .then(|| format!("WITNESS CONTRADICTION {name} step={step} uptime={} {what}", uptime()))
    }

    pub(crate) fn contradiction(&mut self, part: Part, step: u64, what: &dyn Display) {
        if let Some(text) = self.count(part, step, what) {
            line(&text);
        }
    }

    pub(crate) fn progress(&self, step: u64, rest: &dyn Display) -> String {
        let [table, journal] = [self.table, self.journal].map(verdict);
        let (count, uptime, base) = (self.contradictions(), uptime(), verdict(self.base));
        format!(
            "WITNESS step={step} table={table} journal={journal} contradictions={count} uptime={uptime} base={base} {rest}"
        )
    }
}

fn verdict(contradictions: u64) -> &'static str {
    if contradictions == 0 { "ok" } else { "BAD" }
}

/// Prints one line with one write. A console that fails must not stop the checks, hence no error.
pub(crate) fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(format!("{text}\n").as_bytes());
    let _ = out.flush();
}

/// Seconds since the guest's boot, as the guest's kernel has them.
pub(crate) fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_verdict_never_turns_back() {
        let mut report = Report::default();
        assert!(
            report
                .progress(5, &"")
                .starts_with("WITNESS step=5 table=ok journal=ok contradictions=0 uptime=")
        );
        assert!(
            report
                .count(Part::Journal, 5, &"x")
                .is_some_and(|text| text.starts_with("WITNESS CONTRADICTION journal step=5 "))
        );
        assert!(
            report
                .progress(6, &"")
                .starts_with("WITNESS step=6 table=ok journal=BAD contradictions=1 uptime=")
        );
    }

    #[test]
    fn a_flood_is_counted_but_not_printed() {
        let mut report = Report::default();
        let printed = (0..5000).filter_map(|_| report.count(Part::Table, 1, &"x")).count();
        assert_eq!((report.contradictions(), printed), (5000, 205));
    }
}
