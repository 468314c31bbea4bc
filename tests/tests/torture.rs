//! A few random command lines; `make torture N=300` tries more.

use std::path::Path;
use stillpoint_tests::torture::{Mode, Settings, Trial, Verdict, run, templates};
use stillpoint_tests::{Lab, major_version, newest_qemu, qemus};

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
    let lab = lab();
    for mode in [Mode::Managed, Mode::External] {
        let verdict = verdict_of(&lab, &lab.qemu, mode, &format!("{ISA_PC} -vga std"));
        assert!(
            matches!(&verdict, Verdict::Refused(why) if why.contains("(isa-vga)")),
            "{mode:?}: {verdict:?}"
        );
    }
}

const ISA_PC: &str = "-machine isapc -m 16 -accel tcg -display none -nodefaults -drive file=boot.raw,format=raw,if=ide";

const TWO_NETWORKS: &str = "-machine pc -m 16 -accel tcg -display none -nodefaults -drive file=boot.raw,format=raw -nic user -nic user";

/// QEMU before 8.2 loads the state of both controllers, or networks, into the first.
#[test]
fn torture_devices_saved_under_one_name_are_refused() {
    let lab = lab();
    for qemu in qemus() {
        let verdict = verdict_of(&lab, &qemu, Mode::Managed, &format!("{ISA_PC} -vga none"));
        let is_refused = matches!(&verdict, Verdict::Refused(why) if why.contains("isa-ide"));
        assert!(is_refused || verdict == Verdict::Proven, "{}: {verdict:?}", qemu.display());
        let verdict = verdict_of(&lab, &qemu, Mode::Managed, TWO_NETWORKS);
        let is_refused =
            matches!(&verdict, Verdict::Refused(why) if why.contains("several user networks"));
        assert_eq!(is_refused, major_version(&qemu) < 9, "{}: {verdict:?}", qemu.display());
        assert!(is_refused || verdict == Verdict::Proven, "{}: {verdict:?}", qemu.display());
    }
}

/// After its migration QEMU would open the disks again, and could not. Newer ones have no `-runas`.
#[test]
fn torture_disks_closed_to_qemu_are_no_reason_to_stop_the_guest() {
    let lab = lab();
    for qemu in qemus() {
        let line = "-machine pc -m 16 -accel tcg -display none -nodefaults -drive file=boot.raw,format=raw -runas nobody";
        let verdict = verdict_of(&lab, &qemu, Mode::External, line);
        assert!(
            matches!(verdict, Verdict::Refused(_) | Verdict::Rejected(_)),
            "{}: {verdict:?}",
            qemu.display()
        );
    }
}

fn lab() -> Lab {
    let lab = Lab::new(&newest_qemu());
    templates(&lab.qemu, &lab.path().join("templates"));
    lab
}

fn verdict_of(lab: &Lab, qemu: &Path, mode: Mode, line: &str) -> Verdict {
    let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    let name = format!("line-{mode:?}").to_lowercase();
    Trial { lab, qemu, mode, name, words: &words, acts: &[], early: &[], is_accepted: true }.run()
}
