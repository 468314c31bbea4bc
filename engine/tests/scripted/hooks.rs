//! What is done around a restore: hooks, the guest's clock, the announcement on the network.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::restore::{Hooks, Request};
use tokio::sync::oneshot;
use vm::error::Class;

use crate::restore::{Saved, files};
use crate::scene::{Scene, noise};

impl Saved {
    /// A program of the operator's, which was there before the restore.
    fn hook(&mut self, name: &str, words: &str) -> PathBuf {
        let path = self.scene.path(name);
        std::fs::write(&path, format!("#!/bin/sh\n{words}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        self.before = files(self.scene.directory.path());
        path
    }

    fn hooked(&self, before: Option<PathBuf>, after: Option<PathBuf>) -> Request {
        let hooks = Hooks { before, after, timeout: Duration::from_secs(30) };
        Request { hooks, ..self.request() }
    }

    async fn assert_refused(&mut self, request: Request, words: &[&str]) {
        let error = self.restore_as(request).await.err().unwrap_or_else(|| panic!("no {words:?}"));
        self.assert_undone(error, Class::Refused, words);
        assert!(self.player.started_already().is_none(), "{words:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_before_anything_is_made_and_after_the_guest_runs() {
    let mut saved = Saved::new().await;
    let (before, after) = (saved.scene.path("before.env"), saved.scene.path("after.env"));
    let new = saved.scene.path("new");
    let words = format!("env > {}; ! [ -e {} ]", before.display(), new.display());
    let first = saved.hook("first", &words);
    let second =
        saved.hook("second", &format!("env > {}; [ -e {} ]", after.display(), new.display()));
    let restored = saved.restore_as(saved.hooked(Some(first), Some(second))).await.unwrap();
    let facts = |path: &Path| -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        let mut facts: Vec<String> = text.lines().map(str::to_owned).collect();
        facts.retain(|fact| {
            fact.starts_with("STILLPOINT_") && !fact.starts_with("STILLPOINT_TEST_")
        });
        facts.sort();
        facts
    };
    let both = |when: &str| {
        let scene = &saved.scene;
        vec![
            "STILLPOINT_CHECKPOINT=vm@1".to_owned(),
            format!("STILLPOINT_DIR={}", new.display()),
            format!("STILLPOINT_HOOK={when}"),
            "STILLPOINT_IS_COPY=0".to_owned(),
            "STILLPOINT_NAME=vm".to_owned(),
            format!("STILLPOINT_RUNTIME_DIR={}", scene.path("run").display()),
            format!("STILLPOINT_STORE={}", scene.file.store),
        ]
    };
    assert_eq!(facts(&before), both("before"));
    assert!(!after.exists(), "no helper serves the VM yet");
    let (vm, afterwards) = (restored.vm, restored.afterwards);
    assert_eq!(afterwards.complete().await, [""; 0]);
    let mut wanted = both("after");
    wanted.push(format!("STILLPOINT_QEMU_PID={}", vm.pid));
    wanted.push("STILLPOINT_RUN_STATE=running".to_owned());
    wanted.sort();
    assert_eq!(facts(&after), wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hook_before_that_fails_refuses_the_restore() {
    let mut saved = Saved::new().await;
    let hook = saved.hook("hook", "echo 'no bridge' >&2; exit 3");
    let request = saved.hooked(Some(hook), None);
    saved.assert_refused(request, &["no bridge", "exit status: 3"]).await;
    let hook = saved.hook("hook", "echo waiting; exec sleep 1000");
    let mut request = saved.hooked(Some(hook), None);
    request.hooks.timeout = Duration::from_millis(300);
    saved.assert_refused(request, &["did not end within 300ms"]).await;
    let missing = saved.scene.path("missing");
    for request in [saved.hooked(Some(missing.clone()), None), saved.hooked(None, Some(missing))] {
        saved.assert_refused(request, &["no program", "missing"]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hook_after_that_fails_is_a_note_and_the_vm_stays() {
    let mut saved = Saved::new().await;
    let hook = saved.hook("hook", "echo 'no route'; exit 1");
    let restored = saved.restore_as(saved.hooked(None, Some(hook))).await.unwrap();
    let (vm, notes) = (restored.vm, restored.afterwards.complete().await);
    assert!(notes.len() == 1 && notes[0].contains("no route"), "{notes:?}");
    assert!(vm::process::started(vm.pid).is_some(), "it has ended");
    let started = saved.player.started().await;
    assert!(started.qemu.with(|state| state.is_running()));
}

/// Two VMs that share an address must not both announce it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announcement_is_of_the_vm_and_not_of_its_copy() {
    for (name, announced) in [(None, 1), (Some("copy".parse().unwrap()), 0)] {
        let mut saved = Saved::new().await;
        let request = Request { new_name: name, ..saved.request() };
        let restored = saved.restore_as(request).await.unwrap();
        let started = saved.player.started().await;
        assert_eq!(started.qemu.heard("announce-self"), announced);
        assert!(started.qemu.heard("cont") == 1, "{:?}", started.qemu.orders());
        drop(restored);
    }
}

/// With a guest agent's port, at which `vm.qga` is the socket.
async fn with_agent() -> Saved {
    let mut scene = Scene::read_only(noise(4096));
    let words = [
        "-chardev",
        "backend=socket,id=qga0,path=vm.qga,server=on,wait=off",
        "-device",
        "virtio-serial-pci,id=serial",
        "-device",
        "virtserialport,id=agent,chardev=qga0,name=org.qemu.guest_agent.0",
    ];
    scene.file.arguments.extend(words.map(str::to_owned));
    scene.qemu.with(|state| {
        let path = |id| format!("/machine/peripheral/{id}");
        state.devices.push((path("serial"), "virtio-serial-pci".into()));
        state.devices.push((path("agent"), "virtserialport".into()));
    });
    scene.runtime.save_vm(&scene.file).unwrap();
    Saved::of(scene).await
}

/// In the next QEMU the guest has opened the port, and its agent answers so to what follows the
/// synchronization. Returns what it was asked; none if no client came.
fn agent(saved: &Saved, answer: &'static str) -> oneshot::Receiver<String> {
    let socket = saved.scene.path("new/vm.qga");
    let (asked, request) = oneshot::channel();
    saved.player.prepare(move |qemu| {
        qemu.with(|state| state.chardevs = vec![("qga0".to_owned(), true)]);
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            lines.read_exact(&mut [0]).unwrap();
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            let sync: serde_json::Value = serde_json::from_str(&line).unwrap();
            let id = &sync["arguments"]["id"];
            stream.write_all(b"\xff").unwrap();
            writeln!(stream, "{{\"return\": {id}}}").unwrap();
            line.clear();
            lines.read_line(&mut line).unwrap();
            writeln!(stream, "{answer}").unwrap();
            let _ = asked.send(line);
        });
    });
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clock_of_a_guest_with_an_agent_is_set() {
    let saved = with_agent().await;
    let asked = agent(&saved, r#"{"return": {}}"#);
    let restored = saved.restore_as(saved.request()).await.unwrap();
    let notes = restored.afterwards.complete().await;
    assert!(notes.len() == 1 && notes[0].contains("has set the guest's clock"), "{notes:?}");
    assert!(asked.await.unwrap().contains("guest-set-time"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clock_that_the_agent_cannot_set_is_a_note() {
    let saved = with_agent().await;
    let _asked = agent(&saved, r#"{"error": {"class": "x", "desc": "hwclock failed"}}"#);
    let restored = saved.restore_as(saved.request()).await.unwrap();
    let notes = restored.afterwards.complete().await;
    assert!(notes.len() == 1 && notes[0].contains("as of the checkpoint"), "{notes:?}");
    assert!(notes[0].contains("hwclock failed"), "{notes:?}");
    // No program in the guest has opened the port: it is not waited for.
    let saved = with_agent().await;
    saved.player.prepare(|qemu| {
        qemu.with(|state| state.chardevs = vec![("qga0".to_owned(), false)]);
    });
    let restored = saved.restore_as(saved.request()).await.unwrap();
    let notes = restored.afterwards.complete().await;
    assert!(notes.len() == 1 && notes[0].contains("no guest agent"), "{notes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clock_is_left_alone_where_it_is_asked_for_or_the_guest_is_stopped() {
    for (keep_clock, paused) in [(true, false), (false, true)] {
        let saved = with_agent().await;
        let mut asked = agent(&saved, r#"{"return": {}}"#);
        let request = Request { keep_clock, paused, ..saved.request() };
        let restored = saved.restore_as(request).await.unwrap();
        assert_eq!(restored.afterwards.complete().await, [""; 0]);
        assert!(asked.try_recv().is_err(), "{keep_clock} {paused}");
    }
}
