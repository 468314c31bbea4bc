//! A user who can write the store chooses every byte of it, and every digest. The tests change each
//! byte and each value of a real checkpoint, make the digests right again, and do what the commands
//! do with the result: show, ls, verify, and a restore's plan. No command panics or trusts a number
//! before it has memory for it, and each reports wrong content as damage.

use super::{describe, row, summary};
use anyhow::{Result, ensure};
use checkpoint_format::*;
use checkpoint_store::{LocalStore, Mode, Repository};
use engine::layers;
use engine::lineage::{self, CheckpointName, checkpoints, resolve};
use engine::progress::Silent;
use engine::restore::Places;
use engine::restore::Planned;
use engine::restore::Source;
use engine::restore::Transition;
use engine::verify;
use futures::TryStreamExt;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vm::error::{Class, class_of, explain};

#[path = "../../../../checkpoint-format/tests/common/mod.rs"]
mod common;

/// Address space that all of it may take beyond what it begins with: the largest space that is read
/// whole, a heap for each thread, and far less than the least lie that is not refused as such.
const MOST_BYTES: u64 = 3 << 30;
/// Values in which counts, kinds and texts break.
const BYTES: [u8; 5] = [0, 1, 0xff, b'9', b'"'];

fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// A store with one checkpoint: a pack, two disks and their layer.
struct Sample {
    folder: tempfile::TempDir,
    repository: Repository,
    manifest: Manifest,
    layer: LayerManifest,
    table: Vec<u8>,
}

impl Sample {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::new(folder.path().join("store")).unwrap());
        let repository = Repository::open(store, Mode::CreateIfMissing).await.unwrap();
        let image = folder.path().join("base.raw");
        std::fs::write(
            &image,
            [vec![7; BLOCK_SIZE], vec![0; BLOCK_SIZE], common::noise(1), vec![1; 8]].concat(),
        )
        .unwrap();
        let found = layers::of_file(&image).unwrap();
        layers::ensure(&repository, &image, found).await.unwrap();
        let manifest = manifest(LayerRef {
            digest: found.digest,
            form: found.form,
            len: found.len,
            format: "raw".to_owned(),
            path: "/nowhere/base".to_owned(),
        });
        let place = folder.path().join("store/layers").join(found.digest.to_string());
        let layer =
            LayerManifest::parse(&std::fs::read(place.join("layer.json")).unwrap()).unwrap();
        let table = std::fs::read(place.join("blocks.table")).unwrap();
        let sample = Self { folder, repository, manifest, layer, table };
        std::fs::create_dir_all(sample.checkpoint()).unwrap();
        sample.put("0000.pack", &common::bytes(&common::sample_pack(PackId([0xab; 16]))));
        sample.put("manifest.json", &sample.manifest.encode().unwrap());
        sample
    }

    fn checkpoint(&self) -> PathBuf {
        self.folder.path().join("store/vms/web-1/checkpoints/1")
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.checkpoint().join(name), bytes).unwrap();
    }

    fn put_layer(&self, name: &str, bytes: &[u8]) {
        let place = self.folder.path().join("store/layers").join(self.layer.digest.to_string());
        std::fs::write(place.join(name), bytes).unwrap();
    }

    /// Each is done, or ends with the code of damage or of the store.
    async fn judge(&self, what: &str) {
        let name: CheckpointName = "web-1".parse().unwrap();
        let looked = [
            ("show", self.show(&name).await),
            ("ls", self.ls(&name).await),
            ("verify", self.verify(&name).await),
        ];
        let planned = self.plan(&name).await;
        for (command, result) in looked.into_iter().chain([("restore", planned)]) {
            let Err(error) = result else { continue };
            let text = explain(&error);
            assert!(
                !text.contains("panicked") && !text.contains("internal error"),
                "{what}: {command}: {text}"
            );
            let class = class_of(&error);
            let fits = [Class::Damaged, Class::Store].contains(&class)
                || command == "restore" && class == Class::Refused;
            assert!(fits, "{what}: {command} ends with {class:?}: {text}");
        }
    }

    async fn show(&self, name: &CheckpointName) -> Result<()> {
        let id = resolve(&self.repository, name).await?;
        let manifest = lineage::manifest(&self.repository, &name.vm, id).await?;
        ensure!(
            !describe(&manifest).is_empty() && serde_json::to_value(&manifest)?.is_object(),
            "nothing is shown"
        );
        Ok(())
    }

    async fn ls(&self, name: &CheckpointName) -> Result<()> {
        for id in checkpoints(&self.repository, &name.vm).await? {
            let manifest = lineage::manifest(&self.repository, &name.vm, id).await?;
            ensure!(
                !row(&manifest).is_empty() && summary(&manifest).is_object(),
                "nothing is listed"
            );
        }
        Ok(())
    }

    async fn verify(&self, name: &CheckpointName) -> Result<()> {
        let problems = verify::read_back(&self.repository, name, &Silent).await?.problems;
        if problems.is_empty() { Ok(()) } else { Err(vm::error::damaged(problems.join("; "))) }
    }

    async fn plan(&self, name: &CheckpointName) -> Result<()> {
        let source =
            Source::open(&self.repository, &name.vm, CheckpointId(1), Arc::new(Silent)).await?;
        let manifest = source.manifest();
        vm::launch::saved::check_record(&manifest.vm_record)?;
        Transition::choose(manifest.run_state, false, false)?;
        for space in &manifest.spaces {
            let map = source.map(&space.name).await?;
            let mut runs = std::pin::pin!(source.read(&map));
            while runs.try_next().await?.is_some() {}
        }
        for space in
            manifest.spaces.iter().filter(|space| space.name.as_str().starts_with("state:"))
        {
            source.read_whole(space).await?;
        }
        let places = Places { manifest, dir: Path::new("/srv/new"), map: &[] };
        Planned::of(&places, &qemu_cmdline::restorable::Wishes::default())?;
        Ok(())
    }
}

fn manifest(layer: LayerRef) -> Manifest {
    let mut manifest = common::sample_manifest();
    manifest.id = CheckpointId(1);
    (manifest.parent, manifest.kind) = (None, CheckpointKind::Full);
    manifest.disks.iter_mut().for_each(|disk| disk.backing = vec![layer.clone()]);
    manifest.disks[1].virtual_size = layer.len;
    manifest.vm_record.files = vec![LayerRef { path: "vmlinuz".to_owned(), ..layer }];
    manifest
}

/// Every place in the document, as a JSON pointer.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(number, one)| places(one, &format!("{at}/{number}"), found)),
        Value::Object(map) => {
            map.iter().for_each(|(key, one)| places(one, &format!("{at}/{key}"), found))
        }
        _ => {}
    }
}

fn lies(value: &Value) -> Vec<Value> {
    match value {
        Value::Number(number) => {
            let now = number.as_u64().unwrap_or(0);
            let numbers = [
                0,
                1,
                now.wrapping_sub(1),
                now + 1,
                now << 20,
                u64::from(u32::MAX),
                1 << 40,
                1 << 63,
                u64::MAX,
            ];
            numbers.map(|number| json!(number)).to_vec()
        }
        Value::String(text) => ["", "..", "../../x", "a\u{0}b", "\u{1b}[2J", "x=y,z"]
            .iter()
            .map(|lie| json!(lie))
            .chain([json!(text.repeat(2))])
            .collect(),
        Value::Array(list) => vec![json!([]), list.iter().chain(list).cloned().collect()],
        Value::Object(_) => vec![json!({})],
        Value::Bool(now) => vec![json!(!now)],
        Value::Null => vec![json!(0), json!("x")],
    }
}

/// A file of text with each value, and then each byte, another.
fn texts(kind: &str, file: &[u8]) -> Vec<(String, Vec<u8>)> {
    let body = common::body(file);
    let document: Value = serde_json::from_slice(body).unwrap();
    let mut all = Vec::new();
    places(&document, "", &mut all);
    let mut changed = Vec::new();
    for place in all {
        for lie in lies(document.pointer(&place).unwrap()) {
            let what = format!("{kind} {place} = {lie}");
            let mut document = document.clone();
            *document.pointer_mut(&place).unwrap() = lie;
            changed.push((what, common::envelope(kind, &serde_json::to_vec(&document).unwrap())));
        }
    }
    for at in (0..body.len()).step_by(2) {
        let mut body = body.to_vec();
        body[at] = BYTES[at % BYTES.len()];
        changed.push((format!("{kind} byte {at}"), common::envelope(kind, &body)));
    }
    changed
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_manifest_is_damage_to_every_command() {
    let sample = Sample::new().await;
    let name = "web-1".parse().unwrap();
    for result in [
        sample.show(&name).await,
        sample.ls(&name).await,
        sample.verify(&name).await,
        sample.plan(&name).await,
    ] {
        result.unwrap();
    }
    let before = address_space();
    for (what, file) in texts("stillpoint-manifest", &sample.manifest.encode().unwrap()) {
        sample.put("manifest.json", &file);
        sample.judge(&what).await;
    }
    assert!(address_space() - before < MOST_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_pack_index_is_damage_to_every_command() {
    let sample = Sample::new().await;
    let good = common::bytes(&common::sample_pack(PackId([0xab; 16])));
    let raw_len =
        PackFooter::parse(&good[good.len() - FOOTER_LEN..]).unwrap().trailer_raw_len as usize;
    let before = address_space();
    for at in 0..raw_len {
        let value = BYTES[at % BYTES.len()];
        let pack = common::with_trailer(&good, |raw| raw[at] = value);
        let footer = PackFooter::parse(&pack[pack.len() - FOOTER_LEN..]).unwrap();
        let mut manifest = sample.manifest.clone();
        let info = &mut manifest.packs[0].info;
        info.len = footer.pack_len;
        (info.trailer_len, info.trailer_raw_len, info.trailer_checksum) =
            (footer.trailer_len, footer.trailer_raw_len, footer.trailer_checksum);
        sample.put("0000.pack", &pack);
        sample.put("manifest.json", &manifest.encode().unwrap());
        sample.judge(&format!("byte {at} of the index is {value}")).await;
    }
    assert!(address_space() - before < MOST_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_layer_is_damage_to_every_command() {
    let sample = Sample::new().await;
    let before = address_space();
    for (what, file) in texts("stillpoint-layer", &sample.layer.encode().unwrap()) {
        sample.put_layer("layer.json", &file);
        sample.judge(&what).await;
    }
    let raw = zstd::bulk::decompress(&sample.table[8..], 1 << 20).unwrap();
    for at in 0..raw.len() {
        let value = BYTES[at % BYTES.len()];
        let mut raw = raw.clone();
        raw[at] = value;
        let table = [&sample.table[..8], &zstd::bulk::compress(&raw, 1).unwrap()].concat();
        let mut layer = sample.layer.clone();
        layer.table.len = ByteLen(table.len() as u64);
        layer.table.digest = ContentDigest::of(&table);
        sample.put_layer("blocks.table", &table);
        sample.put_layer("layer.json", &layer.encode().unwrap());
        sample.judge(&format!("byte {at} of the block table is {value}")).await;
    }
    assert!(address_space() - before < MOST_BYTES);
}
