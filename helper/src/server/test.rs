//! A helper beside a scripted VM, asked as commands ask it, and by clients that are none.

use super::*;
use crate::client;
use crate::scene::Scene;
use engine::checkpoint::Choice;
use engine::checkpoint::outcome::{Kind, Outcome};
use engine::stores;
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::pin::pin;
use std::sync::Mutex;
use tokio::task::JoinHandle;
use vm::error::Class;

const SHORT: Duration = Duration::from_millis(20);

type Taken = Result<Outcome, EngineError>;

async fn take(runtime: RuntimeDir) -> Taken {
    client::decode(client::checkpoint(&runtime, Choice::default(), |_| ()).await?)
}

/// A checkpoint that has come as far as `gate` says.
async fn begun(scene: &Scene, gate: &mut scripted_vm::Gate) -> JoinHandle<Taken> {
    let taking = tokio::spawn(take(scene.runtime()));
    gate.reached().await;
    taking
}

/// Whether the work waits after it has done what it can at once.
macro_rules! waits {
    ($work:expr) => {
        tokio::select! {
            biased;
            _ = &mut $work => false,
            () = std::future::ready(()) => true,
        }
    };
}

/// One who writes bytes and reads a line; none if the helper hangs up.
async fn tell(runtime: &RuntimeDir, bytes: &[u8]) -> Option<Reply> {
    let mut stream = UnixStream::connect(runtime.control()).await.unwrap();
    // One who is cut off at its limit cannot send the rest.
    let _ = stream.write_all(bytes).await;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.ok().filter(|count| *count > 0)?;
    Some(Reply::parse(&line).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_shows_the_vm_that_it_has() {
    let scene = Scene::new();
    let server = scene.server().await;
    let limit = memory::limit(&server.checkpointer.read().await.vm, false, false);
    let status = client::status(&scene.runtime()).await.unwrap();
    assert_eq!((status.pid, status.busy), (std::process::id(), false));
    assert!(status.hydration.is_none());
    let (shown, file) = (status.vm.unwrap(), scene.runtime().vm().unwrap());
    assert_eq!((shown.name, shown.store), (file.name, file.store));
    assert_eq!((shown.instance, shown.accelerator), (file.instance, file.accelerator));
    assert_eq!((shown.qemu_pid, shown.qemu_version.as_str()), (scene.body.pid(), "10.0.2"));
    assert_eq!(shown.memory_limit_bytes, limit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_takes_checkpoints_and_shows_how_far_they_are() {
    let mut scene = Scene::new();
    scene.server().await;
    let seen = Mutex::new(Vec::new());
    let note = |update: &Update| seen.lock().unwrap().push(update.phase.clone());
    let runtime = scene.runtime();
    let first = client::checkpoint(&runtime, Choice::default(), note).await.unwrap();
    assert_eq!(client::decode::<Outcome>(first).unwrap().kind, Kind::Full);
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.first().map(String::as_str), Some("prepare"), "{seen:?}");
    assert!(seen.contains(&"pre-copy".to_owned()), "{seen:?}");
    scene.body.write(&[3]);
    let second = take(scene.runtime()).await.unwrap();
    assert_eq!((second.kind, second.bytes_changed), (Kind::Incremental, 4096));
}

/// What needs the VM is refused while a checkpoint has it; the status comes at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_is_busy_refuses_all_but_its_status() {
    let scene = Scene::new();
    scene.server().await;
    let mut gate = scene.qemu.hold("stop");
    let taking = begun(&scene, &mut gate).await;
    let runtime = scene.runtime();
    let status = client::status(&runtime).await.unwrap();
    assert!(status.busy && status.vm.is_none());
    let adopt = Request::Adopt { qemu: None };
    let (checkpoint, pause, adoption) = tokio::join!(
        take(scene.runtime()),
        client::bare_pause(&runtime),
        client::ask(&runtime, &adopt, |_| ()),
    );
    for refusal in [checkpoint.err(), pause.err(), adoption.err()] {
        let refusal = refusal.expect("it is busy");
        assert_eq!((refusal.class(), refusal.phase()), (Class::Refused, Phase::Ask));
        assert!(refusal.to_string().contains("under way"), "{refusal}");
    }
    gate.open();
    assert_eq!(taking.await.unwrap().unwrap().kind, Kind::Full);
    assert!(!client::status(&runtime).await.unwrap().busy);
}

/// Who only looks holds the VM for a moment: that is waited for, and is no reason to be busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_makes_a_request_wait_for_those_who_look() {
    let scene = Scene::new();
    let server = scene.server().await;
    let looking = Arc::clone(&server.checkpointer).read_owned().await;
    assert!(!server.status().busy);
    let (progress, _) = mpsc::channel(1);
    let mut answer = pin!(server.answer("\"bare_pause\"", progress));
    assert!(tokio::time::timeout(SHORT, &mut answer).await.is_err(), "the VM is not free");
    assert_eq!(scene.qemu.heard("stop"), 0);
    drop(looking);
    let pause: BarePause = client::decode(answer.await.unwrap()).unwrap();
    assert!(pause.pause_ms > 0.0);
    assert_eq!((scene.qemu.heard("stop"), scene.qemu.heard("cont")), (1, 1));
    assert!(scene.qemu.with(|state| state.is_running()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_completes_what_a_client_that_vanished_has_asked() {
    let scene = Scene::new();
    let server = scene.server().await;
    let mut gate = scene.qemu.hold("stop");
    let taking = begun(&scene, &mut gate).await;
    taking.abort();
    assert!(taking.await.unwrap_err().is_cancelled());
    gate.open();
    // The checkpoint holds it until it has ended.
    drop(server.checkpointer.read().await);
    let next = take(scene.runtime()).await.unwrap();
    assert_eq!(next.parent.map(|id| id.0), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_reports_class_and_phase_of_a_failure_and_takes_the_next() {
    let scene = Scene::new();
    scene.server().await;
    for (command, phase) in [("stop", Phase::PreCopy), ("xen-save-devices-state", Phase::Pause)] {
        scene.qemu.refuse(command, "scripted refusal");
        let failed = take(scene.runtime()).await.unwrap_err();
        assert_eq!((failed.class(), failed.phase()), (Class::Failed, phase), "{failed}");
        assert!(failed.explain().contains("scripted refusal"), "{failed}");
        assert!(scene.qemu.with(|state| state.is_running()));
    }
    assert_eq!(take(scene.runtime()).await.unwrap().kind, Kind::Full);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_adopts_no_vm_that_is_managed_already() {
    let scene = Scene::new();
    scene.server().await;
    let adopt = Request::Adopt { qemu: None };
    let refusal = client::ask(&scene.runtime(), &adopt, |_| ()).await.unwrap_err();
    assert_eq!((refusal.class(), refusal.phase()), (Class::Refused, Phase::Plan), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_refuses_what_is_no_request_and_serves_on() {
    let scene = Scene::new();
    scene.server().await;
    let runtime = scene.runtime();
    for garbage in [
        &b"\n"[..],
        b"{\"checkpoint\":7}\n",
        b"{\"checkpoint\":{\"force\":true}}\n",
        b"{\"status\":null,\"more\":1}\n",
        b"\"stat\0us\"\n",
        b"[[[[\n",
    ] {
        let words = String::from_utf8_lossy(garbage);
        let Some(Reply::Failed(failure)) = tell(&runtime, garbage).await else { panic!("{words}") };
        let failure = EngineError::from(failure);
        assert_eq!((failure.class(), failure.phase()), (Class::Failed, Phase::Ask), "{words}");
    }
    assert!(tell(&runtime, b"\xff\xfe\n").await.is_none(), "no text");
    assert!(matches!(tell(&runtime, b"\"status\"\n\"bare_pause\"\n").await, Some(Reply::Done(_))));
    assert_eq!(scene.qemu.heard("stop"), 0, "one request a connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_reads_no_more_of_a_request_than_its_limit() {
    let scene = Scene::new();
    scene.server().await;
    let long = vec![b' '; MAX_REQUEST as usize];
    let cut = [&long, &b"\"status\"\n"[..]].concat();
    // Hung up, or refused as the spaces that it begins with.
    assert!(!matches!(tell(&scene.runtime(), &cut).await, Some(Reply::Done(_))));
    let whole = [&long[9..], &b"\"status\"\n"[..]].concat();
    assert!(matches!(tell(&scene.runtime(), &whole).await, Some(Reply::Done(_))));
}

/// Its end is the end of the line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_answers_one_who_has_said_all() {
    let scene = Scene::new();
    scene.server().await;
    let mut stream = UnixStream::connect(scene.runtime().control()).await.unwrap();
    stream.write_all(b"\"status\"").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.unwrap();
    assert!(matches!(Reply::parse(&line), Ok(Reply::Done(_))), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_ends_with_its_qemu() {
    let scene = Scene::new();
    let server = scene.server().await;
    let mut ended = pin!(server.vm_ended());
    assert!(waits!(ended), "it runs");
    scene.qemu.end();
    ended.await;
}

/// The end of the QEMU that the VM has left is not the VM's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_continues_with_the_qemu_that_an_adoption_made() {
    let (scene, other) = (Scene::new(), Scene::new());
    let server = scene.server().await;
    let mut ended = pin!(server.vm_ended());
    assert!(waits!(ended));
    server.checkpointer.write().await.vm.qmp = other.vm().await.qmp;
    scene.qemu.end();
    assert!(tokio::time::timeout(SHORT, &mut ended).await.is_err(), "the other runs");
    other.qemu.end();
    ended.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_ends_waits_for_a_checkpoint_under_way() {
    let scene = Scene::new();
    let server = scene.server().await;
    let mut gate = scene.qemu.hold("cont");
    let taking = begun(&scene, &mut gate).await;
    let mut ending = pin!(server.end());
    assert!(waits!(ending), "the guest would be left stopped");
    gate.open();
    ending.await;
    assert!(scene.qemu.with(|state| state.is_running()));
    assert_eq!(taking.await.unwrap().unwrap().kind, Kind::Full);
}

/// While its QEMU lives another writer would be one of a second VM.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_releases_the_writer_epoch_only_when_its_qemu_has_ended() {
    let mut scene = Scene::new();
    let server = scene.server().await;
    take(scene.runtime()).await.unwrap();
    let file = scene.runtime().vm().unwrap();
    let is_released = async || {
        let repository = stores::open_existing(&file.store).await.unwrap();
        repository.writers(&file.name).await.unwrap().pop().unwrap().released
    };
    server.end().await;
    assert!(!is_released().await);
    scene.qemu.end();
    scene.body.kill();
    server.checkpointer.read().await.vm.qmp.closed().await;
    server.end().await;
    assert!(is_released().await);
}

#[tokio::test]
async fn control_socket_of_a_dead_helper_is_replaced_by_one_for_the_owner_alone() {
    let place = crate::scene::Place::new();
    let path = place.runtime.control();
    drop(listen(&place.runtime).unwrap());
    assert!(UnixStream::connect(&path).await.is_err(), "a dead one's");
    let _listener = listen(&place.runtime).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    UnixStream::connect(&path).await.unwrap();
}

#[tokio::test]
async fn control_request_is_limited_in_length_and_time() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    theirs.write_all(b"half a li").await.unwrap();
    assert!(request(ours, SHORT).await.is_err(), "one who stays and says nothing");
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    theirs.write_all(&vec![b'x'; 1 << 19]).await.unwrap();
    assert_eq!(request(ours, CLIENT).await.unwrap().len() as u64, MAX_REQUEST);
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    theirs.write_all(b"\xff\xfe\n").await.unwrap();
    assert!(request(ours, CLIENT).await.is_err(), "no text");
}

#[tokio::test]
async fn control_client_that_does_not_read_holds_nothing_up() {
    let (ours, _theirs) = tokio::io::duplex(16);
    let mut client = Client { stream: Some(ours), timeout: SHORT };
    for _ in 0..10_000 {
        client.send(&Reply::Done(json!("x".repeat(100)))).await.unwrap();
    }
    assert!(client.stream.is_none(), "it is waited for again and again");
}

/// More than are served at once, none of which asks anything.
#[tokio::test]
async fn control_connections_are_bounded_and_the_rest_wait() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("s");
    let (seen, mut all) = mpsc::channel(CONNECTIONS * 2);
    let listener = UnixListener::bind(&path).unwrap();
    let serving = tokio::spawn(serve(listener, move |mut stream| {
        let seen = seen.clone();
        async move {
            seen.send(()).await?;
            stream.read_u8().await?;
            Ok(())
        }
    }));
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS + 20 {
        clients.push(UnixStream::connect(&path).await.unwrap());
    }
    for _ in 0..CONNECTIONS {
        all.recv().await.unwrap();
    }
    assert!(
        tokio::time::timeout(Duration::from_millis(50), all.recv()).await.is_err(),
        "more than {CONNECTIONS} are served"
    );
    clients.drain(..20);
    for _ in 0..20 {
        all.recv().await.unwrap();
    }
    serving.abort();
}
