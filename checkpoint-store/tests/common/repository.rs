//! What a repository must do on every store, as one suite over a factory of empty stores.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_format::{
    CheckpointId, CheckpointRef, Checksum, ContentDigest, Epoch, PackName, PageCount, RangeSet,
    SpaceName, VmName, WorkingSet,
};
use checkpoint_store::{
    Claim, Fault, FaultRule, FaultyStore, LayerOutcome, Mode, Op, PutOptions, ReaderInfo,
    ReaderRecord, Repository, RepositoryOptions, Store, StoreError, StorePath, Writer,
};

use super::{bytes, noise, path, record};

#[macro_export]
macro_rules! repository_contract {
    ($make:path) => {
        $crate::repository_contract!(@each $make:
            a_store_is_created_once
            a_foreign_directory_is_refused
            a_newer_format_is_refused
            a_checkpoint_exists_after_its_commit_and_not_before
            numbers_are_used_once
            claims_follow_the_rules fencing_replaced_instance_needs_an_order fencing_only_the_dead_one_is_replaced
            writer_that_withdraws_leaves_no_name
            concurrent_takeovers_leave_one_writer
            an_old_writer_can_store_nothing_after_a_claim
            an_old_writers_rename_fails_after_a_claim
            a_partial_made_after_a_claim_is_noticed
            what_was_committed_before_a_claim_stays
            a_killed_writer_leaves_nothing_visible
            an_abort_leaves_nothing
            resume_has_what_an_earlier_try_stored
            resume_fenced_writer_gets_nothing
            resume_behind_a_claims_removal_is_noticed
            a_checkpoint_can_be_removed
            readers_protect_what_they_read_and_all_before_it
            readers_that_do_not_renew_expire
            reader_of_a_checkpoint_that_is_gone_is_refused
            layers_are_stored_once
            abandoned_uploads_are_removed_by_the_next
            an_upload_that_another_makes_useless_ends
            proofs_are_noted_once
            working_set_is_replaced
        );
    };
    (@each $make:path: $($name:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let (store, _alive) = $make().await;
            $crate::common::repository::$name(store).await;
        }
    )*};
}

type Shared = Arc<dyn Store>;

pub(crate) fn vm() -> VmName {
    "vm-1".parse().expect("valid")
}

pub(crate) async fn opened(store: Shared) -> Repository {
    Repository::open(store, Mode::CreateIfMissing).await.expect("open")
}

fn same(instance: &str) -> Claim {
    Claim::Continue { instance: instance.to_owned(), last: None, dead: None }
}

pub(crate) async fn claimed(repository: &Repository, instance: &str, claim: Claim) -> Writer {
    repository.claim_writer(&vm(), record(instance), claim).await.expect("claim")
}

async fn refused(repository: &Repository, instance: &str, claim: Claim) -> StoreError {
    repository.claim_writer(&vm(), record(instance), claim).await.expect_err("not permitted")
}

/// A checkpoint of two packs; the manifest names them, so that completeness can be checked from it.
pub(crate) async fn committed(writer: &Writer, checkpoint_id: u64) -> Result<(), StoreError> {
    let partial = writer.begin(CheckpointId(checkpoint_id)).await?;
    let a = partial.put_pack("ram", vec![noise(100_000, checkpoint_id + 1)]).await?;
    let b = partial.put_pack("disk", vec![noise(50_000, checkpoint_id + 2)]).await?;
    let manifest = format!("{checkpoint_id} {} {} {}", writer.epoch(), a.name, b.name);
    let durable = partial.commit(manifest.into()).await?;
    let checkpoint = CheckpointRef { vm: vm(), id: CheckpointId(checkpoint_id) };
    assert_eq!(*durable.checkpoint(), checkpoint);
    Ok(())
}

/// Checks that a checkpoint made by [`committed`] is all there.
pub(crate) async fn assert_complete(repository: &Repository, checkpoint_id: u64) {
    let manifest =
        repository.read_manifest(&vm(), CheckpointId(checkpoint_id)).await.expect("manifest");
    let manifest = String::from_utf8(manifest.to_vec()).expect("text");
    let words: Vec<&str> = manifest.split(' ').collect();
    assert_eq!(words[0], checkpoint_id.to_string());
    for (name, expected) in [
        (words[2], noise(100_000, checkpoint_id + 1)),
        (words[3], noise(50_000, checkpoint_id + 2)),
    ] {
        let len =
            repository.pack_len(&vm(), CheckpointId(checkpoint_id), name).await.expect("length");
        let found = repository
            .read_pack_range(&vm(), CheckpointId(checkpoint_id), name, 0, len)
            .await
            .expect("range");
        assert_eq!(found, expected);
    }
}

async fn numbers(repository: &Repository) -> Vec<u64> {
    let found = repository.checkpoints(&vm()).await.expect("checkpoints");
    found.into_iter().map(|checkpoint_id| checkpoint_id.0).collect()
}

async fn everything_in_checkpoints(store: &Shared) -> Vec<String> {
    let entries = store.list(&path("vms/vm-1/checkpoints")).await.expect("list");
    entries.into_iter().map(|entry| entry.name).collect()
}

pub(crate) async fn a_store_is_created_once(store: Shared) {
    let error = Repository::open(store.clone(), Mode::MustExist).await.expect_err("nothing there");
    assert!(matches!(error, StoreError::WrongStore { .. }), "{error}");
    let racers: Vec<_> = (0..8).map(|_| tokio::spawn(opened(store.clone()))).collect();
    let mut ids = Vec::new();
    for racer in racers {
        ids.push(racer.await.expect("no panic").id().to_owned());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let again = Repository::open(store, Mode::MustExist).await.expect("there");
    assert_eq!(again.id(), ids[0]);
}

pub(crate) async fn a_foreign_directory_is_refused(store: Shared) {
    store.create_dir_all(&StorePath::root()).await.expect("root");
    store.put(&path("foreign-file"), vec![bytes("x")], PutOptions::default()).await.expect("put");
    let error = Repository::open(store.clone(), Mode::CreateIfMissing).await.expect_err("foreign");
    assert!(matches!(error, StoreError::WrongStore { .. }), "{error}");
    assert_eq!(store.stat(&path("store.json")).await.expect("stat"), None);
}

pub(crate) async fn a_newer_format_is_refused(store: Shared) {
    store.create_dir_all(&StorePath::root()).await.expect("root");
    let newer = r#"{"format": "stillpoint-store", "version": 2, "unknown": [1]}"#;
    store.put(&path("store.json"), vec![bytes(newer)], PutOptions::default()).await.expect("put");
    let error = Repository::open(store.clone(), Mode::CreateIfMissing).await.expect_err("newer");
    assert!(error.to_string().contains("version 2"), "{error}");
    store.remove(&path("store.json")).await.expect("remove");
    store
        .put(&path("store.json"), vec![bytes("{\"format\"")], PutOptions::default())
        .await
        .expect("put");
    let error = Repository::open(store, Mode::CreateIfMissing).await.expect_err("torn");
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
}

pub(crate) async fn a_checkpoint_exists_after_its_commit_and_not_before(store: Shared) {
    let repository = opened(store).await;
    assert_eq!(repository.vms().await.expect("vms"), []);
    let writer = claimed(&repository, "i", same("i")).await;
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    let pack = partial.put_pack("ram", vec![bytes("0123"), bytes("456")]).await.expect("put");
    assert_eq!((pack.name.as_str(), pack.len, pack.attempts), ("ram.pack", 7, 1));
    assert_eq!(numbers(&repository).await, [0; 0]);
    let error = repository.read_manifest(&vm(), CheckpointId(1)).await.expect_err("not yet");
    assert!(error.is_not_found());
    let durable = partial.commit(bytes("manifest")).await.expect("commit");
    assert_eq!((durable.checkpoint().id, durable.epoch()), (CheckpointId(1), writer.epoch()));
    assert_eq!(numbers(&repository).await, [1]);
    assert_eq!(repository.vms().await.expect("vms"), [vm()]);
    assert_eq!(repository.read_manifest(&vm(), CheckpointId(1)).await.expect("there"), "manifest");
    let part =
        repository.read_pack_range(&vm(), CheckpointId(1), "ram.pack", 3, 2).await.expect("range");
    assert_eq!(part, "34");
    let outside = repository.read_pack_range(&vm(), CheckpointId(1), "../1/ram.pack", 0, 1).await;
    assert!(matches!(outside.expect_err("a way out"), StoreError::InvalidPath { .. }));
}

pub(crate) async fn numbers_are_used_once(store: Shared) {
    let repository = opened(store).await;
    let writer = claimed(&repository, "i", same("i")).await;
    for checkpoint_id in [1, 2, 10] {
        committed(&writer, checkpoint_id).await.expect("commit");
    }
    assert_eq!(numbers(&repository).await, [1, 2, 10]);
    let error = writer.begin(CheckpointId(2)).await.expect_err("used");
    assert!(error.is_already_exists(), "{error}");
}

pub(crate) async fn claims_follow_the_rules(store: Shared) {
    let repository = opened(store).await;
    let first = claimed(&repository, "a", same("a")).await;
    assert_eq!(first.epoch(), Epoch(1));
    let error = refused(&repository, "b", same("b")).await;
    assert!(matches!(error, StoreError::WriterHeld { epoch: Epoch(1), .. }), "{error}");
    first.check().await.expect("a refused claim changes nothing");
    let restarted = claimed(&repository, "a", same("a")).await;
    assert_eq!(restarted.epoch(), Epoch(2));
    assert!(first.check().await.expect_err("replaced").is_fenced());
    restarted.release().await.expect("release");
    restarted.release().await.expect("again is fine");
    let other = claimed(&repository, "b", same("b")).await;
    let taken = claimed(&repository, "c", Claim::TakeOver).await;
    assert!(taken.epoch() > other.epoch());
    let writers = repository.writers(&vm()).await.expect("writers");
    let seen: Vec<(u64, bool)> = writers.iter().map(|info| (info.epoch.0, info.released)).collect();
    assert_eq!(seen, [(1, false), (2, true), (3, false), (4, false)]);
    assert_eq!(writers[3].record, Some(record("c")));
}

/// By the records in the store while they are there, by its own memory when they have been pruned.
pub(crate) async fn fencing_replaced_instance_needs_an_order(store: Shared) {
    let repository = opened(store).await;
    let first = claimed(&repository, "a", same("a")).await;
    let second = claimed(&repository, "b", Claim::TakeOver).await;
    for released in [false, true] {
        assert!(refused(&repository, "a", same("a")).await.is_fenced(), "released: {released}");
        let dead =
            Claim::Continue { instance: "a".to_owned(), last: None, dead: Some(second.epoch()) };
        assert!(refused(&repository, "a", dead).await.is_fenced(), "released: {released}");
        second.release().await.expect("release");
    }
    for _ in 0..9 {
        claimed(&repository, "b", same("b")).await.release().await.expect("release");
    }
    let remembers =
        Claim::Continue { instance: "a".to_owned(), last: Some(first.epoch()), dead: None };
    assert!(refused(&repository, "a", remembers).await.is_fenced());
    let ordered = claimed(&repository, "a", Claim::TakeOver).await;
    let again =
        Claim::Continue { instance: "a".to_owned(), last: Some(ordered.epoch()), dead: None };
    claimed(&repository, "a", again).await;
}

/// A holder that is known to be dead is replaced; one that came since that was found out is not.
pub(crate) async fn fencing_only_the_dead_one_is_replaced(store: Shared) {
    let repository = opened(store).await;
    let first = claimed(&repository, "a", same("a")).await;
    let claim = Claim::Continue { instance: "c".to_owned(), last: None, dead: Some(first.epoch()) };
    let second = claimed(&repository, "b", Claim::TakeOver).await;
    let error = refused(&repository, "c", claim).await;
    assert!(matches!(error, StoreError::WriterHeld { .. }), "{error}");
    claimed(
        &repository,
        "c",
        Claim::Continue { instance: "c".to_owned(), last: None, dead: Some(second.epoch()) },
    )
    .await;
}

/// What a restore that failed at its end has claimed.
pub(crate) async fn writer_that_withdraws_leaves_no_name(store: Shared) {
    let repository = opened(store).await;
    claimed(&repository, "a", same("a")).await.withdraw().await.expect("withdraw");
    assert!(repository.vms().await.expect("vms").is_empty());
    let first = claimed(&repository, "a", same("a")).await;
    committed(&first, 1).await.expect("commit");
    let second = claimed(&repository, "b", Claim::TakeOver).await;
    assert!(repository.may_claim(&vm(), &same("c")).await.is_err());
    second.withdraw().await.expect("withdraw");
    repository.may_claim(&vm(), &same("c")).await.expect("no writer holds it");
    assert_eq!(numbers(&repository).await, [1]);
}

pub(crate) async fn concurrent_takeovers_leave_one_writer(store: Shared) {
    let repository = opened(store).await;
    let racers: Vec<_> = (0..6)
        .map(|racer| {
            let repository = repository.clone();
            tokio::spawn(async move {
                repository.claim_writer(&vm(), record(&format!("r{racer}")), Claim::TakeOver).await
            })
        })
        .collect();
    let mut writers = Vec::new();
    for racer in racers {
        match racer.await.expect("no panic") {
            Ok(writer) => writers.push(writer),
            Err(error) => assert!(error.is_fenced(), "{error}"),
        }
    }
    writers.sort_by_key(Writer::epoch);
    let last = writers.pop().expect("one writer won");
    committed(&last, 1).await.expect("the last one may write");
    for (position, writer) in writers.iter().enumerate() {
        let error = committed(writer, 10 + position as u64).await.expect_err("fenced");
        assert!(error.is_fenced(), "{error}");
    }
    assert_eq!(numbers(&repository).await, [1]);
}

pub(crate) async fn an_old_writer_can_store_nothing_after_a_claim(store: Shared) {
    let repository = opened(store.clone()).await;
    let old = claimed(&repository, "a", same("a")).await;
    let partial = old.begin(CheckpointId(1)).await.expect("begin");
    partial.put_pack("before", vec![bytes("x")]).await.expect("put");
    let new = claimed(&repository, "b", Claim::TakeOver).await;
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
    let error = partial.put_pack("after", vec![bytes("x")]).await.expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    let error = partial.commit(bytes("old")).await.expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    assert!(old.begin(CheckpointId(2)).await.expect_err("fenced").is_fenced());
    committed(&new, 1).await.expect("commit");
    assert_complete(&repository, 1).await;
    assert_eq!(everything_in_checkpoints(&store).await, ["1"]);
}

/// The old writer has checked its epoch and is about to rename when the new one claims.
pub(crate) async fn an_old_writers_rename_fails_after_a_claim(store: Shared) {
    let slow = FaultyStore::new(store.clone());
    let repository = opened(Arc::new(slow.clone())).await;
    let old = claimed(&repository, "a", same("a")).await;
    let partial = old.begin(CheckpointId(1)).await.expect("begin");
    partial.put_pack("ram", vec![bytes("x")]).await.expect("put");
    slow.inject(FaultRule::once(Op::RenameDir, Fault::Slow(Duration::from_secs(2))));
    let commit = tokio::spawn(partial.commit(bytes("old")));
    while slow.calls(Op::RenameDir, "") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let other = opened(store.clone()).await;
    let new = claimed(&other, "b", Claim::TakeOver).await;
    committed(&new, 1).await.expect("commit");
    let error = commit.await.expect("no panic").expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    assert_complete(&other, 1).await;
    assert_eq!(everything_in_checkpoints(&store).await, ["1"]);
}

/// The old writer's directory is made after the new writer's cleaning.
pub(crate) async fn a_partial_made_after_a_claim_is_noticed(store: Shared) {
    let slow = FaultyStore::new(store.clone());
    let repository = opened(Arc::new(slow.clone())).await;
    let old = claimed(&repository, "a", same("a")).await;
    slow.inject(FaultRule::once(Op::CreateDir, Fault::Slow(Duration::from_secs(1))));
    let begin = tokio::spawn(async move { old.begin(CheckpointId(1)).await });
    while slow.calls(Op::CreateDir, "partial") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    claimed(&opened(store.clone()).await, "b", Claim::TakeOver).await;
    let error = begin.await.expect("no panic").expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
}

pub(crate) async fn what_was_committed_before_a_claim_stays(store: Shared) {
    let repository = opened(store).await;
    let old = claimed(&repository, "a", same("a")).await;
    committed(&old, 1).await.expect("commit");
    let new = claimed(&repository, "b", Claim::TakeOver).await;
    committed(&new, 2).await.expect("commit");
    assert_eq!(numbers(&repository).await, [1, 2]);
    assert_complete(&repository, 1).await;
}

pub(crate) async fn a_killed_writer_leaves_nothing_visible(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    partial.put_pack("ram", vec![noise(100_000, 1)]).await.expect("put");
    // What a kill leaves: everything is stored, and no process renames it.
    #[expect(clippy::disallowed_methods, reason = "a helper that is killed drops nothing")]
    std::mem::forget(partial);
    assert_eq!(numbers(&repository).await, [0; 0]);
    assert!(
        repository.read_manifest(&vm(), CheckpointId(1)).await.expect_err("none").is_not_found()
    );
    let restarted = claimed(&repository, "a", same("a")).await;
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
    committed(&restarted, 1).await.expect("commit");
    assert_complete(&repository, 1).await;
}

pub(crate) async fn resume_has_what_an_earlier_try_stored(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    let pack = partial.put_pack("ram", vec![noise(100_000, 2)]).await.expect("put");
    let left = partial.put_pack("left", vec![bytes("x")]).await.expect("put");
    let _sealed = partial.seal(bytes("of the first try")).await.expect("seal");
    let kept = partial.keep();
    assert_eq!(everything_in_checkpoints(&store).await, ["1.1-1.partial"]);
    let partial =
        writer.resume(CheckpointId(1), &kept).await.expect("resume").expect("it is there");
    drop(kept);
    assert_eq!(
        everything_in_checkpoints(&store).await,
        ["1.1-2.partial"],
        "a late put of the first try finds no directory"
    );
    let names: Vec<String> =
        partial.files().await.expect("files").into_iter().map(|file| file.name).collect();
    assert_eq!(names, [left.name.as_str(), "manifest.json", pack.name.as_str()]);
    for name in [left.name.as_str(), "manifest.json"] {
        partial.remove_file(name).await.expect("remove");
    }
    assert_eq!(
        partial.read_pack_range(&pack.name, 0, 100_000).await.expect("read"),
        noise(100_000, 2)
    );
    let other = partial.put_pack("disk", vec![noise(50_000, 3)]).await.expect("put");
    let _durable =
        partial.commit(format!("1 1 {} {}", pack.name, other.name).into()).await.expect("commit");
    assert_complete(&repository, 1).await;
    committed(&writer, 2).await.expect("the next one");
    assert_eq!(everything_in_checkpoints(&store).await, ["1", "2"]);
}

pub(crate) async fn resume_fenced_writer_gets_nothing(store: Shared) {
    let repository = opened(store.clone()).await;
    let old = claimed(&repository, "a", same("a")).await;
    let partial = old.begin(CheckpointId(1)).await.expect("begin");
    partial.put_pack("ram", vec![bytes("x")]).await.expect("put");
    let kept = partial.keep();
    let new = claimed(&repository, "a", same("a")).await;
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
    assert!(old.resume(CheckpointId(1), &kept).await.expect("nothing is wrong yet").is_none());
    assert!(
        new.resume(CheckpointId(1), &kept).await.expect("nothing is wrong").is_none(),
        "another writer's"
    );
    assert!(old.begin(CheckpointId(1)).await.expect_err("fenced").is_fenced());
    committed(&new, 1).await.expect("commit");
}

/// The old writer's rename comes after the new writer's cleaning.
pub(crate) async fn resume_behind_a_claims_removal_is_noticed(store: Shared) {
    let slow = FaultyStore::new(store.clone());
    let repository = opened(Arc::new(slow.clone())).await;
    let old = claimed(&repository, "a", same("a")).await;
    let kept = old.begin(CheckpointId(1)).await.expect("begin").keep();
    slow.inject(FaultRule::once(Op::Remove, Fault::Slow(Duration::from_secs(1))).on("partial"));
    let other = repository.clone();
    let claim = tokio::spawn(async move { claimed(&other, "b", Claim::TakeOver).await });
    while slow.calls(Op::Remove, "partial") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let error = old.resume(CheckpointId(1), &kept).await.expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    claim.await.expect("no panic");
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
}

pub(crate) async fn an_abort_leaves_nothing(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    partial.put_pack("ram", vec![bytes("x")]).await.expect("put");
    partial.abort().await.expect("abort");
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
    // One that is only dropped stays until the next begin.
    drop(writer.begin(CheckpointId(1)).await.expect("begin"));
    assert_eq!(everything_in_checkpoints(&store).await.len(), 1);
    committed(&writer, 1).await.expect("commit");
    assert_eq!(everything_in_checkpoints(&store).await, ["1"]);
}

pub(crate) async fn a_checkpoint_can_be_removed(store: Shared) {
    let repository = opened(store).await;
    let writer = claimed(&repository, "a", same("a")).await;
    committed(&writer, 1).await.expect("commit");
    committed(&writer, 2).await.expect("commit");
    writer.remove_checkpoint(CheckpointId(1)).await.expect("remove");
    assert_eq!(numbers(&repository).await, [2]);
}

fn reader(instance: &str) -> ReaderRecord {
    ReaderRecord {
        host: "host".into(),
        vm: "copy".parse().expect("valid"),
        instance: instance.into(),
        version: "1".into(),
    }
}

async fn files_of_readers(store: &Shared) -> Vec<String> {
    let entries = store.list(&path("vms/vm-1/readers")).await.expect("list");
    entries.into_iter().map(|entry| entry.name).collect()
}

pub(crate) async fn readers_protect_what_they_read_and_all_before_it(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    for id in 1..=3 {
        committed(&writer, id).await.expect("commit");
    }
    assert_eq!(repository.readers(&vm()).await.expect("readers"), []);
    let one = repository.begin_reading(&vm(), CheckpointId(2), &reader("one")).await;
    let one = one.expect("begin");
    for id in [1, 2] {
        let error = writer.remove_checkpoint(CheckpointId(id)).await.expect_err("in use");
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("copy on host"), "{error}");
    }
    writer.remove_checkpoint(CheckpointId(3)).await.expect("remove");
    one.renew().await.expect("renew");
    // The next helper of the same instance is the same reader, another instance another one.
    let again = repository.begin_reading(&vm(), CheckpointId(2), &reader("one")).await;
    let other = repository.begin_reading(&vm(), CheckpointId(1), &reader("other")).await;
    let found = repository.readers(&vm()).await.expect("readers");
    assert_eq!(found.len(), 2, "{:?}", files_of_readers(&store).await);
    assert!(
        found.contains(&ReaderInfo { checkpoint: CheckpointId(2), record: Some(reader("one")) })
    );
    again.expect("begin").release().await.expect("release");
    writer.remove_checkpoint(CheckpointId(2)).await.expect("remove");
    writer.remove_checkpoint(CheckpointId(1)).await.expect_err("in use by the other");
    other.expect("begin").release().await.expect("release");
    writer.remove_checkpoint(CheckpointId(1)).await.expect("remove");
    assert_eq!(numbers(&repository).await, [0; 0]);
    assert_eq!(everything_in_checkpoints(&store).await, [""; 0]);
    assert_eq!(files_of_readers(&store).await, [""; 0]);
}

pub(crate) async fn readers_that_do_not_renew_expire(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    committed(&writer, 1).await.expect("commit");
    let reading = repository.begin_reading(&vm(), CheckpointId(1), &reader("one")).await;
    drop(reading.expect("begin"));
    writer.remove_checkpoint(CheckpointId(1)).await.expect_err("in use");
    let options = RepositoryOptions { readers_expire_after: Duration::ZERO, ..Default::default() };
    let later = Repository::open_with(store, Mode::MustExist, options).await.expect("open");
    assert_eq!(later.readers(&vm()).await.expect("readers"), []);
    later.check_unused(&vm(), CheckpointId(1)).await.expect("unused");
}

pub(crate) async fn reader_of_a_checkpoint_that_is_gone_is_refused(store: Shared) {
    let repository = opened(store.clone()).await;
    let writer = claimed(&repository, "a", same("a")).await;
    committed(&writer, 1).await.expect("commit");
    writer.remove_checkpoint(CheckpointId(1)).await.expect("remove");
    let reading = repository.begin_reading(&vm(), CheckpointId(1), &reader("one")).await;
    assert!(reading.expect_err("it is gone").is_not_found());
    assert_eq!(repository.readers(&vm()).await.expect("readers"), []);
}

pub(crate) async fn layers_are_stored_once(store: Shared) {
    let repository = opened(store.clone()).await;
    let digest = ContentDigest::of(b"an image");
    let name = PackName::new("layer.json").expect("valid");
    assert!(!repository.has_layer(&digest).await.expect("look"));
    let (one, two) = (repository.begin_layer(&digest).await, repository.begin_layer(&digest).await);
    let (one, two) = (one.expect("begin"), two.expect("begin"));
    for partial in [&one, &two] {
        partial.put_pack("blocks", vec![bytes("0123456789")]).await.expect("put");
        partial.put_file(&name, vec![bytes("manifest")]).await.expect("put");
    }
    assert!(repository.layers().await.expect("layers").is_empty());
    assert_eq!(one.commit().await.expect("commit"), LayerOutcome::Stored);
    assert_eq!(two.commit().await.expect("commit"), LayerOutcome::AlreadyThere);
    assert_eq!(repository.layers().await.expect("layers"), [digest]);
    assert_eq!(
        repository.read_layer_file(&digest, "layer.json", 100).await.expect("read"),
        "manifest"
    );
    let part = repository.read_layer_range(&digest, "blocks.pack", 2, 3).await.expect("range");
    assert_eq!(part, Bytes::from_static(b"234"));
    assert_eq!(repository.layer_file_len(&digest, "blocks.pack").await.expect("length"), 10);
    assert_eq!(
        store.list(&path("layers")).await.expect("list").len(),
        1,
        "the loser's partial stays"
    );
    repository.remove_layer(&digest).await.expect("remove");
    assert!(!repository.has_layer(&digest).await.expect("look"));
}

async fn partial_layers(store: &Shared) -> Vec<String> {
    let names =
        store.list(&path("layers")).await.expect("list").into_iter().map(|entry| entry.name);
    names.filter(|name| name.ends_with(".partial")).collect()
}

pub(crate) async fn abandoned_uploads_are_removed_by_the_next(store: Shared) {
    let options =
        |abandoned_after| RepositoryOptions { abandoned_after, ..RepositoryOptions::default() };
    let patient =
        Repository::open_with(store.clone(), Mode::CreateIfMissing, RepositoryOptions::default())
            .await
            .expect("open");
    let [one, two, three] = [b"1", b"2", b"3"].map(|text| ContentDigest::of(text));
    // Cut off: nothing of it runs any more.
    let cut = patient.begin_layer(&one).await.expect("begin");
    cut.put_pack("blocks", vec![bytes("0123456789")]).await.expect("put");
    drop(cut);
    // To a patient one it may be an upload of another host.
    drop(patient.begin_layer(&two).await.expect("begin"));
    assert_eq!(partial_layers(&store).await.len(), 2);
    tokio::time::sleep(Duration::from_millis(60)).await;
    let hasty =
        Repository::open_with(store.clone(), Mode::MustExist, options(Duration::from_millis(50)))
            .await
            .expect("open");
    let upload = hasty.begin_layer(&three).await.expect("begin");
    assert_eq!(partial_layers(&store).await.len(), 1, "only the new one");
    assert_eq!(upload.commit().await.expect("commit"), LayerOutcome::Stored);
    assert_eq!(hasty.layers().await.expect("layers"), [three]);
    assert!(partial_layers(&store).await.is_empty());
}

/// Two hosts store one image; the slower one need not finish.
pub(crate) async fn an_upload_that_another_makes_useless_ends(store: Shared) {
    let repository = opened(store.clone()).await;
    let (digest, other) = (ContentDigest::of(b"an image"), ContentDigest::of(b"another"));
    let slow = repository.begin_layer(&digest).await.expect("begin");
    let of_another = repository.begin_layer(&other).await.expect("begin");
    let fast = repository.begin_layer(&digest).await.expect("begin");
    assert_eq!(fast.commit().await.expect("commit"), LayerOutcome::Stored);
    let error =
        slow.put_pack("blocks", vec![bytes("late")]).await.expect_err("its directory is gone");
    assert!(error.is_already_exists(), "{error}");
    assert_eq!(slow.commit().await.expect("commit"), LayerOutcome::AlreadyThere);
    of_another.put_pack("blocks", vec![bytes("x")]).await.expect("no process touched it");
    assert_eq!(of_another.commit().await.expect("commit"), LayerOutcome::Stored);
}

pub(crate) async fn proofs_are_noted_once(store: Shared) {
    let repository = opened(store).await;
    let (checkpoint_id, keys) = (CheckpointId(3), [Checksum([1; 16]), Checksum([2; 16])]);
    assert_eq!(repository.proofs(&vm(), checkpoint_id).await.expect("read"), Vec::<Bytes>::new());
    let note = async |checkpoint_id: u64, key: usize, text: &'static str| {
        let (vm, text) = (vm(), Bytes::from_static(text.as_bytes()));
        repository
            .note_proof(&vm, CheckpointId(checkpoint_id), &keys[key], text)
            .await
            .expect("note")
    };
    assert!(
        note(3, 0, "one").await
            && note(3, 1, "two").await
            && note(30, 0, "another checkpoint's").await
    );
    assert!(!note(3, 0, "again").await, "a note stays as it is");
    assert_eq!(repository.proofs(&vm(), checkpoint_id).await.expect("read"), ["one", "two"]);
}

pub(crate) async fn working_set_is_replaced(store: Shared) {
    let repository = opened(store).await;
    claimed(&repository, "a", same("a")).await;
    assert_eq!(repository.working_set(&vm()).await.expect("read"), None);
    for pages in [1, 300] {
        let mut set = WorkingSet {
            space: SpaceName::ram("pc.ram").expect("valid"),
            pages: RangeSet::default(),
        };
        set.pages.insert(PageCount(pages).all());
        repository.replace_working_set(&vm(), &set).await.expect("write");
        assert_eq!(repository.working_set(&vm()).await.expect("read"), Some(set));
    }
}
