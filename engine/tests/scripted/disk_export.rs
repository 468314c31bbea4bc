//! Disks of a checkpoint as QEMU reads them while its guest runs.

use checkpoint_format::PAGE_SIZE;
use checkpoint_store::{Fault, FaultRule, Op};
use engine::restore::disk_export::{DiskExports, Troubles, can_arrive};
use qmp_bridge::nbd::NbdClient;
use std::pin::pin;

use super::on_demand::{LARGE, reader};

#[tokio::test]
async fn exported_disk_is_the_whole_and_waits_for_a_store_that_is_away() {
    let (_scene, store, reader) = reader(LARGE).await;
    let disk = reader.source().manifest().disks[0].clone();
    let record = reader.source().manifest().space(disk.space.as_ref().unwrap()).unwrap().clone();
    let whole = reader.source().read_whole(&record).await.unwrap();
    assert!(whole.len() % PAGE_SIZE == 0 && whole.iter().any(|byte| *byte != 0));
    let mut disks = DiskExports::new(reader);
    let whole_disk = (disk.space.clone().unwrap(), disk.virtual_size);
    disks.add(&disk.node, whole_disk, None, false).unwrap();
    let mut troubles = disks.troubles();
    let exports = disks.exports().unwrap();
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let server = tokio::spawn(async move {
        let (read, write) = tokio::io::split(theirs);
        exports.serve(read, write).await
    });
    let (read, write) = tokio::io::split(ours);
    let client = NbdClient::over(read, write, &disk.node, &[]).await.unwrap();
    // A page that was not read yet, so that no frame of it is kept.
    let start = client.size() - whole.len() as u64;
    store.inject(FaultRule::always(Op::ReadRange, Fault::FailBefore).on(".pack"));
    assert!(client.read(start, 4096).await.is_err(), "no guest runs that would wait");
    assert!(disks.wait_for_reads().is_err(), "what failed until now is an error of the restore");
    {
        let mut read = pin!(client.read(start, 4096));
        let found = tokio::select! {
            early = &mut read => panic!("{early:?} though the store is away"),
            found = troubles.wait_for(|found| found.away.is_some()) => found.unwrap().clone(),
        };
        assert!(found.damaged.is_none(), "{found:?}");
        store.heal();
        assert_eq!(read.await.unwrap(), whole[..4096]);
    }
    assert_eq!(*troubles.borrow_and_update(), Troubles::default(), "it is over");
    assert!(client.read(start, whole.len() as u32).await.unwrap() == whole);
    client.close().await;
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn exported_disks_are_writable_qcow2_of_a_size_that_qemu_opens() {
    let (_scene, _, reader) = reader(LARGE).await;
    let raw = reader.source().manifest().disks[0].clone();
    let mut disk = raw.clone();
    disk.format = "qcow2".into();
    assert!(can_arrive(&disk) && !can_arrive(&raw));
    disk.read_only = true;
    assert!(!can_arrive(&disk));
    disk.read_only = false;
    disk.virtual_size.0 = qmp_bridge::synthetic_qcow2::MAX_DISK + 1;
    assert!(!can_arrive(&disk));
}
