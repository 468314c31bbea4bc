//! The contracts on a real HDFS, and what a real HDFS does to a store.
//!
//! Needs `scripts/hdfs-dev`; fails without, because a store that was not tried is not tested. The
//! tests that kill processes have a cluster of their own and take turns.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use checkpoint_format::CheckpointId;
use checkpoint_store::{
    Claim, FaultyStore, HdfsOptions, HdfsStore, Mode, Op, PutOptions, Repository,
    RepositoryOptions, Store, StoreError, StoreOptions, StorePath, Writer, open,
};
use common::cluster::Cluster;
use common::repository::{assert_complete, committed, vm};
use common::{bytes, noise, path, record};
use nix::sys::signal::{Signal, kill};

const MIB: usize = 1 << 20;

/// Shows what the client and the retry policy say, with RUST_LOG.
fn logs() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

async fn shared() -> Cluster {
    logs();
    tokio::task::spawn_blocking(Cluster::shared).await.expect("cluster")
}

async fn hazards() -> Cluster {
    logs();
    tokio::task::spawn_blocking(Cluster::hazards).await.expect("cluster")
}

async fn hdfs() -> (Arc<dyn Store>, Cluster) {
    let cluster = shared().await;
    let store = open(&cluster.fresh_url("contract"), &StoreOptions::default()).expect("open");
    store.create_dir_all(&StorePath::root()).await.expect("root");
    (store, cluster)
}

mod store_contract {
    crate::store_contract!(super::hdfs);
}

mod repository_contract {
    crate::repository_contract!(super::hdfs);
}

fn patient(cluster: &Cluster, what: &str, options: &HdfsOptions) -> Arc<dyn Store> {
    Arc::new(HdfsStore::open(&cluster.fresh_url(what), options).expect("open"))
}

/// Times short enough for a test.
fn impatient() -> HdfsOptions {
    HdfsOptions {
        call_timeout: Duration::from_secs(2),
        stall_timeout: Duration::from_secs(3),
        ..HdfsOptions::default()
    }
}

async fn writer_on(store: Arc<dyn Store>) -> Writer {
    let options = RepositoryOptions::default();
    let repository =
        Repository::open_with(store, Mode::CreateIfMissing, options).await.expect("open");
    repository.claim_writer(&vm(), record("i"), Claim::TakeOver).await.expect("claim")
}

#[tokio::test]
async fn many_blocks_are_synced_and_come_back() {
    let cluster = shared().await;
    let options = HdfsOptions { block_size: MIB as u64, ..HdfsOptions::default() };
    let store = patient(&cluster, "blocks", &options);
    store.create_dir_all(&StorePath::root()).await.expect("root");
    // Ends on a block boundary, and one byte after it.
    for len in [3 * MIB, 3 * MIB + 1] {
        let at = path(&format!("a-{len}"));
        let data = noise(len, 5);
        store.put(&at, vec![data.clone()], PutOptions::default()).await.expect("put");
        assert_eq!(store.read(&at, 1 << 30).await.expect("read"), data);
        let across = store.read_range(&at, MIB as u64 - 5, 10).await.expect("range");
        assert_eq!(across, data.slice(MIB - 5..MIB + 5));
    }
}

#[tokio::test]
async fn the_receipt_tells_the_copies() {
    let cluster = shared().await;
    let store = patient(&cluster, "copies", &HdfsOptions::default());
    store.create_dir_all(&StorePath::root()).await.expect("root");
    let default =
        store.put(&path("a"), vec![bytes("x")], PutOptions::default()).await.expect("put");
    assert_eq!(default.replicas, Some(3));
    let two = store
        .put(&path("b"), vec![bytes("x")], PutOptions { replicas: Some(2) })
        .await
        .expect("put");
    assert_eq!(two.replicas, Some(2));
}

/// With this policy files that were closed came back as garbage after a DataNode died and was
/// started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erasure_coded_directories_are_refused() {
    const POLICY: &str = "XOR-2-1-1024k";
    let cluster = shared().await;
    let url = cluster.fresh_url("erasure");
    let directory =
        url.splitn(4, '/').last().map(|path| format!("/{path}")).expect("a URL with a path");
    let set = |path: &str| {
        cluster.tool(&["ec", "-enablePolicy", "-policy", POLICY]);
        cluster.tool(&["ec", "-setPolicy", "-path", path, "-policy", POLICY]);
    };
    // A store that is there, and whose VM's directory gets the policy later.
    let store = open(&url, &StoreOptions::default()).expect("open");
    let writer = writer_on(Arc::clone(&store)).await;
    committed(&writer, 1).await.expect("replicated");
    let partial = writer.begin(CheckpointId(2)).await.expect("begin");
    let below = format!("{directory}/vms/{}/checkpoints/2.1-2.partial", vm());
    tokio::task::block_in_place(|| set(&below));
    let error = partial.put_pack("ram", vec![noise(MIB, 1)]).await.expect_err("erasure coded");
    assert!(matches!(&error, StoreError::ErasureCoded { path } if *path == below), "{error}");
    assert!(!error.is_retryable());
    drop(partial);
    // The whole of it: nothing is written any more, what is there is read.
    tokio::task::block_in_place(|| set(&directory));
    let repository = Repository::open(Arc::clone(&store), Mode::MustExist).await.expect("to read");
    assert_complete(&repository, 1).await;
    let error = repository.check_redundancy().await.expect_err("erasure coded");
    assert!(matches!(error, StoreError::ErasureCoded { .. }), "{error}");
    // A new one: nothing is left in the directory.
    let new = open(&format!("{url}/new"), &StoreOptions::default()).expect("open");
    let error =
        Repository::open(Arc::clone(&new), Mode::CreateIfMissing).await.expect_err("erasure coded");
    assert!(matches!(error, StoreError::ErasureCoded { .. }), "{error}");
    assert_eq!(new.list(&StorePath::root()).await.expect("list"), []);
}

#[tokio::test]
async fn unreachable_namenode_is_reported_soon() {
    let store = HdfsStore::open("hdfs://127.0.0.1:1/x", &HdfsOptions::default()).expect("open");
    let begun = Instant::now();
    let error = store.stat(&StorePath::root()).await.expect_err("no server is there");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// No other node replaces the dead one: it is one of three, and the NameNode takes ten minutes to
/// notice.
#[tokio::test]
async fn with_a_dead_datanode_a_checkpoint_becomes_durable_in_fewer_copies() {
    let cluster = hazards().await;
    let writer = writer_on(patient(&cluster, "dead", &HdfsOptions::default())).await;
    cluster.signal("datanode-1", Signal::SIGKILL);
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    let data = noise(4 * MIB, 9);
    let begun = Instant::now();
    let pack = partial
        .put_pack("ram", vec![data.clone()])
        .await
        .expect("stored in spite of the dead node");
    eprintln!("dead DataNode: stored after {} tries in {:?}", pack.attempts, begun.elapsed());
    assert!(pack.is_short() && pack.more_requested, "{pack:?}\n{}", cluster.status());
    let durable = partial.commit(bytes("manifest")).await.expect("commit");
    assert!(durable.least_replicas() < Some(3) && durable.short_of_replicas() >= 1, "{durable:?}");
    let repository = writer.repository();
    let found = repository
        .read_pack_range(&vm(), CheckpointId(1), pack.name.as_str(), 0, data.len() as u64)
        .await;
    assert_eq!(found.expect("read"), data);
    cluster.restart("datanode-1");
    assert_copies_made_up(&cluster).await;
}

/// Once there are enough nodes again, the NameNode makes the copies that were asked for.
async fn assert_copies_made_up(cluster: &Cluster) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cluster.status().contains("under-replicated blocks: 0") {
        assert!(Instant::now() < deadline, "{}", cluster.status());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datanode_that_dies_during_an_upload_does_not_stop_it() {
    let cluster = hazards().await;
    let store = patient(&cluster, "dies", &HdfsOptions::default());
    let writer = writer_on(store).await;
    let partial = Arc::new(writer.begin(CheckpointId(1)).await.expect("begin"));
    let data = noise(96 * MIB, 4);
    let uploads: Vec<_> = (0..3)
        .map(|number| {
            let (partial, data) = (Arc::clone(&partial), data.clone());
            tokio::spawn(
                async move { partial.put_pack(&format!("ram-{number}"), vec![data]).await },
            )
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(
        !uploads.iter().any(|upload| upload.is_finished()),
        "the upload was over before the kill"
    );
    cluster.signal("datanode-2", Signal::SIGKILL);
    let mut packs = Vec::new();
    for upload in uploads {
        packs.push(upload.await.expect("no panic").expect("stored in spite of the death"));
    }
    eprintln!("DataNode died during uploads: {packs:?}");
    let partial = Arc::into_inner(partial).expect("the uploads are over");
    let _durable = partial.commit(bytes("manifest")).await.expect("commit");
    for pack in packs {
        let repository = writer.repository();
        let found = repository
            .read_pack_range(&vm(), CheckpointId(1), pack.name.as_str(), 0, pack.len)
            .await;
        assert_eq!(found.expect("read"), data);
    }
    cluster.restart("datanode-2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_datanode_delays_a_pack_but_does_not_hang_it() {
    let cluster = hazards().await;
    let writer = writer_on(patient(&cluster, "stopped-data", &impatient())).await;
    let partial = writer.begin(CheckpointId(1)).await.expect("begin");
    cluster.signal("datanode-3", Signal::SIGSTOP);
    let data = noise(2 * MIB, 3);
    let begun = Instant::now();
    let pack = partial.put_pack("ram", vec![data.clone()]).await.expect("stored in the end");
    eprintln!(
        "stopped DataNode: stored after {} tries in {:?}: {pack:?}",
        pack.attempts,
        begun.elapsed()
    );
    let _durable = partial.commit(bytes("manifest")).await.expect("commit");
    let repository = writer.repository();
    let found =
        repository.read_pack_range(&vm(), CheckpointId(1), pack.name.as_str(), 0, pack.len).await;
    assert_eq!(found.expect("read from another copy"), data);
    cluster.signal("datanode-3", Signal::SIGCONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_namenode_fails_calls_in_time_and_works_again() {
    let cluster = hazards().await;
    let store = patient(&cluster, "stopped", &impatient());
    store.create_dir_all(&StorePath::root()).await.expect("root");
    store.put(&path("a"), vec![bytes("x")], PutOptions::default()).await.expect("put");
    cluster.signal("namenode", Signal::SIGSTOP);
    let begun = Instant::now();
    let put = store.put(&path("b"), vec![noise(MIB, 1)], PutOptions::default()).await;
    let stat = store.stat(&path("a")).await;
    let elapsed = begun.elapsed();
    cluster.signal("namenode", Signal::SIGCONT);
    for error in [put.map(|_| ()).expect_err("hung"), stat.map(|_| ()).expect_err("hung")] {
        assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    }
    assert!(elapsed < Duration::from_secs(7), "{elapsed:?}");
    assert_eq!(store.read(&path("a"), 10).await.expect("read"), "x");
    store.put(&path("c"), vec![bytes("y")], PutOptions::default()).await.expect("put");
}

/// Stops the NameNode for a time, `delay` after a commit has come to its rename.
async fn commit_with_namenode_stopped(
    cluster: &Cluster,
    store: &FaultyStore,
    writer: &Writer,
    id: u64,
    delay: Duration,
    stop: Duration,
) -> Result<(), StoreError> {
    let namenode = cluster.pid("namenode");
    let before = store.calls(Op::RenameDir, "");
    let commit = {
        let writer = writer.clone();
        tokio::spawn(async move { committed(&writer, id).await })
    };
    while store.calls(Op::RenameDir, "") == before && !commit.is_finished() {
        tokio::task::yield_now().await;
    }
    let since = Instant::now();
    while since.elapsed() < delay {
        std::hint::spin_loop();
    }
    kill(namenode, Signal::SIGSTOP).expect("stop");
    tokio::time::sleep(stop).await;
    kill(namenode, Signal::SIGCONT).expect("continue");
    commit.await.expect("no panic")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namenode_stopped_for_a_moment_only_delays_a_commit() {
    let cluster = hazards().await;
    let store = FaultyStore::new(patient(&cluster, "moment", &impatient()));
    let writer = writer_on(Arc::new(store.clone())).await;
    let moment = Duration::from_secs(1);
    let outcome =
        commit_with_namenode_stopped(&cluster, &store, &writer, 1, Duration::ZERO, moment).await;
    outcome.expect("the rename waited for the NameNode");
    assert_complete(writer.repository(), 1).await;
}

/// Whatever the NameNode does with the rename when it wakes up: all of the checkpoint is there or
/// none of it, and the writer continues with the next number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namenode_stopped_during_the_commit_never_makes_half_a_checkpoint() {
    let cluster = hazards().await;
    let options = HdfsOptions {
        call_timeout: Duration::from_millis(1500),
        stall_timeout: Duration::from_secs(5),
        ..HdfsOptions::default()
    };
    let store = FaultyStore::new(patient(&cluster, "commit", &options));
    let writer = writer_on(Arc::new(store.clone())).await;
    for id in 1..=6 {
        // Before the rename is sent, while it is under way, after it; and a wake-up before or after
        // we give up.
        let delay = Duration::from_micros(400) * u32::try_from(id).expect("small");
        let stop = Duration::from_millis(if id % 2 == 0 { 2500 } else { 6000 });
        let outcome =
            commit_with_namenode_stopped(&cluster, &store, &writer, id, delay, stop).await;
        let exists = exists_for_good(&writer, id).await;
        eprintln!(
            "NameNode stopped {delay:?} into a commit for {stop:?}: exists: {exists}, {outcome:?}"
        );
        match outcome {
            Ok(()) => assert!(exists, "reported as durable"),
            Err(StoreError::CommitUnknown { .. }) => {}
            Err(error) => assert!(!exists, "exists in spite of: {error}"),
        }
        if exists {
            assert_complete(writer.repository(), id).await;
        }
    }
    committed(&writer, 100).await.expect("it continues");
}

/// Whether the checkpoint is there once the NameNode has had time for what was queued.
async fn exists_for_good(writer: &Writer, id: u64) -> bool {
    tokio::time::sleep(Duration::from_secs(1)).await;
    let found = writer.repository().checkpoints(&vm()).await.expect("it answers again");
    found.contains(&CheckpointId(id))
}

/// Two hosts: each a client of its own.
#[tokio::test]
async fn another_host_fences_and_reads() {
    let cluster = shared().await;
    let url = cluster.fresh_url("hosts");
    let host = || open(&url, &StoreOptions::default()).expect("open");
    let old = writer_on(host()).await;
    committed(&old, 1).await.expect("commit");
    let partial = old.begin(CheckpointId(2)).await.expect("begin");
    let new = writer_on(host()).await;
    let error = partial.commit(Bytes::from_static(b"late")).await.expect_err("fenced");
    assert!(error.is_fenced(), "{error}");
    assert_complete(new.repository(), 1).await;
    committed(&new, 2).await.expect("commit");
}

/// Prints how fast this cluster takes files, with and without syncing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_uploads() {
    let cluster = shared().await;
    for (sync, parallel) in [(true, 1), (false, 1), (true, 2), (false, 2), (true, 4), (false, 4)] {
        let options = HdfsOptions { sync, ..HdfsOptions::default() };
        let store = patient(&cluster, "measure", &options);
        store.create_dir_all(&StorePath::root()).await.expect("root");
        let data = noise(64 * MIB, 1);
        let begun = Instant::now();
        let uploads: Vec<_> = (0..parallel)
            .map(|number| {
                let (store, data) = (store.clone(), data.clone());
                let at = path(&format!("a-{number}"));
                tokio::spawn(async move { store.put(&at, vec![data], PutOptions::default()).await })
            })
            .collect();
        for upload in uploads {
            upload.await.expect("no panic").expect("put");
        }
        let rate = f64::from(64 * parallel) / begun.elapsed().as_secs_f64();
        eprintln!("sync {sync}, {parallel} files of 64 MiB at once: {rate:.0} MiB/s");
        let begun = Instant::now();
        for number in 0..20 {
            let at = path(&format!("small-{number}"));
            store.put(&at, vec![noise(4096, 1)], PutOptions::default()).await.expect("put");
        }
        eprintln!("sync {sync}: a file of 4 KiB takes {:?}", begun.elapsed() / 20);
        let begun = Instant::now();
        for number in 0..200u64 {
            store.read_range(&path("a-0"), number << 18, 1 << 16).await.expect("range");
        }
        eprintln!("a range of 64 KiB takes {:?}", begun.elapsed() / 200);
    }
}

/// Prints what single tries cost while a DataNode is dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_tries_with_a_dead_datanode() {
    let cluster = hazards().await;
    cluster.signal("datanode-1", Signal::SIGKILL);
    for (sync, replicas) in [(true, 3), (false, 3), (true, 2), (false, 2), (true, 1)] {
        let options = HdfsOptions { sync, ..impatient() };
        let store = patient(&cluster, "tries", &options);
        store.create_dir_all(&StorePath::root()).await.expect("root");
        let mut outcomes = Vec::new();
        for number in 0..24 {
            let begun = Instant::now();
            let at = path(&format!("a-{number}"));
            let replicas = Some(replicas);
            let outcome = store.put(&at, vec![noise(4 * MIB, 1)], PutOptions { replicas }).await;
            let word = match outcome {
                Ok(_) => "ok",
                Err(StoreError::Timeout { .. }) => "HUNG",
                Err(_) => "failed",
            };
            outcomes.push(format!("{word} {}", begun.elapsed().as_millis()));
        }
        eprintln!("sync {sync}, {replicas} copies (ms): {}", outcomes.join(", "));
    }
    cluster.restart("datanode-1");
}
