//! The guard against a scripted peer: whatever happens to it, `cont` goes out exactly when the
//! guest still needs it.

use super::*;
use crate::qmp::test::{Peer, pair};

/// Answers everything (status as given) until the connection ends; returns the command names seen.
async fn serve(mut peer: Peer, status: &str, refuse_cont: bool) -> Vec<String> {
    let (mut seen, mut status) = (Vec::new(), status);
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        if name == "stop" {
            status = "paused";
        }
        if name == "cont" && refuse_cont && !seen.contains(&name) {
            peer.send(
                &json!({"error": {"class": "GenericError", "desc": "busy"}, "id": id}).to_string(),
            )
            .await;
        } else {
            peer.answer(id, json!({ "status": status })).await;
        }
        seen.push(name);
    }
    seen
}

#[tokio::test]
async fn resume_sends_one_cont_and_nothing_between() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", false));
    let paused = Paused::stop(&qmp).await.expect("stop");
    assert_eq!(paused.before(), RunState::Running);
    paused.resume().await.expect("cont");
    drop(qmp);
    assert_eq!(
        peer.await.expect("peer"),
        [
            "query-status",
            "object-add",
            "query-status",
            "stop",
            "query-status",
            "cont",
            "object-del"
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_resumes() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", false));
    drop(Paused::stop(&qmp).await.expect("stop"));
    drop(qmp);
    assert_eq!(peer.await.expect("peer")[3..], ["stop", "cont", "object-del"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_cont_is_sent_again_by_the_drop() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", true));
    let error = Paused::stop(&qmp).await.expect("stop").resume().await;
    assert!(error.is_err());
    drop(qmp);
    assert_eq!(
        peer.await.expect("peer")[3..],
        ["stop", "query-status", "cont", "query-status", "cont", "object-del"]
    );
}

#[tokio::test]
async fn held_pause_is_not_resumed_and_fails_if_it_was_disturbed() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", false));
    Paused::stop(&qmp).await.expect("stop").hold().await.expect("held");
    drop(qmp);
    let seen = peer.await.expect("peer");
    assert_eq!(seen.last().map(String::as_str), Some("object-del"), "no later helper resumes it");
    assert!(!seen.contains(&"cont".to_owned()), "{seen:?}");

    let (qmp, mut peer, _directory) = pair().await;
    let script = async {
        // Whatever was ordered, the guest runs.
        while let Some((_, id)) = peer.command().await {
            peer.answer(id, json!({ "status": "running" })).await;
        }
    };
    let hold = async { Paused::stop(&qmp).await.expect("stop").hold().await };
    let held = tokio::select! { held = hold => held, () = script => unreachable!("it continues") };
    assert!(matches!(held, Err(PauseError::Disturbed { .. })), "{held:?}");
}

#[tokio::test]
async fn a_guest_stopped_by_its_owner_stays_stopped() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "paused", false));
    let paused = Paused::stop(&qmp).await.expect("stop");
    assert_eq!(paused.before(), RunState::Paused);
    paused.resume().await.expect("resume");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["query-status", "query-status"]);
}

/// A monitor on a thread and a runtime of its own, so that a blocked client cannot stop it. It
/// answers everything.
fn serve_elsewhere(
    path: std::path::PathBuf,
    hold_stop: bool,
) -> std::thread::JoinHandle<Vec<String>> {
    let (bound, wait) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::bind(&path).expect("bind");
            bound.send(()).expect("bound");
            let mut peer = Peer::accept(&listener).await;
            let mut seen = Vec::new();
            while let Some((command, id)) = peer.command().await {
                seen.push(command["execute"].as_str().expect("name").to_owned());
                if !(hold_stop && command["execute"] == "stop") {
                    peer.answer(id, json!({ "status": "running" })).await;
                }
            }
            seen
        })
    });
    wait.recv().expect("bound");
    thread
}

#[tokio::test]
async fn a_cancelled_stop_resumes() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let peer = serve_elsewhere(path.clone(), true);
    let qmp = Qmp::connect(&path, Duration::from_secs(5)).await.expect("connect");
    let cancelled = tokio::time::timeout(Duration::from_millis(100), Paused::stop(&qmp)).await;
    assert!(cancelled.is_err());
    drop(qmp);
    let seen = tokio::task::spawn_blocking(|| peer.join().expect("peer")).await.expect("join");
    assert_eq!(seen[3..], ["stop", "cont", "object-del"]);
}

#[test]
fn drop_works_and_waits_after_the_runtime_is_gone() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let peer = serve_elsewhere(path.clone(), false);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let paused = runtime.block_on(async {
        let qmp = Qmp::connect(&path, Duration::from_secs(5)).await.expect("connect");
        Paused::stop(&qmp).await.expect("stop")
    });
    // Its reader task ran on this thread and will not run again.
    let start = Instant::now();
    drop(paused);
    assert!(start.elapsed() < LAST_TIMEOUT, "the reply was not seen");
    drop(runtime);
    assert_eq!(peer.join().expect("peer")[3..], ["stop", "cont", "object-del"]);
}

/// Answers everything; `cont` is refused while a switch-over has not completed, until it is
/// cancelled.
async fn serve_switchover(mut peer: Peer) -> Vec<String> {
    let mut seen = Vec::new();
    let mut status = "finish-migrate";
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        match name.as_str() {
            "cont" if status == "finish-migrate" => {
                peer.send(
                    &json!({"error": {"class": "GenericError", "desc": "not finalized"}, "id": id})
                        .to_string(),
                )
                .await;
            }
            "migrate_cancel" => {
                status = "running";
                peer.answer(id, json!({})).await;
            }
            _ => peer.answer(id, json!({ "status": status })).await,
        }
        seen.push(name);
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_switchover_is_cancelled_and_continued() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", false));
    let before = Paused::announce_switchover(&qmp).await.expect("announce");
    drop(Paused::by_switchover(&qmp, before));
    drop(qmp);
    assert_eq!(
        peer.await.expect("peer"),
        ["query-status", "object-add", "migrate_cancel", "cont", "object-del"]
    );
}

#[tokio::test]
async fn a_switchover_that_has_not_completed_is_cancelled_to_resume() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve_switchover(peer));
    Paused::by_switchover(&qmp, RunState::Running).resume().await.expect("resume");
    drop(qmp);
    assert_eq!(
        peer.await.expect("peer"),
        ["query-status", "cont", "migrate_cancel", "query-status", "query-status", "object-del"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_stood_before_the_switchover_is_not_continued() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "paused", false));
    let before = Paused::announce_switchover(&qmp).await.expect("announce");
    drop(Paused::by_switchover(&qmp, before));
    drop(qmp);
    assert_eq!(peer.await.expect("peer")[..2], ["query-status", "migrate_cancel"]);
}

/// One step of a scripted monitor: what `query-status` says from here on, and an event that comes
/// right after this command's answer.
type Script = &'static [(&'static str, &'static str, &'static [&'static str])];

/// Simulates a VM that another client changes: `script` has (command, the run state after it, the
/// events after it).
async fn play(mut peer: Peer, mut state: &'static str, script: Script) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        let step = script.iter().find(|(at, ..)| *at == name);
        if step.is_some_and(|(_, after, _)| *after == "(no answer)") {
            seen.push(name);
            continue;
        }
        if name == "stop" && state == "running" {
            state = "paused";
            peer.send(&json!({"event": "STOP"}).to_string()).await;
        }
        if name == "cont" && state != "running" {
            state = "running";
            peer.send(&json!({"event": "RESUME"}).to_string()).await;
        }
        peer.answer(id, json!({ "status": state })).await;
        if let Some((_, after, events)) = step {
            state = after;
            for event in *events {
                peer.send(&json!({ "event": event }).to_string()).await;
            }
        }
        seen.push(name);
    }
    seen
}

#[tokio::test]
async fn pause_changed_by_another_client_fails_and_keeps_the_change() {
    // What happens right after our `stop`; whether we let the guest run after that.
    let table: [(Script, bool); 5] = [
        (&[("stop", "running", &["RESUME"])], false),
        (&[("stop", "paused", &["RESUME", "STOP"])], false),
        (&[("stop", "prelaunch", &["RESET"])], true),
        (&[("stop", "postmigrate", &[])], false),
        (&[("stop", "shutdown", &["RESET", "SHUTDOWN"])], false),
    ];
    for (script, conts) in table {
        let (qmp, peer, _directory) = pair().await;
        let peer = tokio::spawn(play(peer, "running", script));
        let ended = Paused::stop(&qmp).await.expect("stop").resume().await;
        assert!(matches!(ended, Err(PauseError::Disturbed { .. })), "{script:?}: {ended:?}");
        drop(qmp);
        let seen = peer.await.expect("peer");
        assert_eq!(seen.contains(&"cont".to_owned()), conts, "{script:?}: {seen:?}");
        assert_eq!(seen.last().map(String::as_str), Some("object-del"), "{script:?}: {seen:?}");
    }
}

/// The owner's order came between our question and our own.
#[tokio::test]
async fn pause_of_a_guest_that_its_owner_stops_first_is_no_pause() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(play(peer, "running", &[("object-add", "paused", &["STOP"])]));
    let paused = Paused::stop(&qmp).await.expect("stop");
    assert_eq!(paused.before(), RunState::Paused);
    paused.resume().await.expect("nothing to do");
    drop(qmp);
    assert!(!peer.await.expect("peer").contains(&"cont".to_owned()));
}

#[tokio::test]
async fn pause_refuses_a_state_without_a_guest() {
    for state in ["inmigrate", "restore-vm", "postmigrate", "debug"] {
        let (qmp, peer, _directory) = pair().await;
        let peer = tokio::spawn(play(peer, state, &[]));
        let error = Paused::stop(&qmp).await.map(drop).expect_err("no guest");
        assert!(matches!(&error, PauseError::NoGuest(no) if no.state == state), "{error}");
        drop(qmp);
        assert_eq!(peer.await.expect("peer"), ["query-status"]);
    }
}

/// QEMU hangs in the middle: the guest is let run when its time is over, not when the command is
/// given up.
#[tokio::test]
async fn pause_limit_lets_the_guest_run_while_a_command_hangs() {
    let limit = Duration::from_millis(200);
    for hangs in ["stop", "xen-save-devices-state"] {
        let (qmp, peer, _directory) = pair().await;
        let script: Script = match hangs {
            "stop" => &[("stop", "(no answer)", &[])],
            _ => &[("xen-save-devices-state", "(no answer)", &[])],
        };
        let peer = tokio::spawn(play(peer, "running", script));
        let begun = Instant::now();
        let work = async {
            let paused = Paused::stop_within(&qmp, limit).await?;
            let saved = paused
                .within("the devices' state", qmp.execute_json("xen-save-devices-state", json!({})))
                .await;
            let resumed = paused.resume().await;
            saved.map(drop).and(resumed.map(drop))
        };
        let error = work.await.expect_err("too long");
        assert!(matches!(error, PauseError::TooLong { .. }), "{hangs}: {error}");
        assert!(begun.elapsed() < limit * 10, "{hangs}: {:?}", begun.elapsed());
        drop(qmp);
        let seen = peer.await.expect("peer");
        let at = seen.iter().position(|name| name == hangs).expect("it was sent");
        assert_eq!(seen[at + 1..], ["cont", "object-del"], "{hangs}");
    }
}
