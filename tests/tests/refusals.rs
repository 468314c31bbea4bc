//! The pages say what is refused: each thing that their tables list is tried, and ends with exit
//! code 3 and the words that the table or its case has, with the guest as it was. A thing that is
//! listed and has no case fails the test, and so does a case of a thing that is listed no more.

mod cases;
mod special;

use crate::compatibility::rows::ROWS;
use cases::{Case, PAGES, Way};
use qemu_cmdline::unsupported::{self, Command};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;
use stillpoint_tests::torture::{Mode, Trial, Verdict, templates};
use stillpoint_tests::{Lab, Ran, Registry, major_version, newest_qemu, on_each_qemu, pages};

/// VMs of one QEMU at once.
const WORKERS: usize = 2;
const BASE: &str = "-m 16 -accel tcg -display none -monitor none -nodefaults \
                    -drive file=boot.raw,format=raw,if=none,id=boot -device ide-hd,drive=boot";

#[test]
fn refusals_each_item_of_the_tables_has_a_case() {
    let tests = Registry::get();
    let mut wrong = Vec::new();
    for page in PAGES {
        let listed: Vec<String> = pages::first_cells(page.file, page.heading)
            .iter()
            .flat_map(|cell| pages::items(cell))
            .collect();
        assert!(listed.len() > 10, "docs/{} has no table below '{}'", page.file, page.heading);
        let cases: HashSet<&str> = page.cases.iter().map(|case| case.item).collect();
        let without = listed.iter().filter(|item| !cases.contains(item.as_str()));
        wrong.extend(without.map(|item| format!("docs/{}: no case for '{item}'", page.file)));
        let gone = page.cases.iter().filter(|case| !listed.iter().any(|item| item == case.item));
        wrong.extend(gone.map(|case| format!("docs/{} does not list '{}'", page.file, case.item)));
        wrong.extend(page.cases.iter().filter_map(|case| covered(case, tests)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is wrong with a case that is tried elsewhere.
fn covered(case: &Case, tests: &Registry) -> Option<String> {
    let is_there = match case.way {
        Way::Row(item) => {
            let row = ROWS.iter().flat_map(|(_, rows)| *rows).find(|row| row.item == item);
            row.is_some_and(|row| row.kind.is_refused())
        }
        Way::Test(name) => tests.has(name),
        _ => true,
    };
    (!is_there).then(|| format!("'{}': {:?} is not there", case.item, case.way))
}

#[test]
fn refusals_are_what_the_pages_say() {
    on_each_qemu(|qemu| {
        let lab = Lab::for_vms(qemu, WORKERS);
        templates(qemu, &lab.path().join("templates"));
        let major = major_version(qemu);
        let cases = PAGES.iter().flat_map(|page| page.cases).filter(|case| case.fits(major));
        let left = Mutex::new(cases.enumerate());
        let wrong = Mutex::new(Vec::new());
        let work = || {
            loop {
                let Some((number, case)) = left.lock().expect("no panic").next() else { return };
                if let Some(why) = wrong_with(&lab, qemu, number, case) {
                    wrong.lock().expect("no panic").push(why);
                }
            }
        };
        std::thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(work))));
        let wrong = wrong.into_inner().expect("no panic");
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

/// The rows that name `run` in the table of what is unsupported, each thing of them.
#[test]
fn refusals_of_run_are_the_rows_of_the_table() {
    let qemu = newest_qemu();
    let lab = Lab::new(&qemu);
    let qemu = qemu.to_str().expect("UTF-8");
    let rows = unsupported::ROWS.iter().filter(|row| row.is_refused_by(Command::Run));
    for row in rows {
        for line in unsupported::examples(row) {
            let words = ["run", "--name", "row", "--", qemu].into_iter().chain(line.split(' '));
            let message = lab.run(&words.collect::<Vec<_>>()).expect_failure(3);
            let says_all = message.contains(row.reason()) && message.contains(row.remedy());
            assert!(says_all, "{line}: {message}");
        }
    }
    assert!(!lab.runtime().join("row").exists(), "a refused VM leaves nothing behind");
}

/// None if it is refused as its case says.
fn wrong_with(lab: &Lab, qemu: &Path, number: usize, case: &Case) -> Option<String> {
    let name = format!("case-{number}");
    let verdict = match case.way {
        Way::Run(words) => return wrong_with_run(lab, qemu, &name, case, words),
        Way::Attach { words, early } => trial(lab, qemu, &name, words, early, &[]),
        Way::Checkpoint { words, acts } => trial(lab, qemu, &name, words, &[], acts),
        Way::Special(run) => judged(run(lab, &name)?),
        Way::Row(_) | Way::Test(_) => return None,
    };
    match verdict {
        Verdict::Refused(message) => unnamed(case, &message),
        other => Some(format!("{case:?}: {other:?}")),
    }
}

/// Before QEMU starts, and nothing is left.
fn wrong_with_run(lab: &Lab, qemu: &Path, name: &str, case: &Case, words: &str) -> Option<String> {
    let words: Vec<String> =
        BASE.split_whitespace().chain(words.split_whitespace()).map(str::to_owned).collect();
    let trial = Trial {
        lab,
        qemu,
        mode: Mode::Managed,
        name: name.to_owned(),
        words: &words,
        acts: &[],
        early: &[],
        is_accepted: true,
    };
    match trial.run() {
        Verdict::Refused(_) if lab.runtime().join(name).exists() => {
            Some(format!("{case:?}: `run` did not refuse it"))
        }
        Verdict::Refused(message) => unnamed(case, &message),
        other => Some(format!("{case:?}: {other:?}")),
    }
}

type Acts = &'static [(&'static str, &'static str)];

fn trial(lab: &Lab, qemu: &Path, name: &str, words: &str, early: Acts, acts: Acts) -> Verdict {
    let words: Vec<String> =
        BASE.split_whitespace().chain(words.split_whitespace()).map(str::to_owned).collect();
    let trial = Trial {
        lab,
        qemu,
        mode: Mode::External,
        name: name.to_owned(),
        words: &words,
        acts,
        early,
        is_accepted: true,
    };
    trial.run()
}

fn judged(ran: Ran) -> Verdict {
    if ran.code == 3 { Verdict::Refused(ran.err) } else { Verdict::Finding(format!("{ran:?}")) }
}

/// The words that the message should have and has not.
fn unnamed(case: &Case, message: &str) -> Option<String> {
    let missing = case.words().into_iter().find(|word| !message.contains(word.as_str()));
    missing.map(|word| format!("{}: no '{word}' in: {message}", case.item))
}
