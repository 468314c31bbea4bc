//! Which VM: the guest's image, the configuration, and what a test changes in them.

use crate::built::project;
use crate::images::qemu_img;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// The boot-sector VM is as small as SeaBIOS allows.
pub const SCRIBBLER_RAM_BYTES: u64 = 16 << 20;
const SCRIBBLER: &[u8; 512] = include_bytes!("scribbler.bin");
const SEED_AT: usize = 4;

/// A small table, checked about twice a second: two walks over it show that all of a restored VM's
/// RAM is right. Lines come often, because most tests wait for some.
const QUICK: &str = "witness.table_mib=12 witness.check=6144 witness.report_ms=250";

#[derive(Clone, Debug)]
enum Guest {
    /// Linux and the witness, from `scripts/guest-image --kind KIND`, run by a file of
    /// `qemu-configs/`.
    Witness { kind: &'static str, config: &'static str },
    /// The same guest on a bare board, which has only what `arguments` give it.
    Board { vm: &'static str },
    /// A boot sector that writes to memory (`scribbler.S`), and two disks that only the test
    /// writes.
    Scribbler { seed: u32 },
}

#[derive(Clone, Debug)]
pub struct Recipe {
    guest: Guest,
    words: String,
    arguments: Vec<String>,
    prepare: Vec<Vec<String>>,
    patches: Vec<(&'static str, u64, &'static [u8])>,
}

impl Recipe {
    /// A VM of `qemu-configs/` with the witness as its guest.
    pub fn witness(config: &'static str) -> Self {
        let kind = if config == "guest-union.cfg" { "union" } else { "plain" };
        Self::new(Guest::Witness { kind, config })
    }

    /// The witness on a board without disks and display (`pc` or `q35`, 256 MiB); the arguments of
    /// a test give it disks. Files to use: `base.qcow2`, `overlay.qcow2` on it (64 MiB),
    /// `data.qcow2` and `data.raw` (32 MiB).
    pub fn board(vm: &'static str) -> Self {
        Self::new(Guest::Board { vm })
    }

    /// Boots in a second and needs no image: `boot` (IDE, raw), `cow` (qcow2 on a base, 16 MiB),
    /// `odd` (raw, 3 MiB and 512 bytes).
    pub fn scribbler(seed: u32) -> Self {
        Self::new(Guest::Scribbler { seed })
    }

    fn new(guest: Guest) -> Self {
        Self {
            guest,
            words: String::new(),
            arguments: Vec::new(),
            prepare: Vec::new(),
            patches: Vec::new(),
        }
    }

    /// More words for the guest's kernel command line; the last of a key wins.
    pub fn words(mut self, words: &str) -> Self {
        self.words += " ";
        self.words += words;
        self
    }

    /// More arguments for QEMU.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|word| (*word).to_owned()));
        self
    }

    /// A qemu-img command, run in the VM's directory before it starts.
    pub fn image(mut self, arguments: &[&str]) -> Self {
        self.prepare.push(arguments.iter().map(|word| (*word).to_owned()).collect());
        self
    }

    /// Other bytes in one of the VM's files, before it starts.
    pub fn patch(mut self, file: &'static str, offset: u64, bytes: &'static [u8]) -> Self {
        self.patches.push((file, offset, bytes));
        self
    }

    /// Makes the VM's files in `directory`.
    pub fn furnish(&self, qemu: &Path, directory: &Path) {
        match self.guest {
            Guest::Witness { kind, config } => {
                guest_image(kind, directory);
                add_words(&directory.join(config), &format!("{QUICK}{}", self.words));
            }
            Guest::Board { .. } => guest_image("plain", directory),
            Guest::Scribbler { seed } => furnish_scribbler(qemu, seed, directory),
        }
        for command in &self.prepare {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            qemu_img(qemu, directory, &command);
        }
        for (name, offset, bytes) in &self.patches {
            let file = File::options()
                .write(true)
                .open(directory.join(name))
                .expect("the test's directory");
            file.write_all_at(bytes, *offset).expect("the test's directory");
        }
    }

    /// What stands after `stillpoint run … --`. Paths are relative, so that a restored VM has its
    /// own.
    pub fn command_line(&self, qemu: &Path) -> Vec<String> {
        let mut words = vec![qemu.display().to_string()];
        let guest = match self.guest {
            Guest::Witness { config, .. } => format!("-readconfig {config}"),
            Guest::Board { vm } => {
                format!("-machine {vm} -m 256 -nodefaults -kernel vmlinuz -initrd initrd.img")
            }
            Guest::Scribbler { .. } => format!(
                "-machine pc -m {} -nodefaults \
                 -drive file=boot.raw,format=raw,if=none,id=boot -device ide-hd,drive=boot \
                 -drive file=cow.qcow2,format=qcow2,if=none,id=cow -device virtio-blk-pci,drive=cow \
                 -drive file=odd.raw,format=raw,if=none,id=odd -device virtio-blk-pci,drive=odd",
                SCRIBBLER_RAM_BYTES >> 20
            ),
        };
        words.extend(guest.split_whitespace().map(str::to_owned));
        if let Guest::Board { .. } = self.guest {
            words.extend([
                "-append".to_owned(),
                format!("console=ttyS0 quiet panic=-1 {QUICK}{}", self.words),
            ]);
        }
        let common = "-accel tcg -display none -monitor none -serial file:serial.log -qmp unix:extra.sock,server=on,wait=off";
        words.extend(common.split(' ').map(str::to_owned));
        words.extend(self.arguments.clone());
        words
    }

    /// The same for QEMU alone, with a monitor for the helper.
    pub fn plain_command_line(&self, qemu: &Path) -> Vec<String> {
        let mut words = self.command_line(qemu);
        words.extend(["-qmp", "unix:qmp.sock,server=on,wait=off"].map(str::to_owned));
        words
    }
}

fn guest_image(kind: &str, directory: &Path) {
    let script = project().join("scripts/guest-image");
    let output = Command::new(&script).args(["--kind", kind, "--vm"]).arg(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "no test guest; run scripts/install-deps, then scripts/guest-image. It said: {said}"
    );
}

fn add_words(config: &Path, words: &str) {
    let text = std::fs::read_to_string(config).expect("scripts/guest-image put it there");
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with("append"))
        .expect("a kernel command line");
    let longer = format!("{} {words}\"", line.trim_end().trim_end_matches('"'));
    std::fs::write(config, text.replace(line, &longer)).expect("the test's directory");
}

fn furnish_scribbler(qemu: &Path, seed: u32, directory: &Path) {
    let mut boot = vec![0; 1 << 20];
    boot[..SCRIBBLER.len()].copy_from_slice(SCRIBBLER);
    boot[SEED_AT..SEED_AT + 4].copy_from_slice(&seed.to_le_bytes());
    std::fs::write(directory.join("boot.raw"), boot).expect("the test's directory");
    std::fs::write(directory.join("odd.raw"), vec![0; (3 << 20) + 512])
        .expect("the test's directory");
    let pattern = |at: usize| if at % (3 << 20) < (1 << 20) { (at >> 12) as u8 | 1 } else { 0 };
    std::fs::write(directory.join("base.raw"), (0..16 << 20).map(pattern).collect::<Vec<u8>>())
        .expect("the test's directory");
    qemu_img(
        qemu,
        directory,
        &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "cow.qcow2"],
    );
}
