//! A few random command lines; `make torture N=300` tries more.

use stillpoint_tests::torture::{Settings, run};

/// A line takes about a second and a half.
const LINES: u64 = 14;
const SEED: u64 = 1;

#[test]
fn torture_random_command_lines_are_refused_or_proven() {
    let summary = run(&Settings { lines: LINES, seed: SEED, line: None, verbose: false });
    assert!(summary.findings.is_empty(), "{}", summary.findings.join("\n"));
    assert!(summary.proven > 0 && summary.proven + summary.refused == LINES, "{summary:?}");
}
