//! A few random command lines; `make torture N=300` tries more.

use stillpoint_tests::torture::{Mode, Settings, Trial, Verdict, run, templates};
use stillpoint_tests::{Lab, newest_qemu};

/// A line takes about a second and a half.
const LINES: u64 = 14;
const SEED: u64 = 1;

#[test]
fn torture_random_command_lines_are_refused_or_proven() {
    let summary = run(&Settings { lines: LINES, seed: SEED, line: None, verbose: false });
    assert!(summary.findings.is_empty(), "{}", summary.findings.join("\n"));
    assert!(summary.proven > 0 && summary.proven + summary.refused == LINES, "{summary:?}");
}

/// Its class description names the wrong memory, so what comes back would not be the card's.
#[test]
fn torture_card_of_the_board_without_its_state_is_refused() {
    let lab = Lab::new(&newest_qemu());
    templates(&lab.qemu, &lab.path().join("templates"));
    let line = "-machine isapc -m 16 -accel tcg -display none -nodefaults -vga std -drive file=boot.raw,format=raw,if=ide";
    let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    for mode in [Mode::Managed, Mode::External] {
        let name = format!("board-{mode:?}").to_lowercase();
        let trial = Trial { lab: &lab, qemu: &lab.qemu, mode, name, words: &words, acts: &[], is_accepted: true };
        let verdict = trial.run();
        assert!(matches!(&verdict, Verdict::Refused(why) if why.contains("(isa-vga)")), "{mode:?}: {verdict:?}");
    }
}
