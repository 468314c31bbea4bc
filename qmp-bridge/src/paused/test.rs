//! The guard against a scripted peer: whatever happens to it, `cont` goes out exactly when it is owed.

use super::*;
use crate::qmp::test::{Peer, pair};

/// Answers everything (status as given) until the connection ends; returns the command names seen.
async fn serve(mut peer: Peer, status: &str, refuse_cont: bool) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        if name == "cont" && refuse_cont && !seen.contains(&name) {
            peer.send(&json!({"error": {"class": "GenericError", "desc": "busy"}, "id": id}).to_string()).await;
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
    assert!(paused.guest_ran());
    paused.resume().await.expect("cont");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["query-status", "object-add", "stop", "cont", "object-del"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_resumes() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", false));
    drop(Paused::stop(&qmp).await.expect("stop"));
    drop(qmp);
    assert_eq!(peer.await.expect("peer")[2..], ["stop", "cont", "object-del"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_cont_is_sent_again_by_the_drop() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "running", true));
    let error = Paused::stop(&qmp).await.expect("stop").resume().await;
    assert!(error.is_err());
    drop(qmp);
    assert_eq!(peer.await.expect("peer")[2..], ["stop", "cont", "query-status", "cont", "object-del"]);
}

#[tokio::test]
async fn a_guest_stopped_by_its_owner_stays_stopped() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "paused", false));
    let paused = Paused::stop(&qmp).await.expect("stop");
    assert!(!paused.guest_ran());
    paused.resume().await.expect("resume");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["query-status"]);
}

/// A monitor on a thread and a runtime of its own, so that a blocked client cannot stop it. It answers everything.
fn serve_elsewhere(path: std::path::PathBuf, hold_stop: bool) -> std::thread::JoinHandle<Vec<String>> {
    let (bound, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
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
    assert_eq!(seen[2..], ["stop", "cont", "object-del"]);
}

#[test]
fn drop_works_and_waits_after_the_runtime_is_gone() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let peer = serve_elsewhere(path.clone(), false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let paused = runtime.block_on(async {
        let qmp = Qmp::connect(&path, Duration::from_secs(5)).await.expect("connect");
        Paused::stop(&qmp).await.expect("stop")
    });
    // Its reader task ran on this thread and will not run again.
    let start = Instant::now();
    drop(paused);
    assert!(start.elapsed() < LAST_PATIENCE, "the reply was not seen");
    drop(runtime);
    assert_eq!(peer.join().expect("peer")[2..], ["stop", "cont", "object-del"]);
}

/// Answers everything; `cont` is refused while a switch-over has not completed, until it is cancelled.
async fn serve_switchover(mut peer: Peer) -> Vec<String> {
    let mut seen = Vec::new();
    let mut status = "finish-migrate";
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        match name.as_str() {
            "cont" if status == "finish-migrate" => {
                peer.send(&json!({"error": {"class": "GenericError", "desc": "not finalized"}, "id": id}).to_string()).await;
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
    assert!(Paused::announce_switchover(&qmp).await.expect("announce"));
    drop(Paused::by_switchover(&qmp));
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["query-status", "object-add", "migrate_cancel", "cont", "object-del"]);
}

#[tokio::test]
async fn a_switchover_that_has_not_completed_is_cancelled_to_resume() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve_switchover(peer));
    Paused::by_switchover(&qmp).resume().await.expect("resume");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["cont", "migrate_cancel", "query-status", "query-status", "object-del"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_stood_before_the_switchover_is_not_continued() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, "paused", false));
    assert!(!Paused::announce_switchover(&qmp).await.expect("announce"));
    let mut paused = Paused::by_switchover(&qmp);
    paused.switched_over(false, Instant::now());
    drop(paused);
    drop(qmp);
    assert_eq!(peer.await.expect("peer")[..2], ["query-status", "migrate_cancel"]);
}
