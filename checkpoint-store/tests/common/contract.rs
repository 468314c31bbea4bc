//! What every store must do, as one suite over a factory of empty stores.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint_store::{Entry, PutOptions, Stat, Store, StoreError, StorePath};

use super::{bytes, noise, path};

/// Makes one test per promise. `$make` is an async function that gives an empty store and whatever
/// keeps it alive.
#[macro_export]
macro_rules! store_contract {
    ($make:path) => {
        $crate::store_contract!(@each $make:
            a_file_comes_back
            nothing_is_overwritten
            a_missing_parent_is_never_made
            ranges_are_exact
            past_the_end_is_an_error
            a_limit_is_kept
            listings_are_sorted_and_complete
            stat_tells_what_is_there
            directory_tells_that_an_entry_came_or_went
            missing_things_are_not_found
            directories_are_made_once
            one_exclusive_put_wins
            one_exclusive_directory_wins
            a_rename_moves_everything
            a_rename_never_replaces
            one_concurrent_rename_wins
            a_rename_needs_a_directory
            removal_is_recursive_and_repeatable
            a_removed_directory_stays_removed
            a_name_can_be_used_again_after_removal
            the_root_stays
            many_chunks_make_one_file
            replication_can_be_set
        );
    };
    (@each $make:path: $($name:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let (store, _alive) = $make().await;
            $crate::common::contract::$name(store).await;
        }
    )*};
}

type Shared = Arc<dyn Store>;

async fn put(store: &Shared, at: &str, text: &str) {
    store.put(&path(at), vec![bytes(text)], PutOptions::default()).await.expect("put");
}

fn names(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.name.as_str()).collect()
}

pub(crate) async fn a_file_comes_back(store: Shared) {
    let receipt =
        store.put(&path("a"), vec![bytes("hello")], PutOptions::default()).await.expect("put");
    assert_eq!(receipt.len, 5);
    assert_eq!(store.read(&path("a"), 100).await.expect("read"), "hello");
    put(&store, "empty", "").await;
    assert_eq!(store.read(&path("empty"), 100).await.expect("read"), "");
}

pub(crate) async fn nothing_is_overwritten(store: Shared) {
    put(&store, "a", "first").await;
    let again = store.put(&path("a"), vec![bytes("second")], PutOptions::default()).await;
    assert!(again.expect_err("taken").is_already_exists());
    let again = store.put_exclusive(&path("a"), bytes("third"), PutOptions::default()).await;
    assert!(again.expect_err("taken").is_already_exists());
    assert_eq!(store.read(&path("a"), 100).await.expect("read"), "first");
}

pub(crate) async fn a_missing_parent_is_never_made(store: Shared) {
    let error = store
        .put(&path("no/a"), vec![bytes("x")], PutOptions::default())
        .await
        .expect_err("no parent");
    assert!(error.is_not_found(), "{error}");
    let error = store
        .put_exclusive(&path("no/a"), bytes("x"), PutOptions::default())
        .await
        .expect_err("no parent");
    assert!(error.is_not_found(), "{error}");
    let error = store.create_dir(&path("no/dir")).await.expect_err("no parent");
    assert!(error.is_not_found(), "{error}");
    store.create_dir(&path("dir")).await.expect("create");
    let error = store.rename_dir(&path("dir"), &path("no/dir")).await.expect_err("no parent");
    assert!(error.is_not_found(), "{error}");
    assert_eq!(store.stat(&path("no")).await.expect("stat"), None);
}

pub(crate) async fn ranges_are_exact(store: Shared) {
    let data = noise(3_000_000, 7);
    store.put(&path("a"), vec![data.clone()], PutOptions::default()).await.expect("put");
    for (offset, len) in
        [(0, 1), (0, 3_000_000), (2_999_999, 1), (1_048_570, 100_000), (3_000_000, 0), (0, 0)]
    {
        let part = store.read_range(&path("a"), offset, len).await.expect("range");
        assert_eq!(part, data.slice(offset as usize..(offset + len) as usize), "{offset}+{len}");
    }
}

pub(crate) async fn past_the_end_is_an_error(store: Shared) {
    put(&store, "a", "0123456789").await;
    for (offset, len) in [(0, 11), (10, 1), (11, 0), (5, 6), (u64::MAX, 1), (1, u64::MAX - 1)] {
        let error = store.read_range(&path("a"), offset, len).await.expect_err("past the end");
        assert!(
            matches!(error, StoreError::PastEnd { file_len: 10, .. } | StoreError::Limit { .. }),
            "{offset}+{len}: {error}"
        );
    }
}

pub(crate) async fn a_limit_is_kept(store: Shared) {
    put(&store, "a", "0123456789").await;
    assert_eq!(store.read(&path("a"), 10).await.expect("read").len(), 10);
    let error = store.read(&path("a"), 9).await.expect_err("too long");
    assert!(matches!(error, StoreError::Limit { actual: 10, limit: 9, .. }), "{error}");
}

pub(crate) async fn listings_are_sorted_and_complete(store: Shared) {
    assert_eq!(store.list(&StorePath::root()).await.expect("list"), []);
    store.create_dir(&path("b")).await.expect("create");
    for name in ["c", "a", "b/inside"] {
        put(&store, name, "xyz").await;
    }
    let entries = store.list(&StorePath::root()).await.expect("list");
    assert_eq!(names(&entries), ["a", "b", "c"]);
    let kinds: Vec<(bool, u64)> = entries.iter().map(|entry| (entry.is_dir, entry.len)).collect();
    assert_eq!(kinds, [(false, 3), (true, 0), (false, 3)]);
    assert_eq!(names(&store.list(&path("b")).await.expect("list")), ["inside"]);
    assert!(store.list(&path("a")).await.is_err(), "a file has no entries");
}

pub(crate) async fn stat_tells_what_is_there(store: Shared) {
    put(&store, "a", "xyz").await;
    store.create_dir(&path("d")).await.expect("create");
    let file = store.stat(&path("a")).await.expect("stat").expect("there");
    assert_eq!((file.len, file.is_dir), (3, false));
    let dir = store.stat(&path("d")).await.expect("stat").expect("there");
    assert_eq!(dir, Stat { len: 0, is_dir: true, replicas: None, modified: dir.modified });
    assert!(store.stat(&StorePath::root()).await.expect("stat").expect("there").is_dir);
}

pub(crate) async fn directory_tells_that_an_entry_came_or_went(store: Shared) {
    store.create_dir_all(&path("d/e")).await.expect("create");
    let mut before = None;
    let mut is_new = async |what: &str, wanted: bool| {
        let modified = store.stat(&path("d")).await.expect("stat").map(|stat| stat.modified);
        assert_eq!(before.replace(modified) != Some(modified), wanted, "{what}");
        // Two changes within one tick of the store's clock cannot be distinguished.
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    is_new("it was made", true).await;
    put(&store, "d/e/below", "x").await;
    is_new("a file came to a directory in it", false).await;
    put(&store, "d/file", "x").await;
    is_new("a file came", true).await;
    store.create_dir(&path("d/f")).await.expect("create");
    is_new("a directory came", true).await;
    store.rename_dir(&path("d/f"), &path("d/g")).await.expect("rename");
    is_new("a directory has another name", true).await;
    store.remove(&path("d/g")).await.expect("remove");
    is_new("a directory went", true).await;
}

pub(crate) async fn missing_things_are_not_found(store: Shared) {
    let missing = path("missing");
    assert_eq!(store.stat(&missing).await.expect("stat"), None);
    assert!(store.read(&missing, 1).await.expect_err("read").is_not_found());
    assert!(store.read_range(&missing, 0, 1).await.expect_err("range").is_not_found());
    assert!(store.list(&missing).await.expect_err("list").is_not_found());
    assert!(store.rename_dir(&missing, &path("b")).await.expect_err("rename").is_not_found());
    store.remove(&missing).await.expect("missing is fine");
}

pub(crate) async fn directories_are_made_once(store: Shared) {
    store.create_dir_all(&path("a/b/c")).await.expect("create");
    store.create_dir_all(&path("a/b/c")).await.expect("again is fine");
    assert!(store.create_dir(&path("a/b")).await.expect_err("there").is_already_exists());
    store.create_dir(&path("a/d")).await.expect("create");
    assert_eq!(names(&store.list(&path("a")).await.expect("list")), ["b", "d"]);
}

const RACERS: usize = 12;

/// Runs the same call many times at once; how many won, all others having found the name taken.
async fn race<F: Future<Output = Result<(), StoreError>> + Send + 'static>(
    call: impl Fn(usize) -> F,
) -> usize {
    let racers: Vec<_> = (0..RACERS).map(|racer| tokio::spawn(call(racer))).collect();
    let mut winners = 0;
    for racer in racers {
        match racer.await.expect("no panic") {
            Ok(()) => winners += 1,
            Err(error) => assert!(error.is_already_exists(), "{error}"),
        }
    }
    winners
}

pub(crate) async fn one_exclusive_put_wins(store: Shared) {
    for pass in 0..4 {
        let name = format!("epoch-{pass}");
        let at = path(&name);
        let winners = race(|racer| {
            let (store, at) = (store.clone(), at.clone());
            async move {
                let text = bytes(&format!("racer {racer}"));
                store.put_exclusive(&at, text, PutOptions::default()).await.map(|_| ())
            }
        });
        assert_eq!(winners.await, 1);
        assert!(store.read(&at, 100).await.expect("read").starts_with(b"racer "));
    }
}

pub(crate) async fn one_exclusive_directory_wins(store: Shared) {
    let winners = race(|_| {
        let store = store.clone();
        async move { store.create_dir(&path("dir")).await }
    });
    assert_eq!(winners.await, 1);
    assert_eq!(store.list(&path("dir")).await.expect("list"), []);
    assert_eq!(names(&store.list(&StorePath::root()).await.expect("list")), ["dir"]);
}

pub(crate) async fn a_rename_moves_everything(store: Shared) {
    store.create_dir_all(&path("x/from/deep")).await.expect("create");
    store.create_dir(&path("y")).await.expect("create");
    put(&store, "x/from/a", "1").await;
    put(&store, "x/from/deep/b", "2").await;
    store.rename_dir(&path("x/from"), &path("y/to")).await.expect("rename");
    assert_eq!(store.read(&path("y/to/a"), 10).await.expect("read"), "1");
    assert_eq!(store.read(&path("y/to/deep/b"), 10).await.expect("read"), "2");
    assert_eq!(store.stat(&path("x/from")).await.expect("stat"), None);
    assert!(store.read(&path("x/from/a"), 10).await.expect_err("moved").is_not_found());
}

pub(crate) async fn a_rename_never_replaces(store: Shared) {
    for dir in ["from", "empty", "full"] {
        store.create_dir(&path(dir)).await.expect("create");
    }
    put(&store, "full/a", "1").await;
    put(&store, "file", "2").await;
    for target in ["empty", "full", "file"] {
        let error = store.rename_dir(&path("from"), &path(target)).await.expect_err(target);
        assert!(error.is_already_exists(), "{target}: {error}");
    }
    assert!(store.stat(&path("from")).await.expect("stat").is_some());
    assert_eq!(names(&store.list(&path("full")).await.expect("list")), ["a"]);
}

pub(crate) async fn one_concurrent_rename_wins(store: Shared) {
    for racer in 0..RACERS {
        store.create_dir(&path(&format!("from-{racer}"))).await.expect("create");
        put(&store, &format!("from-{racer}/by"), &racer.to_string()).await;
    }
    let winners = race(|racer| {
        let store = store.clone();
        async move { store.rename_dir(&path(&format!("from-{racer}")), &path("to")).await }
    });
    assert_eq!(winners.await, 1);
    assert_eq!(names(&store.list(&path("to")).await.expect("list")), ["by"]);
    assert_eq!(store.list(&StorePath::root()).await.expect("list").len(), RACERS);
}

pub(crate) async fn a_rename_needs_a_directory(store: Shared) {
    put(&store, "file", "x").await;
    assert!(store.rename_dir(&path("file"), &path("other")).await.is_err());
    assert_eq!(store.read(&path("file"), 10).await.expect("read"), "x");
}

pub(crate) async fn removal_is_recursive_and_repeatable(store: Shared) {
    store.create_dir_all(&path("a/b")).await.expect("create");
    put(&store, "a/b/c", "x").await;
    put(&store, "ab", "stays").await;
    store.remove(&path("a")).await.expect("remove");
    store.remove(&path("a")).await.expect("again is fine");
    store.remove(&path("a/b/c")).await.expect("below a removed directory too");
    assert_eq!(names(&store.list(&StorePath::root()).await.expect("list")), ["ab"]);
    store.remove(&path("ab")).await.expect("remove a file");
    assert_eq!(store.list(&StorePath::root()).await.expect("list"), []);
}

pub(crate) async fn a_removed_directory_stays_removed(store: Shared) {
    store.create_dir(&path("a")).await.expect("create");
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let store = store.clone();
            let at = path(&format!("a/{writer}"));
            tokio::spawn(async move {
                store.put(&at, vec![noise(200_000, 3)], PutOptions::default()).await
            })
        })
        .collect();
    store.remove(&path("a")).await.expect("remove");
    for writer in writers {
        if let Err(error) = writer.await.expect("no panic") {
            assert!(error.is_not_found(), "{error}");
        }
    }
    assert_eq!(store.stat(&path("a")).await.expect("stat"), None);
}

pub(crate) async fn a_name_can_be_used_again_after_removal(store: Shared) {
    put(&store, "a", "old and longer").await;
    assert_eq!(store.read_range(&path("a"), 0, 3).await.expect("range"), "old");
    store.remove(&path("a")).await.expect("remove");
    put(&store, "a", "new").await;
    assert_eq!(store.read_range(&path("a"), 0, 3).await.expect("range"), "new");
}

pub(crate) async fn the_root_stays(store: Shared) {
    assert!(store.remove(&StorePath::root()).await.is_err());
    put(&store, "a", "x").await;
}

pub(crate) async fn many_chunks_make_one_file(store: Shared) {
    let whole = noise(2_500_000, 11);
    let mut rest = whole.clone();
    let mut chunks = vec![Bytes::new()];
    while !rest.is_empty() {
        chunks.push(rest.split_to(rest.len().min(77_777)));
    }
    let receipt = store.put(&path("a"), chunks, PutOptions::default()).await.expect("put");
    assert_eq!(receipt.len, whole.len() as u64);
    assert_eq!(store.read(&path("a"), 1 << 30).await.expect("read"), whole);
}

pub(crate) async fn replication_can_be_set(store: Shared) {
    put(&store, "a", "x").await;
    store.set_replication(&path("a"), 2).await.expect("set");
    let replicas = store.stat(&path("a")).await.expect("stat").expect("there").replicas;
    assert!(matches!(replicas, None | Some(2)), "{replicas:?}");
}
