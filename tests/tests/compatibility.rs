//! docs/compatibility.md is what this test finds: it tries each row of the table. What is carried
//! is proven: a few VMs have all of it, each is checkpointed and killed, its files are moved away,
//! and `verify --restore` compares the restored VM. [`UPDATE`] writes the page.

pub(crate) mod rows;

use rows::{Kind, ROWS, Row, Vm};
use std::fmt::Write;
use stillpoint_tests::torture::{Mode, Trial, Verdict, templates};
use stillpoint_tests::{Lab, newest_qemu, project};

const PAGE: &str = "docs/compatibility.md";
const UPDATE: &str = "STILLPOINT_UPDATE_DOCS=1 \
                      cargo test -p stillpoint-tests --test vms -- compatibility";
const COLUMNS: &str = "| option or state | managed VM | external VM |\n| --- | --- | --- |\n";
/// Marks a cell that should have a refusal.
const OTHER: &str = "NOT REFUSED:";
const BASE: &str = "-m 16 -accel tcg -display none -monitor none -nodefaults \
                    -drive file=boot.raw,format=raw,if=none,id=boot -device ide-hd,drive=boot";
const HEAD: &str = "# What a checkpoint carries

`cargo test --workspace --test vms -- compatibility` tries each row under TCG and compares this page
with what it finds. A managed VM was started by `stillpoint run` or `restore`; an external VM was
started by anything else and attached by its QMP socket.

- *carried*: a VM with this option or in this state was checkpointed and killed, its files were
  moved away, and `verify --restore` found the same memory, disks and device state in the restored
  VM. The test uses a few VMs, each with many of these options.
- *refused*: exit code 3 with this message (for external VMs the same one, if they have none),
  before any checkpoint is durable: by `run` before QEMU starts, by `attach`, or by `checkpoint`. A
  running guest is not disturbed.
- *not tried*: by this test.

If a VM has something that this page lacks, `stillpoint doctor --qmp SOCKET` says whether it can be
attached, and `stillpoint checkpoint NAME --verify` proves its checkpoint. [disks.md](disks.md) says
how disks are restored, [limits.md](limits.md) how large things may be, and
[security.md](security.md) what a restore may open.
";

#[test]
fn compatibility_page_is_what_is_found() {
    let lab = Lab::new(&newest_qemu());
    templates(&lab.qemu, &lab.path().join("templates"));
    let unproven: Vec<String> = Vm::ALL.iter().flat_map(|vm| prove(&lab, *vm)).collect();
    let page = page(&lab);
    let other = page.lines().filter(|line| line.contains(OTHER)).map(str::to_owned);
    let findings: Vec<String> = unproven.into_iter().chain(other).collect();
    assert!(
        findings.is_empty(),
        "rows are neither carried nor refused as they say:\n{}",
        findings.join("\n")
    );
    let path = project().join(PAGE);
    if std::env::var_os("STILLPOINT_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("the tree can be written");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let changes = changes(&written, &page);
    assert!(
        written == page,
        "{PAGE} (-) is not what is found (+):\n{changes}\n{UPDATE}\nwrites it"
    );
}

/// The lines that only one of them has.
fn changes(written: &str, found: &str) -> String {
    let only = |sign: char, text: &str, other: &str| {
        let lines = text.lines().filter(|line| !other.lines().any(|there| there == *line));
        lines.map(|line| format!("{sign} {line}\n")).collect::<String>()
    };
    only('-', written, found) + &only('+', found, written)
}

fn page(lab: &Lab) -> String {
    let mut page = HEAD.to_owned();
    let mut number = 0;
    for (topic, rows) in ROWS {
        write!(page, "\n## {topic}\n\n{COLUMNS}").expect("a string");
        for row in *rows {
            number += 1;
            let [managed, external] = cells(lab, row, number);
            writeln!(page, "| {} | {managed} | {external} |", row.item).expect("a string");
        }
    }
    page
}

/// How each kind of VM fares with it.
fn cells(lab: &Lab, row: &Row, number: usize) -> [String; 2] {
    let carried = || "carried".to_owned();
    let refused = |mode| refusal(lab, row, mode, number);
    match row.kind {
        Kind::Carried(vm) if vm.modes().len() == 2 => [carried(), carried()],
        Kind::Carried(_) => [format!("refused: {}", refused(Mode::Managed)), carried()],
        Kind::Refused => [format!("refused: {}", refused(Mode::Managed)), "not tried".to_owned()],
        Kind::RefusedToBoth => {
            let words = [refused(Mode::Managed), refused(Mode::External)];
            let external = if words[0] == words[1] {
                "refused".to_owned()
            } else {
                format!("refused: {}", words[1])
            };
            [format!("refused: {}", words[0]), external]
        }
    }
}

fn refusal(lab: &Lab, row: &Row, mode: Mode, number: usize) -> String {
    let name = format!("row-{number}-{mode:?}").to_lowercase();
    match trial(lab, &name, mode, row.words, row.acts) {
        Verdict::Refused(message) => plain(lab, &name, &message),
        verdict => format!("{OTHER} {verdict:?}"),
    }
}

/// One VM that has all rows that name it; what is not proven.
fn prove(lab: &Lab, vm: Vm) -> Vec<String> {
    let rows =
        || ROWS.iter().flat_map(|(_, rows)| *rows).filter(move |row| row.kind == Kind::Carried(vm));
    let words: Vec<&str> = std::iter::once(vm.board()).chain(rows().map(|row| row.words)).collect();
    let acts: Vec<(&str, &str)> = rows().flat_map(|row| row.acts).copied().collect();
    let verdicts = vm.modes().iter().map(|mode| {
        let name = format!("{vm:?}{mode:?}").to_lowercase();
        (name.clone(), trial(lab, &name, *mode, &words.join(" "), &acts))
    });
    let unproven = verdicts.filter(|(_, verdict)| *verdict != Verdict::Proven);
    unproven.map(|(name, verdict)| format!("{name}: {verdict:?}")).collect()
}

fn trial(lab: &Lab, name: &str, mode: Mode, words: &str, acts: &[(&str, &str)]) -> Verdict {
    let words: Vec<String> =
        BASE.split_whitespace().chain(words.split_whitespace()).map(str::to_owned).collect();
    let trial = Trial {
        lab,
        qemu: &lab.qemu,
        mode,
        name: name.to_owned(),
        words: &words,
        acts,
        early: &[],
        is_accepted: true,
    };
    trial.run()
}

/// The last message, without what is of this run.
fn plain(lab: &Lab, name: &str, said: &str) -> String {
    let message = said.rsplit("stillpoint: ").next().unwrap_or(said).trim();
    let directory = lab.path().join(name);
    let message = message.replace(&format!("{}/", directory.display()), "");
    message.replace(name, "NAME").replace('|', "\\|").replace('\n', " ")
}
