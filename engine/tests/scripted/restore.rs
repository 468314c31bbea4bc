//! Restores into a QEMU that is a script: every fault of the table leaves all as it was.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use engine::checkpoint::{Checkpointer, Force, StoreSession};
use engine::progress::Silent;
use engine::restore::{self, Hooks, Request, Restored};
use engine::stores;
use scripted_vm::{Gate, Program, Started};
use tokio::sync::oneshot;
use vm::error::{Class, EngineError, class_of, explain};
use vm::running::Vm;
use vm::runtime_dir::RuntimeDir;

use crate::player::Player;
use crate::scene::{By, Helper, PAGE, Scene, name, noise};

/// The request that [`process_that_restores`] carries out, as JSON.
const REQUEST: &str = "STILLPOINT_SCRIPTED_RESTORE";

/// A VM with one checkpoint, whose QEMU and helper have ended.
pub(crate) struct Saved {
    pub scene: Scene,
    pub player: Player,
    /// `pc.ram` as it was.
    memory: Vec<Vec<u8>>,
    pub before: Vec<PathBuf>,
}

/// All files below a directory but sockets and pipes of the test itself.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
            all.push(entry.path());
        }
    }
    // Made by the first restore of a name, and empty; and claims, which are released.
    all.retain(|path| {
        !path.ends_with("helper.lock") && !path.to_string_lossy().contains("/writers/")
    });
    all.sort();
    all
}

fn memory(scene: &Scene) -> Vec<Vec<u8>> {
    let pages = usize::try_from(scene.file.ram_bytes).unwrap() / PAGE;
    (0..pages).map(|page| scene.qemu.with(|state| state.ram.page(0, page))).collect()
}

impl Saved {
    pub(crate) async fn new() -> Self {
        Self::of(Scene::read_only(noise(4 * PAGE))).await
    }

    pub(crate) async fn of(mut scene: Scene) -> Self {
        let mut helper = scene.helper_by_url().await;
        helper.take(By::Tracker).await.unwrap();
        helper.checkpointer.release().await;
        drop(helper);
        let memory = memory(&scene);
        scene.body.kill();
        scene.qemu.end();
        let player = Player::new(&scene.path("run"));
        let before = files(scene.directory.path());
        Self { scene, player, memory, before }
    }

    fn store(&self) -> PathBuf {
        self.scene.path("store/vms/vm/checkpoints")
    }

    pub(crate) fn request(&self) -> Request {
        Request {
            checkpoint: "vm".parse().unwrap(),
            store: self.scene.file.store.clone(),
            runtime_base: Some(self.scene.path("run")),
            new_name: None,
            dir: Some(self.scene.path("new")),
            qemu: Some(Program::path().display().to_string()),
            fleecing: Some(self.scene.directory.path().to_owned()),
            map: Vec::new(),
            allow: Vec::new(),
            take_over: false,
            paused: false,
            run: false,
            lazy: false,
            deadline: None,
            hooks: Hooks::default(),
            keep_clock: false,
        }
    }

    async fn restore(&self) -> Result<Restored, EngineError> {
        self.restore_as(self.request()).await
    }

    pub(crate) async fn restore_as(&self, request: Request) -> Result<Restored, EngineError> {
        restore::run(request, Arc::new(Silent), std::future::pending()).await
    }

    /// It fails so, and nothing of it is left, in files and in processes.
    async fn assert_fails(&mut self, class: Class, words: &[&str]) {
        let error = self.restore().await.err().unwrap_or_else(|| panic!("no {words:?}"));
        self.assert_undone(error, class, words);
    }

    pub(crate) fn assert_undone(&mut self, error: EngineError, class: Class, words: &[&str]) {
        let error = anyhow::Error::from(error);
        let said = explain(&error);
        assert!(words.iter().all(|word| said.contains(word)), "{said:?} has not all of {words:?}");
        assert_eq!(class_of(&error), class, "{said}");
        self.assert_nothing_left(&said);
    }

    fn assert_nothing_left(&mut self, about: &str) {
        assert_eq!(files(self.scene.directory.path()), self.before, "{about}");
        let left: Vec<u32> = self.running().iter().map(|started| started.body.pid()).collect();
        assert_eq!(left, [0; 0], "{about}");
    }

    fn running(&mut self) -> Vec<Started> {
        let started = std::iter::from_fn(|| self.player.started_already());
        started.filter(|started| vm::process::started(started.body.pid()).is_some()).collect()
    }

    /// The restored VM is the VM, it runs, and its next checkpoint builds on the one restored.
    pub(crate) async fn assert_restored(&mut self, restored: Restored) {
        let Restored { vm, session, marks, .. } = restored;
        let checkpointer = Checkpointer::of_restored(vm, session, marks).await;
        self.assert_is_the_vm(checkpointer).await;
    }

    async fn assert_is_the_vm(&mut self, checkpointer: Checkpointer) {
        let mut started = self.player.started().await;
        started.qemu.with(|state| {
            assert_eq!(state.run_state, "running");
            for (page, bytes) in self.memory.iter().enumerate() {
                assert!(state.ram.page(0, page) == *bytes, "page {page}");
            }
        });
        started.body.write(&[9]);
        let mut helper = Helper::of(checkpointer, &self.scene);
        let taken = helper.take(By::Tracker).await.unwrap();
        assert_eq!((taken.kind, taken.parent), (Kind::Incremental, Some(CheckpointId(1))));
        assert!(taken.pages_dirty < 64, "{taken:?}");
    }

    /// The request is carried out by a process of its own, which ends with its stdin.
    fn process(&self) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "restore::process_that_restores", "--nocapture"]);
        command.env(REQUEST, serde_json::to_string(&self.request()).unwrap());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// A process that restores, when a command to the new QEMU waits.
    async fn process_at(&mut self, command: &'static str, is_after: bool) -> (Child, Gate) {
        let gate = self.player.hold(command, is_after);
        let child = self.process();
        let mut gate = gate.await.unwrap();
        gate.reached().await;
        (child, gate)
    }
}

/// The line of a process that says how it ended.
fn said(child: &mut Child) -> String {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut lines = lines.filter_map(|line| Some(line.split_once("said ")?.1.to_owned()));
    lines.next().unwrap_or_default()
}

/// No test by itself: the process that the tests below start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_that_restores() {
    let Ok(request) = std::env::var(REQUEST) else { return };
    let request: Request = serde_json::from_str(&request).unwrap();
    let (end, ended) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        drop(end);
    });
    let interrupted = async { drop(ended.await) };
    match restore::run(request, Arc::new(Silent), interrupted).await {
        Ok(restored) => {
            println!("said restored {}", restored.report.id);
            // It is the VM's helper, until it is killed.
            std::future::pending::<()>().await;
        }
        Err(error) => println!("said {}", explain(&error.into())),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restored_vm_is_the_vm_and_continues_its_lineage() {
    let mut saved = Saved::new().await;
    let restored = saved.restore().await.unwrap();
    assert_eq!(restored.report.id, CheckpointId(1));
    assert!(restored.report.running && !saved.scene.path("run/vm/restore.json").exists());
    saved.assert_restored(restored).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_or_missing_file_is_named_and_nothing_runs() {
    let mut saved = Saved::new().await;
    let first = saved.store().join("1");
    let packs = std::fs::read_dir(&first).unwrap().flatten().map(|entry| entry.path());
    let packs: Vec<PathBuf> =
        packs.filter(|path| path.extension().is_some_and(|end| end == "pack")).collect();
    assert!(!packs.is_empty());
    for path in packs {
        let (good, file) = (std::fs::read(&path).unwrap(), path.file_name().unwrap());
        let mut bad = good.clone();
        // Frames, which are read when the new QEMU is up; the index behind them is whole.
        bad[..good.len() / 2].iter_mut().for_each(|byte| *byte ^= 0xff);
        std::fs::write(&path, bad).unwrap();
        saved.assert_fails(Class::Damaged, &[file.to_str().unwrap()]).await;
        std::fs::remove_file(&path).unwrap();
        let before = std::mem::replace(&mut saved.before, files(saved.scene.directory.path()));
        // The store says that it is not there.
        saved.assert_fails(Class::Store, &[file.to_str().unwrap()]).await;
        std::fs::write(&path, good).unwrap();
        saved.before = before;
    }
    let restored = saved.restore().await.unwrap();
    saved.assert_restored(restored).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_type_that_qemu_lacks_is_refused_before_anything_is_made() {
    let mut scene = Scene::read_only(noise(PAGE));
    scene.file.machine_type = "pc-q35-99.0".into();
    scene.runtime.save_vm(&scene.file).unwrap();
    let mut saved = Saved::of(scene).await;
    saved.assert_fails(Class::Refused, &["pc-q35-99.0", "--qemu"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_exists_is_not_overwritten() {
    let mut saved = Saved::of(Scene::new()).await;
    let image = saved.scene.path("new/d0-node.raw");
    std::fs::create_dir(saved.scene.path("new")).unwrap();
    std::fs::write(&image, "theirs").unwrap();
    saved.before = files(saved.scene.directory.path());
    saved.assert_fails(Class::Refused, &["d0-node.raw", "exists already"]).await;
    assert_eq!(std::fs::read(&image).unwrap(), b"theirs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_qemu_refuses_is_qemus_own_error() {
    let mut saved = Saved::new().await;
    let why = "Missing section footer for rtc";
    saved.player.prepare(move |qemu| {
        qemu.with(|state| state.incoming.refusal = Some(why.to_owned()));
    });
    saved.assert_fails(Class::Failed, &[why]).await;
    // One that says why and ends, as for an option that it does not know.
    saved.player.program.refuse("no such luck\n");
    saved.before = files(saved.scene.directory.path());
    saved.assert_fails(Class::Refused, &["no such luck"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn port_in_use_is_refused_with_the_map_that_helps() {
    let mut scene = Scene::read_only(noise(PAGE));
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let forward = format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22");
    scene.file.arguments.extend(["-netdev".into(), forward]);
    scene.runtime.save_vm(&scene.file).unwrap();
    let mut saved = Saved::of(scene).await;
    saved.assert_fails(Class::Refused, &[&port.to_string(), "--map"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_that_was_committed_meanwhile_undoes_the_restore() {
    let mut saved = Saved::new().await;
    let gate = saved.player.hold("migrate-incoming", false);
    let (first, second) = (saved.store().join("1"), saved.store().join("2"));
    let commit = async {
        let mut gate = gate.await.unwrap();
        gate.reached().await;
        // Another writer's: only that it is there counts.
        std::fs::create_dir(&second).unwrap();
        for file in std::fs::read_dir(&first).unwrap().flatten() {
            std::fs::copy(file.path(), second.join(file.file_name())).unwrap();
        }
        gate.open();
    };
    let (ended, ()) = tokio::join!(saved.restore(), commit);
    std::fs::remove_dir_all(&second).unwrap();
    let words = ["checkpoint 2 was committed"];
    saved.assert_undone(ended.err().expect("it is not the newest"), Class::Refused, &words);
    // The epoch was released.
    let restored = saved.restore().await.unwrap();
    saved.assert_restored(restored).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_restore_undoes_everything() {
    for command in ["human-monitor-command", "migrate-incoming"] {
        let mut saved = Saved::new().await;
        let gate = saved.player.hold(command, true);
        let interrupted = async {
            let mut gate = gate.await.unwrap();
            gate.reached().await;
        };
        let ended = restore::run(saved.request(), Arc::new(Silent), interrupted).await;
        let error = ended.err().unwrap_or_else(|| panic!("{command}"));
        saved.assert_undone(error, Class::Failed, &["interrupted"]);
        let restored = saved.restore().await.unwrap();
        saved.assert_restored(restored).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_killed_before_cont_leaves_nothing() {
    let mut saved = Saved::new().await;
    let (mut child, gate) = saved.process_at("migrate-incoming", true).await;
    // What a process has of the command that started it ends with the command.
    drop(child.stdin.take());
    assert!(said(&mut child).contains("interrupted"));
    child.wait().unwrap();
    drop(gate);
    saved.assert_nothing_left("the command killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_killed_before_cont_is_undone_by_the_same_command() {
    for (command, is_after) in [("migrate-incoming", false), ("cont", false)] {
        let mut saved = Saved::new().await;
        let (mut child, gate) = saved.process_at(command, is_after).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let left = saved.player.started().await;
        left.qemu.sever();
        drop(gate);
        left.qemu.with(|state| assert!(!state.is_running(), "{command}"));
        if command == "cont" {
            // It may have run, so nothing is undone: `attach` finds it stopped.
            assert!(!saved.scene.path("run/vm/restore.json").exists());
            continue;
        }
        assert!(saved.scene.path("run/vm/restore.json").exists());
        let restored = saved.restore().await.unwrap();
        assert_eq!(vm::process::started(left.body.pid()), None, "it was ended");
        saved.assert_restored(restored).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_killed_after_cont_leaves_a_vm_with_its_helper() {
    let mut saved = Saved::new().await;
    let (mut child, gate) = saved.process_at("cont", true).await;
    drop(child.stdin.take());
    gate.open();
    assert_eq!(said(&mut child), "restored 1");
    assert!(child.try_wait().unwrap().is_none(), "it is the helper");
    let started = saved.player.started().await;
    started.qemu.with(|state| assert!(state.is_running()));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_killed_after_cont_leaves_a_vm_to_attach_to() {
    let mut saved = Saved::new().await;
    let (mut child, gate) = saved.process_at("announce-self", false).await;
    child.kill().unwrap();
    child.wait().unwrap();
    drop(gate);
    let runtime = RuntimeDir::new(Some(&saved.scene.path("run")), &name()).unwrap();
    let (vm, file) = (Vm::attach(runtime.clone()).await.unwrap(), runtime.vm().unwrap());
    let repository = stores::open_existing(&file.store).await.unwrap();
    let session = StoreSession::claim(repository, &file, &runtime, Force::No).await.unwrap();
    saved.assert_is_the_vm(Checkpointer::with_session(vm, session)).await;
}
