//! Verification: reads back every pack, frame, page digest and layer block that a restore could
//! need.

mod indexes;

use crate::layers::{Content, StoredLayer};
use crate::lineage::{self, CheckpointName, Lineage, ManifestFile};
use crate::progress::{Advance, Progress};
use crate::stores;
use anyhow::{Context, Result};
use checkpoint_format::{
    CheckpointId, ContentDigest, ContentHasher, DigestForm, FOOTER_LEN, HEADER_LEN, Manifest,
    PAGE_SIZE, PackFooter, PackHeader, PackIndex, PackRecord, PageDigest, PageRun, RunSource, Slot,
    as_index,
};
use checkpoint_store::Repository;
use futures::TryStreamExt;
use indexes::Indexes;
use serde::Serialize;
use std::collections::BTreeSet;
use vm::error::{EngineError, InPhase, Phase, damaged, explain};

/// A read of the store: whole frames, next to each other.
const READ_BYTES: u64 = 8 << 20;

/// What was read back. As JSON it is what `stillpoint verify --json` prints, but for `ok`.
#[derive(Default, Serialize)]
pub struct Report {
    /// Checkpoints, each with its manifest.
    pub checkpoints: u64,
    /// Packs of those checkpoints.
    pub packs: u64,
    /// Frames of those packs, each decompressed.
    pub frames: u64,
    /// Pages of those frames, each compared with its digest.
    pub pages: u64,
    /// Bytes that were read back: of frames as the store holds them, of layers as their files had
    /// them.
    pub bytes: u64,
    /// Layers that the checkpoints name, each counted once.
    pub layers: u64,
    /// What a restore would not find as it was stored.
    pub problems: Vec<String>,
}

/// Reads back the checkpoint that is named and what it needs, or every checkpoint of the VM.
/// Damage that is found is no error but in [`Report::problems`].
///
/// # Errors
/// When the store does not answer, or has no such checkpoint; damaged when a manifest cannot be
/// read, so that nothing is known of the rest.
pub async fn run(
    store: &str,
    name: &CheckpointName,
    progress: &dyn Progress,
) -> Result<Report, EngineError> {
    let repository = stores::open_existing(store).await?;
    read_back(&repository, name, progress).await.in_phase(Phase::Verify)
}

/// The same of a store that is open.
///
/// # Errors
/// As [`run`].
pub async fn read_back(
    repository: &Repository,
    name: &CheckpointName,
    progress: &dyn Progress,
) -> Result<Report> {
    let newest = lineage::resolve(repository, name).await?;
    let files = match name.id {
        Some(_) => Lineage::read(repository, &name.vm, newest).await?.files,
        None => all(repository, name).await?,
    };
    let manifests = || files.iter().map(|file| &file.manifest);
    let mut report = Report::default();
    let packs = manifests().flat_map(|manifest| &manifest.packs);
    let total = packs.fold(0, |sum: u64, pack| sum.saturating_add(pack.info.len.0));
    let work = progress.begin("verify", total);
    for manifest in manifests() {
        check_packs(repository, manifest, work.as_ref(), &mut report).await;
    }
    check_indexes(repository, &files, name.id, &mut report).await;
    let layers: BTreeSet<ContentDigest> =
        manifests().flat_map(Manifest::layers).map(|layer| layer.digest).collect();
    for digest in layers {
        let result = check_layer(repository, &digest, &mut report).await;
        note(&mut report, format!("layer {digest}"), result);
    }
    drop(work);
    Ok(report)
}

async fn all(repository: &Repository, name: &CheckpointName) -> Result<Vec<ManifestFile>> {
    let mut files = Vec::new();
    for id in repository.checkpoints(&name.vm).await? {
        files.push(lineage::manifest_file(repository, &name.vm, id).await?);
    }
    Ok(files)
}

fn note(report: &mut Report, what: String, result: Result<()>) {
    if let Err(error) = result {
        report.problems.push(format!("{what}: {}", explain(&error)));
    }
}

async fn check_packs(
    repository: &Repository,
    manifest: &Manifest,
    work: &dyn Advance,
    report: &mut Report,
) {
    report.checkpoints += 1;
    for pack in &manifest.packs {
        let result = check_pack(repository, manifest, pack, work, report).await;
        note(report, format!("{}@{}/{}", manifest.vm, manifest.id, pack.name), result);
    }
}

/// Of the checkpoint that is `wanted`, else of all.
async fn check_indexes(
    repository: &Repository,
    files: &[ManifestFile],
    wanted: Option<CheckpointId>,
    report: &mut Report,
) {
    let indexes = Indexes::new(repository, files);
    let used = indexes.used_by(wanted);
    for file in files.iter().filter(|file| used.contains(&file.manifest.id)) {
        let result = indexes.check(file).await;
        let bytes = result.as_ref().map_or(0, |bytes| *bytes);
        report.bytes += bytes;
        let what = format!("the index of {}@{}", file.manifest.vm, file.manifest.id);
        note(report, what, result.map(drop));
    }
}

async fn check_pack(
    repository: &Repository,
    manifest: &Manifest,
    pack: &PackRecord,
    work: &dyn Advance,
    report: &mut Report,
) -> Result<()> {
    let (vm, id) = (&manifest.vm, manifest.id);
    let index = lineage::index(repository, vm, id, pack).await?;
    let header =
        repository.read_pack_range(vm, id, pack.name.as_str(), 0, HEADER_LEN as u64).await?;
    if PackHeader::parse(&header)?.id != pack.info.id {
        return Err(damaged("its header is another pack's"));
    }
    let footer = repository
        .read_pack_range(
            vm,
            id,
            pack.name.as_str(),
            pack.info.len.0 - FOOTER_LEN as u64,
            FOOTER_LEN as u64,
        )
        .await?;
    if PackFooter::parse(&footer)? != pack.info.footer() {
        return Err(damaged("its footer is not the one that the manifest describes"));
    }
    if repository.pack_len(vm, id, pack.name.as_str()).await? != pack.info.len.0 {
        return Err(damaged(format!(
            "its file does not have the {} bytes that the manifest says",
            pack.info.len
        )));
    }
    report.packs += 1;
    let runs = runs_by_frame(&index);
    let frames = index.frames();
    let mut next = 0;
    while next < frames.len() {
        let begin = frames[next].byte_range().start;
        let fits = frames[next..]
            .iter()
            .take_while(|frame| frame.byte_range().end - begin <= READ_BYTES)
            .count()
            .max(1);
        let end = frames[next + fits - 1].byte_range().end;
        let bytes =
            repository.read_pack_range(vm, id, pack.name.as_str(), begin, end - begin).await?;
        for number in next..next + fits {
            let range = frames[number].byte_range();
            let part = &bytes[as_index(range.start - begin)..as_index(range.end - begin)];
            report.pages += check_frame(&index, number, &runs[number], part)
                .with_context(|| format!("frame {number}"))?;
        }
        report.frames += fits as u64;
        report.bytes += end - begin;
        work.advance(end - begin);
        next += fits;
    }
    Ok(())
}

fn runs_by_frame(index: &PackIndex) -> Vec<Vec<(Slot, &PageRun)>> {
    let mut runs = vec![Vec::new(); index.frames().len()];
    for run in index.runs() {
        if let RunSource::Frame { frame, first_slot } = run.source
            && let Some(list) = runs.get_mut(frame.as_usize())
        {
            list.push((first_slot, run));
        }
    }
    runs
}

/// Every page of the frame against its digest.
fn check_frame(
    index: &PackIndex,
    number: usize,
    runs: &[(Slot, &PageRun)],
    bytes: &[u8],
) -> Result<u64> {
    let content = index.frames()[number].decode(bytes)?;
    let mut checked = 0;
    for (first_slot, run) in runs {
        for (offset, digest) in index.run_digests(run).iter().enumerate() {
            let start = (usize::from(first_slot.0) + offset) * PAGE_SIZE;
            let page = content
                .get(start..start + PAGE_SIZE)
                .context("the frame is shorter than its index says")?;
            if PageDigest::of(page) != *digest {
                return Err(damaged(format!(
                    "page {} does not have its digest",
                    run.pages.start.0 + offset as u64
                )));
            }
            checked += 1;
        }
    }
    Ok(checked)
}

async fn check_layer(
    repository: &Repository,
    digest: &ContentDigest,
    report: &mut Report,
) -> Result<()> {
    let layer = StoredLayer::open(repository, digest).await?;
    let mut content =
        LayerContent { form: layer.manifest.form, hasher: ContentHasher::new(), at: 0 };
    let mut batches = std::pin::pin!(layer.blocks());
    while let Some(blocks) = batches.try_next().await? {
        let (after, count) = tokio::task::spawn_blocking(move || content.take(&blocks))
            .await
            .context("internal error: task panicked")?;
        content = after;
        report.bytes += count;
    }
    if !content.is(layer.len().0, digest) {
        return Err(damaged("its blocks make a file of another digest"));
    }
    report.layers += 1;
    Ok(())
}

/// What a layer's blocks make. Blocks in the other form were compared with digests that the layer's
/// name stands for.
struct LayerContent {
    form: DigestForm,
    hasher: ContentHasher,
    at: u64,
}

impl LayerContent {
    fn take(mut self, blocks: &[Content]) -> (Self, u64) {
        let mut count = 0;
        for (offset, bytes) in blocks {
            self.zeros_to(*offset);
            if self.form == DigestForm::Content {
                self.hasher.update(bytes);
            }
            self.at = offset + bytes.len() as u64;
            count += bytes.len() as u64;
        }
        (self, count)
    }

    fn zeros_to(&mut self, end: u64) {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        while self.form == DigestForm::Content && self.at < end {
            let len = (end - self.at).min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..as_index(len)]);
            self.at += len;
        }
    }

    fn is(mut self, len: u64, digest: &ContentDigest) -> bool {
        self.zeros_to(len);
        self.form == DigestForm::Blocks || self.hasher.finish() == *digest
    }
}
