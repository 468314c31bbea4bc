//! `make torture`: random command lines, each refused or brought back exactly. See
//! `stillpoint_tests::torture`.
//!
//!     torture [LINES [SEED [LINE]]]
//!
//! Prints every finding with its seed and command line; exits with 1 if there was one.

use std::process::ExitCode;
use stillpoint_tests::Random;
use stillpoint_tests::torture::{Settings, run};

fn main() -> ExitCode {
    let numbers: Vec<u64> =
        std::env::args().skip(1).filter(|word| !word.is_empty()).map(number).collect();
    let lines = numbers.first().copied().unwrap_or(100);
    let seed = numbers.get(1).copied().unwrap_or_else(|| Random::fresh_seed() % 1_000_000);
    println!("torture: {lines} lines, seed {seed}");
    let summary = run(&Settings { lines, seed, line: numbers.get(2).copied(), verbose: true });
    let (rejected, refused, proven) = (summary.rejected, summary.refused, summary.proven);
    println!(
        "torture: seed {seed}: {rejected} rejected by QEMU, {refused} refused, {proven} proven, {} findings",
        summary.findings.len()
    );
    if summary.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn number(word: String) -> u64 {
    word.parse()
        .unwrap_or_else(|_| panic!("'{word}' is no number; usage: torture [LINES [SEED [LINE]]]"))
}
