//! Random command lines, each of which must be refused or restored exactly.
//!
//! A line is one that plain QEMU itself rejects; or Stillpoint refuses it, with a reason, before
//! its first checkpoint is durable; or its checkpoint is proven by `verify --restore` after the VM
//! was killed and its files were moved away. Anything else is a finding.

mod grammar;
mod tables;
mod trial;

pub use trial::{Trial, templates};

use crate::lab::Lab;
use crate::qemus::{newest_qemu, qemus};
use crate::random::Random;
use grammar::Draw;
use std::path::Path;
use std::time::Instant;
use tables::Tables;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Started by `stillpoint run`.
    Managed,
    /// Started by QEMU alone, attached by its monitor.
    External,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By plain QEMU, with its message.
    Rejected(String),
    /// By Stillpoint, with its message.
    Refused(String),
    Proven,
    Finding(String),
}

impl Verdict {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Rejected(_) => "rejected",
            Self::Refused(_) => "refused",
            Self::Proven => "proven",
            Self::Finding(_) => "FINDING",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Lines that plain QEMU accepts.
    pub lines: u64,
    pub seed: u64,
    /// Only this one.
    pub line: Option<u64>,
    /// Print every verdict.
    pub verbose: bool,
}

#[derive(Debug, Default)]
pub struct Summary {
    pub rejected: u64,
    pub refused: u64,
    pub proven: u64,
    /// Each with its seed and command line.
    pub findings: Vec<String>,
}

impl Summary {
    /// Lines that plain QEMU accepts.
    pub fn accepted(&self) -> u64 {
        self.refused + self.proven + self.findings.len() as u64
    }
}

/// Draws and tries lines until so many were accepted by plain QEMU.
pub fn run(settings: &Settings) -> Summary {
    let qemus = qemus();
    let tables: Vec<Tables> = qemus.iter().map(|qemu| Tables::of(qemu)).collect();
    let newest = newest_qemu();
    let lab = Lab::new(&newest);
    templates(&newest, &lab.path().join("templates"));
    let mut summary = Summary::default();
    // A panic in a trial is reported as the finding of that trial.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut number = settings.line.unwrap_or(0);
    while summary.accepted() < settings.lines {
        try_one(settings, number, &tables, &lab, &mut summary);
        number += 1;
        if settings.line.is_some() {
            break;
        }
    }
    std::panic::set_hook(hook);
    summary
}

fn try_one(settings: &Settings, number: u64, tables: &[Tables], lab: &Lab, summary: &mut Summary) {
    let mut random = Random::new(settings.seed.wrapping_mul(0x9E37_79B9).wrapping_add(number));
    let tables = random.pick(tables);
    let mode = *random.pick(&[Mode::Managed, Mode::External]);
    let words = Draw::new(random.number(), tables).line();
    let begun = Instant::now();
    let name = format!("t{number}");
    let trial = Trial {
        lab,
        qemu: &tables.qemu,
        mode,
        name,
        words: &words,
        acts: &[],
        early: &[],
        is_accepted: false,
    };
    let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| trial.run()))
        .unwrap_or_else(|panic| {
            Verdict::Finding(format!(
                "a command of the trial hangs or panics: {}",
                message(&*panic)
            ))
        });
    let line = shell(&tables.qemu, &words);
    let place = format!(
        "seed {} line {number} {mode:?} ({:.1} s)",
        settings.seed,
        begun.elapsed().as_secs_f64()
    );
    match &verdict {
        Verdict::Rejected(_) => summary.rejected += 1,
        Verdict::Refused(_) => summary.refused += 1,
        Verdict::Proven => summary.proven += 1,
        Verdict::Finding(what) => {
            summary.findings.push(format!("{place}: {what}\n  {line}"));
        }
    }
    if settings.verbose {
        let why = match &verdict {
            Verdict::Rejected(why) | Verdict::Refused(why) => {
                why.lines().last().unwrap_or_default()
            }
            Verdict::Finding(why) => why,
            Verdict::Proven => "",
        };
        println!("{} {place} {why}\n  {line}", verdict.name());
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_default()
}

/// The command, quoted for a shell.
fn shell(qemu: &Path, words: &[String]) -> String {
    let is_plain = |word: &str| {
        !word.is_empty()
            && word
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-_=.,/:+".contains(letter))
    };
    let quoted = words.iter().map(|word| {
        if is_plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    });
    std::iter::once(qemu.display().to_string()).chain(quoted).collect::<Vec<_>>().join(" ")
}
