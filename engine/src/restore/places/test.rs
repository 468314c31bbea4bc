//! What is read of a checkpoint does not depend on the age of its lineage.

use super::super::on_demand::OnDemand;
use super::super::source::Source;
use crate::checkpoint::synthetic::{Metadata, Synthetic, noise, vm};
use crate::progress::Silent;
use checkpoint_format::{ByteLen, CheckpointId, PageIndex, SpaceName};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Pages that the guest writes often.
const HOT: u64 = 30;

/// What is read until a guest runs that needs a part of its memory.
#[derive(Debug)]
struct Reads {
    objects: u64,
    calls: u64,
    bytes: u64,
    /// Of manifests and the index.
    metadata: u64,
}

async fn lineage() -> Synthetic {
    let mut made = Synthetic::new().await;
    made.resize(1000, 0);
    (made.page, made.pages, made.pack_bytes) = (noise, 64, ByteLen(24 << 20));
    made.zeros = 0;
    // With these a manifest is as long as that of a small VM.
    made.arguments = vec!["virtio-blk-pci,id=disk0,drive=drive0".to_owned(); 100];
    made.writes = |page, id| (page * 31 + id * 17).is_multiple_of(if page < HOT { 3 } else { 97 });
    made
}

async fn reads(made: &Synthetic, id: u64) -> Reads {
    let before = made.store.reads().len();
    let name = vm();
    let source = Source::open(&made.repository, &name, CheckpointId(id), Arc::new(Silent));
    let reader = OnDemand::new(source.await.unwrap(), ByteLen(32 << 20));
    let space = SpaceName::ram("pc.ram").unwrap();
    for page in (0..HOT).chain((0..10).map(|number| HOT + number * 97)) {
        reader.read_around(&space, PageIndex(page)).await.unwrap();
    }
    let reads = &made.store.reads()[before..];
    let files: BTreeSet<String> = reads.iter().map(|(path, _)| path.to_string()).collect();
    let bytes = reads.iter().map(|(_, bytes)| bytes).sum();
    let of_manifests = reads.iter().filter(|(path, _)| path.name() == "manifest.json");
    let metadata = of_manifests.map(|(_, bytes)| bytes).sum();
    Reads { objects: files.len() as u64, calls: reads.len() as u64, bytes, metadata }
}

#[tokio::test]
async fn reads_until_the_guest_runs_do_not_grow_with_the_lineage() {
    let mut made = lineage().await;
    let mut found = Vec::new();
    for id in 1..=1000 {
        made.commit(id).await;
        if id == 10 || id == 1000 {
            found.push(reads(&made, id).await);
        }
    }
    let (young, old) = (&found[0], &found[1]);
    println!("{young:?} {old:?}, {:?}", made.metadata);
    let is_flat = |old: u64, young: u64| old * 10 <= young * 12;
    assert!(is_flat(old.objects, young.objects), "{found:?}");
    assert!(is_flat(old.calls, young.calls), "{found:?}");
    assert!(is_flat(old.bytes, young.bytes), "{found:?}");
    assert!(is_flat(old.metadata, young.metadata), "{found:?}");
    let Metadata { written, written_without, .. } = made.metadata;
    assert!(written <= 2 * written_without, "{:?}", made.metadata);
}
