//! The local migration against scripted peers: the commands that each side gets, their order, and
//! the return to the source from every point.

use std::collections::VecDeque;

use error_class::{Class, Classified};

use super::*;
use crate::qmp::test::{Peer, pair};

/// Answers every command until the connection ends; `query-status` and `query-migrate` by the
/// script's turns, the last of which stays. Its settings are those of a move, with a limit that was
/// raised. Returns the commands, less the questions.
async fn serve(
    peer: Peer,
    runs: VecDeque<&'static str>,
    moves: VecDeque<&'static str>,
) -> Vec<String> {
    serve_at(BANDWIDTH, peer, runs, moves).await
}

async fn serve_at(
    bandwidth: u64,
    mut peer: Peer,
    mut runs: VecDeque<&'static str>,
    mut moves: VecDeque<&'static str>,
) -> Vec<String> {
    let mut seen = Vec::new();
    let turn = |turns: &mut VecDeque<&'static str>| {
        if turns.len() > 1 { turns.pop_front() } else { turns.front().copied() }
    };
    while let Some((command, id)) = peer.command().await {
        let name = command["execute"].as_str().expect("name").to_owned();
        match name.as_str() {
            "query-status" => {
                peer.answer(id, json!({ "status": turn(&mut runs).expect("a state") })).await
            }
            "query-migrate" => {
                peer.answer(id, json!({ "status": turn(&mut moves).expect("a status") })).await
            }
            "query-migrate-parameters" => {
                let parameters = json!({
                    "max-bandwidth": bandwidth, "downtime-limit": 80, "block-bitmap-mapping": [1],
                });
                peer.answer(id, parameters).await;
            }
            "query-migrate-capabilities" => {
                let on = |name: &str| json!({ "capability": name, "state": true });
                let off = |name: &str| json!({ "capability": name, "state": false });
                peer.answer(
                    id,
                    json!([
                        off("xbzrle"),
                        on("events"),
                        on("pause-before-switchover"),
                        off("return-path")
                    ]),
                )
                .await;
            }
            _ => {
                peer.answer(id, json!({})).await;
                seen.push(if command["arguments"].is_null() {
                    name
                } else {
                    format!("{name} {}", command["arguments"])
                });
            }
        }
    }
    seen
}

fn turns(words: &[&'static str]) -> VecDeque<&'static str> {
    words.iter().copied().collect()
}

#[tokio::test]
async fn cont_resumes_the_source_of_a_completed_move() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, turns(&["postmigrate", "running"]), turns(&["completed"])));
    resume_source(&qmp, None).await.expect("source resumed");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["cont"]);
}

#[tokio::test]
async fn a_move_under_way_is_cancelled_and_the_guest_awaited() {
    let (qmp, peer, _directory) = pair().await;
    let states = turns(&["finish-migrate", "finish-migrate", "running"]);
    let peer =
        tokio::spawn(serve(peer, states, turns(&["pre-switchover", "cancelling", "cancelled"])));
    resume_source(&qmp, None).await.expect("source resumed");
    drop(qmp);
    assert_eq!(peer.await.expect("peer"), ["migrate_cancel"], "QEMU lets the guest run by itself");
}

#[tokio::test]
async fn settings_go_back_to_what_was_found() {
    let (qmp, peer, _directory) = pair().await;
    let peer = tokio::spawn(serve(peer, turns(&["running"]), turns(&["none"])));
    let mut found = Found::read(&qmp).await.expect("read");
    moved(&found).put_back(&qmp).await.expect("nothing to do");
    let json = serde_json::to_value(&found).expect("encoded");
    let mut changed = json.clone();
    changed["capabilities"]["events"] = false.into();
    changed["capabilities"]["xbzrle"] = true.into();
    changed["parameters"]["max-bandwidth"] = 7.into();
    changed["parameters"]["downtime-limit"] = 300.into();
    // An older one had no bitmaps mapped: QEMU cannot forget that, so it maps none.
    changed["parameters"].as_object_mut().expect("a map").remove("block-bitmap-mapping");
    found = serde_json::from_value(changed).expect("decoded");
    moved(&found).put_back(&qmp).await.expect("put back");
    drop(qmp);
    let expected = [
        r#"migrate-set-parameters {"block-bitmap-mapping":[],"downtime-limit":300,"max-bandwidth":7}"#,
        r#"migrate-set-capabilities {"capabilities":[{"capability":"events","state":false},{"capability":"xbzrle","state":true}]}"#,
    ];
    assert_eq!(peer.await.expect("peer"), expected);
}

#[tokio::test]
async fn source_that_ends_is_not_reported_as_one_that_fails() {
    let (qmp, peer, _directory) = pair().await;
    drop(peer);
    assert!(matches!(resume_source(&qmp, None).await, Err(MigrationError::SourceEnded)));
}

#[tokio::test]
async fn a_running_migration_is_not_disturbed() {
    let (source, peer, _one) = pair().await;
    let (destination, other, _two) = pair().await;
    let peer = tokio::spawn(serve(peer, turns(&["running"]), turns(&["active"])));
    let other = tokio::spawn(serve(other, turns(&["inmigrate"]), turns(&["none"])));
    let begun = LocalMigration::begin(
        &source,
        &destination,
        &Found::default(),
        &BitmapMap::default(),
        Path::new("/s"),
    )
    .await;
    assert!(matches!(begun, Err(MigrationError::Busy { status: MigrationStatus::Active })));
    drop((source, destination));
    assert!(peer.await.expect("peer").is_empty() && other.await.expect("peer").is_empty());
}

#[tokio::test]
async fn a_qemu_without_the_capability_is_refused_before_it_is_changed() {
    let (source, peer, _one) = pair().await;
    let (destination, other, _two) = pair().await;
    let peer = tokio::spawn(serve(peer, turns(&["running"]), turns(&["none"])));
    let other = tokio::spawn(serve(other, turns(&["inmigrate"]), turns(&["none"])));
    let found = Found::read(&source).await.expect("read");
    let begun = LocalMigration::begin(
        &source,
        &destination,
        &found,
        &BitmapMap::default(),
        Path::new("/s"),
    )
    .await;
    // The scripted one has no late-block-activate.
    assert!(
        matches!(&begun, Err(MigrationError::Missing { name, .. }) if name == "late-block-activate"),
        "{begun:?}"
    );
    drop((source, destination));
    assert!(peer.await.expect("peer").is_empty() && other.await.expect("peer").is_empty());
}

/// Settings, and a migration, that an owner has made since a helper was killed.
#[tokio::test]
async fn source_that_its_owner_has_migrated_since_is_left_alone() {
    for (runs, moves) in [("running", "active"), ("postmigrate", "completed")] {
        let (qmp, peer, _directory) = pair().await;
        let peer = tokio::spawn(serve_at(77, peer, turns(&[runs]), turns(&[moves])));
        let mut found =
            serde_json::to_value(Found::read(&qmp).await.expect("read")).expect("encoded");
        found["parameters"]["max-bandwidth"] = 7.into();
        let found: Found = serde_json::from_value(found).expect("decoded");
        let resumed = resume_source(&qmp, Some(&found)).await.expect_err("not ours");
        assert_eq!(resumed.class(), Class::Refused, "{resumed}");
        drop(qmp);
        assert!(peer.await.expect("peer").is_empty(), "{moves}");
    }
}
