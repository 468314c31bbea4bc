//! Layers through a store and back.

use super::read::StoredLayer;
use super::{digest, ensure, provide};
use crate::progress::Silent;
use checkpoint_format::{BLOCK_SIZE, ByteLen, ContentDigest, DigestForm, LayerRef};
use checkpoint_store::{LocalStore, Mode, Repository};
use futures::TryStreamExt;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

struct Lab {
    folder: tempfile::TempDir,
    repository: Repository,
}

async fn lab() -> Lab {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalStore::new(folder.path().join("store")).unwrap());
    let repository = Repository::open(store, Mode::CreateIfMissing).await.unwrap();
    Lab { folder, repository }
}

impl Lab {
    fn image(&self, name: &str, len: u64, data: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.folder.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        data.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        path
    }

    async fn store(&self, path: &Path) -> (LayerRef, u64) {
        let found = digest::of_file(path).unwrap();
        let stored = ensure(&self.repository, path, found).await.unwrap();
        let path = "nowhere".to_owned();
        (
            LayerRef {
                digest: found.digest,
                form: found.form,
                len: found.len,
                format: "raw".to_owned(),
                path,
            },
            stored,
        )
    }

    /// Where nothing is cached yet.
    async fn fetch(&self, layer: &LayerRef) -> PathBuf {
        let cached = vm::cache::directory().join("layers").join(layer.digest.to_string());
        let _ = std::fs::remove_file(&cached);
        provide(&self.repository, layer, self.folder.path(), &Silent).await.unwrap().path
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Two terabytes of holes with a hundred MiB of data in three places.
#[tokio::test(flavor = "multi_thread")]
async fn layer_of_a_huge_sparse_image_costs_its_data() {
    let lab = lab().await;
    let begun = Instant::now();
    let len = (2 << 40) + 512;
    let data = [
        (0, noise(1, 60 << 20)),
        ((1 << 40) + 4096, noise(2, 40 << 20)),
        (len - 512, vec![7; 512]),
    ];
    let image = lab.image("base.raw", len, &data);
    let (layer, stored) = lab.store(&image).await;
    assert_eq!((layer.form, layer.len), (DigestForm::Blocks, ByteLen(len)));
    assert!((100 << 20..102 << 20).contains(&stored), "{stored}");
    assert_eq!(lab.store(&image).await.1, 0, "it is there already");
    let fetched = lab.fetch(&layer).await;
    let facts = std::fs::metadata(&fetched).unwrap();
    assert!(
        facts.len() == len && facts.blocks() * 512 < 110 << 20,
        "holes were filled: {}",
        facts.blocks() * 512
    );
    let file = File::open(&fetched).unwrap();
    for (at, expected) in &data {
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, *at).unwrap();
        assert!(found == *expected, "at {at}");
    }
    assert_eq!(digest::of_file(&fetched).unwrap().digest, layer.digest);
    // A local copy serves.
    let local = LayerRef { path: image.display().to_string(), ..layer.clone() };
    assert_eq!(
        provide(&lab.repository, &local, Path::new("/"), &Silent).await.unwrap().bytes_read,
        0
    );
    eprintln!("2 TiB of holes with 100 MiB of data: {:?}", begun.elapsed());
    std::fs::remove_file(&fetched).unwrap();
}

/// Blocks of one image in another, in an order of its own, repeated, zero and short at the end.
#[tokio::test(flavor = "multi_thread")]
async fn layers_share_blocks_and_come_back_as_they_were() {
    let lab = lab().await;
    let first =
        lab.image("first.raw", 9 << 20, &[(0, noise(1, 4 << 20)), (8 << 20, noise(9, 1000))]);
    let (layer, _) = lab.store(&first).await;
    assert_eq!(layer.form, DigestForm::Content);
    let block =
        |number: u64| noise(1, 4 << 20)[number as usize * BLOCK_SIZE..][..BLOCK_SIZE].to_vec();
    let order = [5, 3, 60, 3, 0, 1, 2];
    let mut data: Vec<(u64, Vec<u8>)> =
        (0_u64..).zip(order).map(|(at, number)| (at * BLOCK_SIZE as u64, block(number))).collect();
    data.push((20 << 20, noise(5, 300_000)));
    data.push((21 << 20, noise(5, 300_000)));
    let second = lab.image("second.raw", (22 << 20) + 77, &data);
    let (other, stored) = lab.store(&second).await;
    assert!(stored < 330_000, "{stored}");
    for (layer, image) in [(&layer, &first), (&other, &second)] {
        let fetched = lab.fetch(layer).await;
        assert!(std::fs::read(&fetched).unwrap() == std::fs::read(image).unwrap());
        std::fs::remove_file(fetched).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layer_that_is_another_than_the_checkpoint_says_is_refused() {
    let lab = lab().await;
    let image = lab.image("base.raw", 3 << 20, &[(0, noise(3, 1 << 20))]);
    let (layer, _) = lab.store(&image).await;
    for wrong in [
        LayerRef { len: ByteLen(4 << 20), ..layer.clone() },
        LayerRef { form: DigestForm::Blocks, ..layer.clone() },
    ] {
        let error =
            provide(&lab.repository, &wrong, lab.folder.path(), &Silent).await.err().unwrap();
        assert_eq!(vm::error::class_of(&error), vm::error::Class::Damaged, "{error:#}");
    }
}

/// One block after the other, as a layer was fetched before; and in batches.
/// `cargo test --release -- --ignored --nocapture fetch_benchmark`; STORE_URL names another store
/// than a directory.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a benchmark"]
async fn fetch_benchmark() {
    let mut lab = lab().await;
    if let Ok(url) = std::env::var("STORE_URL") {
        lab.repository =
            crate::stores::open(&format!("{url}/{}", std::process::id()), Mode::CreateIfMissing)
                .await
                .unwrap();
    }
    let len = 1_u64 << 30;
    let words: Vec<u8> = (0..4096_u32).flat_map(|number| (number * number).to_le_bytes()).collect();
    let pieces = (0..len >> 20).map(|at| {
        let mut piece = noise(at, 1 << 20);
        piece[500_000..516_384].copy_from_slice(&words);
        (at << 20, piece)
    });
    let image = lab.image("base.raw", len, &pieces.collect::<Vec<_>>());
    let begun = Instant::now();
    let (layer, _) = lab.store(&image).await;
    eprintln!("stored in {:?}", begun.elapsed());
    let begun = Instant::now();
    let count = one_by_one(&lab.repository, &layer.digest).await;
    eprintln!("{count} blocks one by one: {:?}", begun.elapsed());
    let begun = Instant::now();
    let fetched = lab.fetch(&layer).await;
    eprintln!("in batches, written, synced and digested: {:?}", begun.elapsed());
    let begun = Instant::now();
    let stored = StoredLayer::open(&lab.repository, &layer.digest).await.unwrap();
    let batches: Vec<usize> =
        stored.blocks().map_ok(|batch| batch.len()).try_collect().await.unwrap();
    eprintln!("in {} batches, only read: {:?}", batches.len(), begun.elapsed());
    assert_eq!(batches.iter().sum::<usize>(), count);
    std::fs::remove_file(fetched).unwrap();
}

async fn one_by_one(repository: &Repository, digest: &ContentDigest) -> usize {
    let manifest = super::read::read_manifest(repository, digest).await.unwrap();
    let layer = StoredLayer::open(repository, digest).await.unwrap();
    let mut indexes = std::collections::HashMap::new();
    let file = tempfile::tempfile().unwrap();
    for (number, at) in layer.table.stored() {
        let record = &manifest.packs[at.pack.as_usize()];
        let name = record.name.as_str();
        if let std::collections::hash_map::Entry::Vacant(place) = indexes.entry(at.pack) {
            let range = record.info.footer().trailer_range();
            let bytes = repository
                .read_layer_range(digest, name, range.start, range.end - range.start)
                .await
                .unwrap();
            place.insert(record.info.parse_index(&bytes).unwrap());
        }
        let entry = *indexes[&at.pack].frame(at.frame).unwrap();
        let range = entry.byte_range();
        let bytes = repository
            .read_layer_range(digest, name, range.start, range.end - range.start)
            .await
            .unwrap();
        let content = entry.decode(&bytes).unwrap();
        assert_eq!(ContentDigest::of(&content), at.digest);
        file.write_all_at(&content, number * BLOCK_SIZE as u64).unwrap();
    }
    file.sync_all().unwrap();
    digest::of_file(Path::new("/proc/self/exe")).unwrap();
    layer.table.stored().count()
}
