//! Shapes of VMs, each checkpointed under load and brought back.
//!
//! They are a covering set: every pair of (RAM, board), (RAM, bus), (RAM, format), (RAM,
//! processors), (board, bus), (board, format), (board, processors), (bus, format), (bus,
//! processors) and (format, processors) is in one of them.

use super::memory_limit;
use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use std::path::Path;
use std::time::Duration;
use stillpoint_tests::{
    Lab, Recipe, Taken, TestVm, major_version, newest_qemu, on_each_qemu, thorough,
};

/// 4 KiB pages that the witness rewrites a second: deltas of some MiB.
const LOAD: &str = "witness.rate=1500";

#[derive(Clone, Copy)]
enum Ram {
    Default,
    Private,
    SharedMemfd,
}

/// One VM with three disks: each bus has one, and each format is one.
struct Shape {
    board: &'static str,
    ram: Ram,
    processors: u8,
    virtio: Image,
    scsi: Image,
    ide: Image,
}

#[derive(Clone, Copy)]
enum Image {
    /// qcow2 on a read-only base.
    Backed,
    Cow,
    Raw,
}

impl Shape {
    fn recipe(&self) -> Recipe {
        let ram: &[&str] = match self.ram {
            Ram::Default => &[],
            Ram::Private => &[
                "-object",
                "memory-backend-ram,id=mem,size=256M",
                "-machine",
                "memory-backend=mem",
            ],
            Ram::SharedMemfd => &[
                "-object",
                "memory-backend-memfd,id=mem,size=256M,share=on",
                "-machine",
                "memory-backend=mem",
            ],
        };
        let processors = self.processors.to_string();
        let recipe = Recipe::board(self.board).arguments(ram).arguments(&["-smp", &processors]);
        let recipe = recipe
            .words(LOAD)
            .words("witness.journal=/dev/vda,/dev/sda,/dev/sdb")
            .words(self.base());
        let recipe = disk(recipe, "virtio-blk-pci", self.virtio);
        let recipe = disk(recipe.arguments(&["-device", "virtio-scsi-pci"]), "scsi-hd", self.scsi);
        // The guest's kernel has no driver for the controller of q35 (AHCI).
        match self.board {
            "q35" => disk(
                recipe.arguments(&["-device", "piix3-ide,id=pata"]),
                "ide-hd,bus=pata.0",
                self.ide,
            ),
            _ => disk(recipe, "ide-hd", self.ide),
        }
    }

    /// Which of the guest's other two disks is which is up to its kernel.
    fn base(&self) -> &'static str {
        if matches!(self.virtio, Image::Backed) { "witness.base=/dev/vda" } else { "" }
    }
}

fn disk(recipe: Recipe, device: &str, image: Image) -> Recipe {
    let (file, format) = match image {
        Image::Backed => ("overlay.qcow2", "qcow2"),
        Image::Cow => ("data.qcow2", "qcow2"),
        Image::Raw => ("data.raw", "raw"),
    };
    let id = file.replace('.', "-");
    let drive = format!("file={file},format={format},if=none,id={id}");
    recipe.arguments(&["-drive", &drive, "-device", &format!("{device},drive={id}")])
}

/// Checkpoints under load; every `step`-th comes back.
fn survives(qemu: &Path, shape: &Shape) {
    let (count, step) = if thorough() { (20, 5) } else { (4, 2) };
    let lab = Lab::new(qemu);
    let vm = lab.start_plain("m", &shape.recipe());
    vm.wait_for_witness();
    vm.attach_plain(&[]);
    let taken = take(&vm, count);
    vm.assert_makes_progress();
    let limit = memory_limit(256 << 20);
    assert!(
        vm.helper_peak_bytes() <= limit,
        "the helper held {} bytes of at most {limit}",
        vm.helper_peak_bytes()
    );
    vm.kill();
    for taken in taken.iter().skip(step - 1).step_by(step) {
        let restored = lab.restore(&taken.name, "restored", &[]);
        restored.assert_continues(taken);
    }
    lab.verify("m");
}

fn take(vm: &TestVm, count: usize) -> Vec<Taken> {
    let mut all: Vec<Taken> = Vec::new();
    for _ in 0..count {
        let taken = vm.checkpoint();
        let outcome = &taken.outcome;
        eprintln!(
            "{}: {:?} by {}, paused {:.1} ms, {} changed",
            taken.name, outcome.kind, outcome.engine, outcome.pause_ms, outcome.bytes_changed
        );
        let expected = if all.is_empty() { Kind::Full } else { Kind::Incremental };
        assert_eq!(
            (outcome.kind, outcome.parent),
            (expected, all.last().map(|last| last.outcome.id))
        );
        assert_ne!(outcome.engine, "tracker");
        all.push(taken);
        vm.assert_no_contradiction();
        std::thread::sleep(Duration::from_millis(700));
    }
    all
}

fn survives_on_each(shape: Shape) {
    on_each_qemu(|qemu| survives(qemu, &shape));
}

/// The last pairs of the set; CI sees them with one QEMU.
fn survives_on_newest(shape: Shape) {
    if thorough() { survives_on_each(shape) } else { survives(&newest_qemu(), &shape) }
}

#[test]
fn default_ram_on_pc() {
    let (virtio, scsi, ide) = (Image::Backed, Image::Cow, Image::Raw);
    survives_on_each(Shape { board: "pc", ram: Ram::Default, processors: 1, virtio, scsi, ide });
}

#[test]
fn private_ram_on_q35_with_four_processors() {
    let (virtio, scsi, ide) = (Image::Raw, Image::Backed, Image::Cow);
    survives_on_each(Shape { board: "q35", ram: Ram::Private, processors: 4, virtio, scsi, ide });
}

#[test]
fn a_shared_memfd_on_pc_with_four_processors() {
    let (virtio, scsi, ide) = (Image::Cow, Image::Raw, Image::Backed);
    survives_on_each(Shape {
        board: "pc",
        ram: Ram::SharedMemfd,
        processors: 4,
        virtio,
        scsi,
        ide,
    });
}

#[test]
fn default_ram_on_q35_with_four_processors() {
    let (virtio, scsi, ide) = (Image::Backed, Image::Raw, Image::Cow);
    survives_on_each(Shape { board: "q35", ram: Ram::Default, processors: 4, virtio, scsi, ide });
}

#[test]
fn a_shared_memfd_on_q35() {
    let (virtio, scsi, ide) = (Image::Raw, Image::Cow, Image::Backed);
    survives_on_newest(Shape {
        board: "q35",
        ram: Ram::SharedMemfd,
        processors: 1,
        virtio,
        scsi,
        ide,
    });
}

#[test]
fn private_ram_on_pc() {
    let (virtio, scsi, ide) = (Image::Cow, Image::Backed, Image::Raw);
    survives_on_newest(Shape { board: "pc", ram: Ram::Private, processors: 1, virtio, scsi, ide });
}

/// As people start it: the VM of a -readconfig file, which a restore must find, too.
#[test]
fn a_vm_from_a_configuration_file() {
    on_each_qemu(|qemu| {
        let lab = Lab::new(qemu);
        let recipe = Recipe::witness("q35-scsi.cfg").words(LOAD);
        // With the default network beside that of the file, QEMU before 8.2 is refused.
        let old = major_version(qemu) < 9;
        let recipe = if old { recipe.arguments(&["-nic", "none"]) } else { recipe };
        let vm = lab.start_plain("m", &recipe);
        vm.wait_for_witness();
        vm.attach_plain(&[]);
        let taken = take(&vm, 2);
        vm.kill();
        let restored = lab.restore("m", "m", &[]);
        restored.assert_continues(&taken[1]);
        let next = restored.checkpoint().outcome;
        assert_eq!(
            (next.engine.as_str(), next.kind, next.parent),
            ("tracker", Kind::Incremental, Some(CheckpointId(2)))
        );
    });
}
