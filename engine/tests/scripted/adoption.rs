//! A VM moves from one scripted QEMU into another: whatever goes wrong, one of the two continues,
//! or none where neither can.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use engine::adopt::{Adopted, adopt, recover};
use engine::checkpoint::outcome::Kind;
use engine::checkpoint::{Checkpointer, Report};
use scripted_vm::{Gate, Program, Started, StreamFault};
use tokio::sync::oneshot;
use vm::error::{Class, EngineError, class_of, explain};
use vm::memory_source::{EngineChoice, StreamChoice};
use vm::process::started as began;
use vm::running::Vm;
use vm::runtime_dir::{External, RuntimeDir};

use crate::player::Player;
use crate::scene::{By, DISK, Helper, PAGE, Scene, name};

/// The base of the runtime directories, for [`process_that_adopts`].
const BASE: &str = "STILLPOINT_SCRIPTED_ADOPTION";

/// Which QEMU a command waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Old,
    New,
}
use Side::{New, Old};

/// A command that waits: in which QEMU, before or after it is carried out.
type Place = (Side, &'static str, bool);

/// A VM with one checkpoint, in a QEMU that is not of ours.
struct Moving {
    scene: Scene,
    player: Player,
    helper: Option<Helper>,
}

fn monitor(base: &Path) -> PathBuf {
    base.join("monitor")
}

/// A helper of the VM, to which its QEMU is another's.
async fn attached(runtime: RuntimeDir) -> Checkpointer {
    let mut vm = Vm::attach(runtime.clone()).await.unwrap();
    vm.file.external = Some(External {
        monitor: monitor(runtime.path().parent().unwrap()),
        plugin: None,
        started: began(vm.pid).unwrap(),
        engine: EngineChoice::default(),
        stream: StreamChoice::default(),
    });
    Checkpointer::new(vm)
}

async fn move_by(checkpointer: &mut Checkpointer) -> Result<Adopted, EngineError> {
    let (report, _) = tokio::sync::mpsc::channel(1);
    adopt(checkpointer, Some(Program::path()), &Report::to(report)).await
}

impl Moving {
    async fn new() -> Self {
        let scene = Scene::new();
        scene.qemu.listen(&monitor(&scene.path("run"))).unwrap();
        scene.qemu.runs_in(&scene.body);
        let player = Player::new(&scene.path("run"));
        let mut helper = Helper::of(attached(scene.runtime.clone()).await, &scene);
        helper.take(By::Tracker).await.unwrap();
        // What the guest writes while it moves.
        scene.qemu.with(|state| state.migration.written_meanwhile = vec![(0, 5, 55), (1, 2, 22)]);
        Self { scene, player, helper: Some(helper) }
    }

    async fn adopt(&mut self) -> Result<Adopted, EngineError> {
        move_by(&mut self.helper.as_mut().unwrap().checkpointer).await
    }

    fn hold(&self, (side, command, is_after): Place) -> oneshot::Receiver<Gate> {
        match side {
            New => self.player.hold(command, is_after),
            Old => {
                let (send, gate) = oneshot::channel();
                drop(send.send(self.scene.qemu.hold_nth(command, 0, is_after)));
                gate
            }
        }
    }

    /// Adopts, and does `act` when a command waits; then the command is not held any longer.
    async fn adopt_with(
        &mut self,
        place: Place,
        act: impl AsyncFnOnce(&mut Scene, &mut Started),
    ) -> (Result<Adopted, EngineError>, Started) {
        let gate = self.hold(place);
        let Self { scene, player, helper } = self;
        let adoption = move_by(&mut helper.as_mut().unwrap().checkpointer);
        let meanwhile = async {
            let mut gate = gate.await.unwrap();
            gate.reached().await;
            let mut started = player.started().await;
            act(scene, &mut started).await;
            gate.open();
            started
        };
        tokio::join!(adoption, meanwhile)
    }

    fn started(&mut self) -> Option<Started> {
        self.player.started_already()
    }

    fn is_recorded(&self) -> bool {
        self.scene.runtime.adoption().exists()
    }

    fn old_lives(&self) -> bool {
        began(self.scene.body.pid()).is_some()
    }

    /// The old QEMU is the VM, as if nothing had been, and a helper takes its next checkpoint.
    async fn assert_undone(
        &mut self,
        ended: Result<Adopted, EngineError>,
        class: Class,
        words: &[&str],
    ) {
        let error = anyhow::Error::from(ended.expect_err("it cannot be adopted"));
        let said = explain(&error);
        assert!(words.iter().all(|word| said.contains(word)), "{said:?} has not all of {words:?}");
        assert_eq!(class_of(&error), class, "{said}");
        self.assert_old_continues(&said);
        let mut helper = self.helper.take().unwrap();
        self.scene.body.write(&[7]);
        let taken = helper.take(By::Tracker).await.unwrap();
        assert_eq!(taken.kind, Kind::Incremental, "{said}");
    }

    fn assert_old_continues(&self, about: &str) {
        assert!(self.old_lives() && !self.is_recorded(), "{about}");
        self.scene.qemu.with(|state| state.migration.written_meanwhile.clear());
        self.scene.assert_at_rest(about);
        self.scene.qemu.with(|state| assert!(state.blocks.is_active, "{about}"));
    }

    fn assert_new_continues(&self, new: &Started, about: &str) {
        assert!(!self.old_lives() && !self.is_recorded(), "{about}");
        assert!(began(new.body.pid()).is_some(), "{about}");
        new.qemu.with(|state| {
            assert_eq!(state.run_state, "running", "{about}");
            assert!(state.blocks.is_active, "{about}");
        });
    }

    fn assert_same_memory(&self, new: &Started) {
        for page in 0..usize::try_from(self.scene.file.ram_bytes).unwrap() / PAGE {
            let now = new.qemu.with(|state| state.ram.page(0, page));
            assert!(now == self.scene.qemu.with(|state| state.ram.page(0, page)), "page {page}");
        }
    }

    /// The helper is killed while a command waits. Returns the new QEMU.
    async fn helper_killed_at(&mut self, place: Place) -> Started {
        drop(self.helper.take());
        let gate = self.hold(place);
        let mut child = process(&self.scene.path("run"));
        let mut gate = gate.await.unwrap();
        gate.reached().await;
        let started = self.player.started().await;
        child.kill().unwrap();
        child.wait().unwrap();
        self.scene.qemu.sever();
        started.qemu.sever();
        drop(gate);
        started
    }
}

fn process(base: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "adoption::process_that_adopts", "--nocapture"]);
    command.env(BASE, base).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// No test by itself: the helper that the tests below start, and kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_that_adopts() {
    let Some(base) = std::env::var_os(BASE) else { return };
    let runtime = RuntimeDir::new(Some(Path::new(&base)), &name()).unwrap();
    move_by(&mut attached(runtime).await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adopted_vm_is_the_vm_and_continues_its_lineage() {
    let mut moving = Moving::new().await;
    let adopted = moving.adopt().await.unwrap();
    let mut new = moving.player.started().await;
    assert_eq!((adopted.pid, adopted.source_pid), (new.body.pid(), moving.scene.body.pid()));
    assert!(adopted.notes.iter().all(|note| note.contains("display")), "{:?}", adopted.notes);
    moving.assert_new_continues(&new, "adopted");
    moving.assert_same_memory(&new);
    // The monitor of its owner has its name again.
    assert!(monitor(&moving.scene.path("run")).exists());
    new.body.write(&[9]);
    let taken = moving.helper.as_mut().unwrap().take(By::Tracker).await.unwrap();
    assert_eq!((taken.kind, taken.parent.map(|id| id.0)), (Kind::Incremental, Some(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_that_cannot_be_moved_is_refused_and_nothing_is_done() {
    let mut moving = Moving::new().await;
    let why = "the device says no";
    moving.scene.qemu.with(|state| state.blockers.push(why.to_owned()));
    let orders = moving.scene.qemu.orders().len();
    let ended = moving.adopt().await;
    let new = moving.scene.qemu.orders().split_off(orders);
    assert!(new.iter().all(|order| order.starts_with("qom-get")), "{new:?}");
    assert!(moving.started().is_none());
    moving.scene.qemu.with(|state| state.blockers.clear());
    moving.assert_undone(ended, Class::Refused, &[why]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_that_does_not_come_up_or_is_another_vm_is_ended() {
    let mut moving = Moving::new().await;
    moving.player.program.refuse("no such luck\n");
    let ended = moving.adopt().await;
    assert_eq!(moving.scene.qemu.heard("migrate"), 0);
    moving.assert_undone(ended, Class::Failed, &["no such luck"]).await;

    let mut moving = Moving::new().await;
    moving.player.prepare(|qemu| {
        let more = ("/machine/peripheral/more".to_owned(), "virtio-rng-pci".to_owned());
        qemu.with(|state| state.devices.push(more));
    });
    let ended = moving.adopt().await;
    assert_eq!(moving.scene.qemu.heard("migrate"), 0);
    let new = moving.player.started().await;
    assert_eq!(began(new.body.pid()), None);
    moving.assert_undone(ended, Class::Refused, &["virtio-rng-pci"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_that_ends_or_refuses_the_state_undoes_the_move() {
    for place in [(New, "migrate-incoming", true), (Old, "migrate", true)] {
        let mut moving = Moving::new().await;
        let kill = async |_: &mut Scene, new: &mut Started| new.kill();
        let (ended, _new) = moving.adopt_with(place, kill).await;
        moving.assert_undone(ended, Class::Failed, &["was not adopted and continues"]).await;
    }
    let mut moving = Moving::new().await;
    let why = "Missing section footer for rtc";
    moving.player.prepare(move |qemu| {
        qemu.with(|state| state.incoming.refusal = Some(why.to_owned()));
    });
    let ended = moving.adopt().await;
    moving.assert_undone(ended, Class::Failed, &[why, "was not adopted and continues"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_that_writes_too_fast_stays_where_it_is() {
    let mut moving = Moving::new().await;
    moving.scene.qemu.with(|state| state.migration.fault = Some(StreamFault::NeverConverges));
    let ended = moving.adopt().await;
    moving.scene.qemu.with(|state| state.migration.fault = None);
    moving.assert_undone(ended, Class::Failed, &["when it writes less"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_qemu_that_ends_while_it_moves_is_the_vms_end() {
    for place in [(Old, "migrate", true), (Old, "migrate-continue", false)] {
        let mut moving = Moving::new().await;
        let kill = async |scene: &mut Scene, _: &mut Started| {
            scene.body.kill();
            scene.qemu.end();
        };
        let (ended, new) = moving.adopt_with(place, kill).await;
        let said = explain(&ended.expect_err("it has ended").into());
        assert!(said.contains("stillpoint restore vm"), "{said}");
        assert!(began(new.body.pid()).is_none() && !moving.is_recorded(), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helper_killed_before_the_decision_is_undone_by_the_next() {
    let places: [Place; 5] = [
        (New, "qom-list", false),
        (New, "migrate-incoming", true),
        (Old, "migrate", true),
        (Old, "migrate-continue", false),
        (Old, "migrate-continue", true),
    ];
    for place in places {
        let mut moving = Moving::new().await;
        let new = moving.helper_killed_at(place).await;
        recover(&moving.scene.runtime).await.unwrap_or_else(|error| panic!("{place:?}: {error}"));
        assert_eq!(began(new.body.pid()), None, "{place:?}");
        moving.assert_old_continues(&format!("{place:?}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_killed_before_its_guest_runs_undoes_the_move() {
    for place in [(Old, "migrate-continue", false), (Old, "migrate-continue", true)] {
        let mut moving = Moving::new().await;
        let kill = async |_: &mut Scene, new: &mut Started| new.kill();
        let (ended, _new) = moving.adopt_with(place, kill).await;
        moving.assert_undone(ended, Class::Failed, &["was not adopted and continues"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_killed_before_its_cont_undoes_the_move() {
    let mut moving = Moving::new().await;
    let kill = async |_: &mut Scene, new: &mut Started| new.kill();
    let (ended, _new) = moving.adopt_with((New, "cont", false), kill).await;
    moving.assert_undone(ended, Class::Failed, &["was not adopted and continues"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_killed_after_it_wrote_a_disk_is_the_vms_end() {
    let mut moving = Moving::new().await;
    let write_and_die = async |scene: &mut Scene, new: &mut Started| {
        let image = scene.path(&format!("{DISK}.img"));
        let content = std::fs::read(&image).unwrap();
        std::fs::write(&image, [&content[..], &[1; 512]].concat()).unwrap();
        new.kill();
    };
    let (ended, _new) = moving.adopt_with((New, "cont", true), write_and_die).await;
    let error = anyhow::Error::from(ended.expect_err("neither can continue"));
    assert!(explain(&error).contains("stillpoint restore vm"), "{error:#}");
    assert!(!moving.old_lives() && !moving.is_recorded());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cont_that_the_new_qemu_refuses_undoes_the_move() {
    let mut moving = Moving::new().await;
    let why = "Failed to get \"write\" lock";
    moving.player.prepare(move |qemu| qemu.refuse("cont", why));
    let ended = moving.adopt().await;
    let new = moving.player.started().await;
    assert_eq!(began(new.body.pid()), None);
    moving.assert_undone(ended, Class::Failed, &[why, "was not adopted and continues"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helper_killed_after_the_decision_is_finished_by_the_next() {
    let places: [Place; 4] = [
        (New, "cont", false),
        (New, "cont", true),
        (New, "announce-self", true),
        (Old, "quit", false),
    ];
    for place in places {
        let mut moving = Moving::new().await;
        let new = moving.helper_killed_at(place).await;
        recover(&moving.scene.runtime).await.unwrap_or_else(|error| panic!("{place:?}: {error}"));
        moving.assert_new_continues(&new, &format!("{place:?}"));
        recover(&moving.scene.runtime).await.unwrap();
        let vm = Vm::attach(moving.scene.runtime.clone()).await.unwrap();
        assert_eq!((vm.pid, vm.file.external), (new.body.pid(), None), "{place:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_qemu_killed_after_the_decision_costs_nothing() {
    for place in [(New, "cont", false), (New, "announce-self", false)] {
        let mut moving = Moving::new().await;
        let kill = async |scene: &mut Scene, _: &mut Started| {
            scene.body.kill();
            scene.qemu.end();
        };
        let (ended, new) = moving.adopt_with(place, kill).await;
        ended.unwrap_or_else(|error| panic!("{place:?}: {error}"));
        moving.assert_new_continues(&new, &format!("{place:?}"));
        moving.assert_same_memory(&new);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_qemu_killed_once_it_is_the_vm_is_the_vms_end() {
    let mut moving = Moving::new().await;
    moving.adopt().await.unwrap();
    let mut new = moving.player.started().await;
    new.kill();
    let mut helper = moving.helper.take().unwrap();
    helper.take(By::Tracker).await.expect_err("QEMU has ended");
    assert!(helper.checkpointer.vm.has_ended() && !moving.old_lives());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn socket_that_cannot_be_taken_over_is_noted() {
    let mut moving = Moving::new().await;
    let take_place = async |scene: &mut Scene, _: &mut Started| {
        let monitor = monitor(&scene.path("run"));
        std::fs::remove_file(&monitor).unwrap();
        std::fs::create_dir(&monitor).unwrap();
    };
    let (ended, new) = moving.adopt_with((Old, "quit", false), take_place).await;
    let notes = ended.unwrap().notes;
    assert!(notes.iter().any(|note| note.contains("is still called")), "{notes:?}");
    moving.assert_new_continues(&new, "noted");
}
