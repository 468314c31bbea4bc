//! VMs on a real HDFS: the ordinary way, with DataNodes that die, and with a NameNode that hangs.

use checkpoint_format::CheckpointId;
use engine::checkpoint::outcome::Kind;
use std::time::{Duration, Instant};
use stillpoint_tests::{Cluster, Lab, Recipe, TestVm, newest_qemu, stop_and_continue, wait_until};

const REPLICAS: u16 = 3;
/// A hung NameNode is given up after this; with two more tries and what lies between a checkpoint
/// may take some times as long.
const STORE_TIMEOUT_SECONDS: u64 = 4;

fn lab(url: &str) -> Lab {
    Lab::new(&newest_qemu()).with_store(url)
}

fn busy() -> Recipe {
    Recipe::witness("q35-virtio.cfg")
        .words("witness.table_mib=24 witness.check=12288 witness.rate=4000")
}

/// Copies that a checkpoint has, as the store said when it was written.
fn replicas(vm: &TestVm) -> u16 {
    vm.checkpoint().outcome.replicas.expect("HDFS says how many copies it made")
}

#[test]
fn a_vm_lives_on_hdfs() {
    let cluster = Cluster::shared();
    let lab = lab(&cluster.fresh_store("machine"));
    let vm = lab.start("m", &Recipe::witness("q35-virtio.cfg"));
    vm.wait_for_witness();
    vm.checkpoint();
    vm.assert_makes_progress();
    let second = vm.checkpoint();
    assert_eq!((second.outcome.kind, second.outcome.replicas), (Kind::Incremental, Some(REPLICAS)));
    vm.assert_makes_progress();
    vm.kill();
    std::fs::remove_dir_all(lab.path().join("m")).expect("the test's directory");
    let restored = lab.restore("m", "m", &[]);
    restored.assert_continues(&second);
    assert_eq!(restored.checkpoint().outcome.parent, Some(second.outcome.id));
    assert_eq!(lab.list("m"), [1, 2, 3].map(CheckpointId));
    lab.verify("m");
}

#[test]
fn a_datanode_that_dies_costs_copies_and_no_checkpoint() {
    let cluster = Cluster::to_harm();
    let lab = lab(&cluster.fresh_store("datanode"));
    let vm = lab.start("m", &busy());
    vm.wait_for_witness();
    // Before the store itself is made.
    cluster.kill("datanode-2");
    let outcome = vm.checkpoint().outcome;
    eprintln!("one of three DataNodes dead: durable after {:.0} ms", outcome.durable_ms);
    assert!(outcome.replicas.is_some_and(|copies| (1..REPLICAS).contains(&copies)), "{outcome:?}");
    assert!(
        outcome.notes.iter().any(|note| note.contains("replicas")),
        "no note about missing replicas: {outcome:?}"
    );
    cluster.restart("datanode-2");
    let before = cluster.blocks_begun("datanode-3");
    let taken = std::thread::scope(|scope| {
        let upload = scope.spawn(|| vm.checkpoint());
        let is_under_way = || cluster.blocks_begun("datanode-3") > before || upload.is_finished();
        assert!(wait_until(Duration::from_secs(60), is_under_way), "it receives nothing");
        cluster.kill("datanode-3");
        upload.join().expect("durable all the same")
    });
    eprintln!(
        "one of them killed during the upload: durable after {:.0} ms",
        taken.outcome.durable_ms
    );
    vm.assert_makes_progress();
    cluster.restart("datanode-3");
    let last = vm.checkpoint();
    assert_eq!(last.outcome.parent, Some(taken.outcome.id));
    lab.verify("m");
    vm.kill();
    lab.restore(&taken.name, "taken", &[]).assert_continues(&taken);
    lab.restore("m", "last", &[]).assert_continues(&last);
}

#[test]
fn a_namenode_that_hangs_fails_the_checkpoint_and_stops_no_guest() {
    let cluster = Cluster::to_harm();
    let mut lab = lab(&cluster.fresh_store("namenode"));
    lab.set("STILLPOINT_STORE_TIMEOUT", STORE_TIMEOUT_SECONDS.to_string());
    let vm = lab.start("m", &busy());
    vm.wait_for_witness();
    vm.checkpoint();
    let hung = stop_and_continue(cluster.pid("namenode"));
    let begun = Instant::now();
    let ran = std::thread::scope(|scope| {
        let failing = scope.spawn(|| vm.try_checkpoint());
        vm.assert_makes_progress();
        failing.join().expect("it ends")
    });
    let message = ran.expect_failure(4);
    let most = Duration::from_secs(STORE_TIMEOUT_SECONDS * 5);
    assert!(begun.elapsed() < most, "failed only after {:?}: {message}", begun.elapsed());
    vm.assert_makes_progress();
    drop(hung);
    let taken = vm.checkpoint();
    assert_eq!(
        (taken.outcome.kind, taken.outcome.parent),
        (Kind::Incremental, Some(CheckpointId(1)))
    );
    assert_eq!(replicas(&vm), REPLICAS);
    lab.verify("m");
    vm.kill();
    lab.restore(&taken.name, "restored", &[]).assert_continues(&taken);
}
