//! The disks as the restored QEMU shows them to its guest, held against the checkpoint; and the
//! layers below them, held against the digests of their blocks.
//!
//! A disk is read through QEMU's own block layer, so that a wrong chain, a shifted offset or a
//! wrong size shows. Where no pack has a page, a layer does: there the disk is held against the
//! chain of layer files as the manifest names it, opened again.

use super::difference::Difference;
use super::expected::Expected;
use super::memory::digest;
use crate::layers::{self, StoredLayer};
use crate::progress::Progress;
use crate::restore::check;
use crate::restore::disks::Places;
use crate::restore::layers::LocalLayers;
use crate::restore::source::Source;
use anyhow::{Context, Result};
use checkpoint_format::{
    ContentDigest, DiskRecord, PAGE_SIZE, PageDigest, SpaceName, as_index, is_zero,
};
use qmp_bridge::Qmp;
use qmp_bridge::disks::{self, Disk};
use qmp_bridge::nbd::{NbdClient, context};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vm::drives::{self, Started};
use vm::launch::arguments;
use vm::runtime_dir::VmFile;

const PAGE: u64 = PAGE_SIZE as u64;
/// Extents are looked up for this much of a disk at a time.
const WINDOW: u64 = 1 << 30;
/// One read.
const READ: u64 = 256 << 10;

/// QEMU's NBD server, for the time of the comparison.
struct Exports<'a> {
    qmp: &'a Qmp,
    socket: PathBuf,
    count: u32,
}

impl<'a> Exports<'a> {
    async fn start(qmp: &'a Qmp, workspace: &Path) -> Result<Self> {
        let socket = workspace.join("proof.nbd");
        let address = json!({ "type": "unix", "data": { "path": text(&socket)? } });
        qmp.execute_json("nbd-server-start", json!({ "addr": address }))
            .await
            .context("starting the NBD server")?;
        Ok(Self { qmp, socket, count: 0 })
    }

    async fn open(&mut self, node: &str) -> Result<Reader> {
        self.count += 1;
        let id = format!("proof-{}", self.count);
        let export =
            json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": false });
        self.qmp
            .execute_json("block-export-add", export)
            .await
            .with_context(|| format!("exporting node {node}"))?;
        Ok(Reader {
            client: NbdClient::connect(&self.socket, &id, &[context::BASE_ALLOCATION]).await?,
            zeros: Vec::new(),
        })
    }

    /// The layers as the manifest has them, top to bottom.
    async fn open_chain(
        &mut self,
        layers: &LocalLayers,
        disk: &DiskRecord,
    ) -> Result<Option<Reader>> {
        if disk.backing.is_empty() {
            return Ok(None);
        }
        let node = format!("stillpoint-proof-{}", self.count);
        let mut below = Value::Null;
        for layer in disk.backing.iter().rev() {
            let file = json!({ "driver": "file", "filename": text(layers.path(layer))?, "read-only": true });
            let mut one = json!({ "driver": layer.format, "read-only": true, "file": file });
            if layer.format != "raw" {
                one["backing"] = below;
            }
            below = one;
        }
        below["node-name"] = node.as_str().into();
        self.qmp
            .execute_json("blockdev-add", below)
            .await
            .with_context(|| format!("opening the layers of disk {}", disk.node))?;
        self.open(&node).await.map(Some)
    }

    async fn stop(self) -> Result<()> {
        for number in 1..=self.count {
            let arguments = json!({ "id": format!("proof-{number}"), "mode": "hard" });
            self.qmp
                .execute_json("block-export-del", arguments)
                .await
                .context("ending an export")?;
        }
        self.qmp
            .execute_json("nbd-server-stop", Value::Null)
            .await
            .context("stopping the NBD server")
            .map(drop)
    }
}

/// A node, read from its beginning to its end.
struct Reader {
    client: NbdClient,
    /// Zero ranges of the window.
    zeros: Vec<(u64, u64)>,
}

impl Reader {
    async fn look(&mut self, start: u64, end: u64) -> Result<()> {
        let end = end.min(self.client.size());
        self.zeros.clear();
        if start >= end {
            return Ok(());
        }
        for context in self.client.block_status(start, end - start).await? {
            let zero =
                context.extents.iter().filter(|extent| extent.flags & context::STATE_ZERO != 0);
            self.zeros.extend(zero.map(|extent| (extent.start, extent.end)));
        }
        Ok(())
    }

    /// Whether QEMU says that it is zero, or it is beyond the end.
    fn is_zero(&self, start: u64, end: u64) -> bool {
        start >= self.client.size()
            || self
                .zeros
                .iter()
                .any(|(from, until)| *from <= start && end.min(self.client.size()) <= *until)
    }

    /// None if it is zero; what is beyond the end is.
    async fn read(&self, start: u64, end: u64) -> Result<Option<Vec<u8>>> {
        if self.is_zero(start, end) {
            return Ok(None);
        }
        let have = end.min(self.client.size());
        let len = u32::try_from(have - start).context("a read of a piece")?;
        let mut bytes = self.client.read(start, len).await?;
        bytes.resize(as_index(end - start), 0);
        Ok(Some(bytes))
    }
}

/// All disks of the manifest. `expected` has a table for each writable one; `pid` is QEMU's
/// process, as `/proc` has it.
pub(super) async fn compare(
    qmp: &Qmp,
    pid: u32,
    file: &VmFile,
    source: &Source,
    layers: &LocalLayers,
    expected: &HashMap<SpaceName, Expected>,
) -> Result<Vec<Difference>> {
    let all = disks::list(qmp, Some(&file.directory)).await.context("asking QEMU for its disks")?;
    let options = arguments::parse(&file.arguments)?;
    let started = Started {
        options: &options,
        machine_type: &file.machine_type,
        directory: &file.directory,
        pid,
    };
    let drives = drives::examine(all, &started)?;
    let mut found = Vec::new();
    let places = Places { manifest: source.manifest(), dir: &file.directory, map: &[] };
    if let Err(error) = check::in_qemu(&places, layers, &drives) {
        found.push(Difference::noted("disks", format!("{error:#}")));
    }
    let mut list = drives.disks;
    let mut exports = Exports::start(qmp, &file.directory).await?;
    for record in &source.manifest().disks {
        let label = format!("disk:{}", record.node);
        let disk = list.iter().position(|disk| disk.name == record.node);
        let Some(disk) = disk.map(|number| list.swap_remove(number)) else {
            found.push(Difference::noted(label, "the restored VM has no such disk"));
            continue;
        };
        let one = compare_one(
            &mut exports,
            layers,
            record,
            &disk,
            label,
            expected,
            source.progress().as_ref(),
        )
        .await;
        found.extend(one.with_context(|| format!("comparing disk {}", record.node))?);
    }
    found.extend(list.iter().map(|disk| {
        Difference::noted(format!("disk:{}", disk.name), "the checkpoint has no such disk")
    }));
    exports.stop().await?;
    Ok(found)
}

async fn compare_one(
    exports: &mut Exports<'_>,
    layers: &LocalLayers,
    record: &DiskRecord,
    disk: &Disk,
    label: String,
    expected: &HashMap<SpaceName, Expected>,
    progress: &dyn Progress,
) -> Result<Vec<Difference>> {
    let mut difference = Difference::new(label);
    // QEMU passes up to sectors.
    if disk.virtual_size != record.virtual_size.0.next_multiple_of(512) {
        difference.note = Some(format!(
            "{} bytes long, {} in the checkpoint",
            disk.virtual_size, record.virtual_size
        ));
        return Ok(vec![difference]);
    }
    if disk.read_only != record.read_only {
        difference.note = Some(format!(
            "read-only is {}, {} in the checkpoint",
            disk.read_only, record.read_only
        ));
    }
    let nothing = Expected::default();
    let table = match &record.space {
        Some(space) => {
            expected.get(space).with_context(|| format!("the checkpoint has no space {space}"))?
        }
        None => &nothing,
    };
    let mut actual = exports.open(&disk.node).await?;
    let mut below = exports.open_chain(layers, record).await?;
    let progress = progress.begin(&format!("disk {}", record.node), disk.virtual_size);
    for start in (0..disk.virtual_size).step_by(as_index(WINDOW)) {
        let end = (start + WINDOW).min(disk.virtual_size);
        actual.look(start, end).await?;
        if let Some(below) = &mut below {
            below.look(start, end).await?;
        }
        if is_zero_as_expected(&actual, below.as_ref(), table, start, end) {
            progress.advance(end - start);
            continue;
        }
        for piece in (start..end).step_by(as_index(READ)) {
            let last = (piece + READ).min(end);
            compare_piece(&actual, below.as_ref(), table, piece, last, &mut difference).await?;
        }
        progress.advance(end - start);
    }
    actual.client.close().await;
    if let Some(below) = below {
        below.client.close().await;
    }
    Ok(difference.found().into_iter().collect())
}

/// Without a look at each page: a sparse disk of some TiB has thousands of millions of them.
fn is_zero_as_expected(
    actual: &Reader,
    below: Option<&Reader>,
    expected: &Expected,
    start: u64,
    end: u64,
) -> bool {
    let (first, last) = (start / PAGE, end.div_ceil(PAGE));
    let is_below_zero = || below.is_none_or(|below| below.is_zero(start, end));
    actual.is_zero(start, end)
        && (expected.is_zero(first, last) || expected.is_unknown(first, last) && is_below_zero())
}

/// From `start`, the first byte of a page, to `end`, which may be the disk's end.
async fn compare_piece(
    actual: &Reader,
    below: Option<&Reader>,
    expected: &Expected,
    start: u64,
    end: u64,
    difference: &mut Difference,
) -> Result<()> {
    let (first, last) = (start / PAGE, end.div_ceil(PAGE));
    if is_zero_as_expected(actual, below, expected, start, end) {
        return Ok(());
    }
    let found = actual.read(start, end).await?;
    let under = match below {
        Some(below) => below.read(start, end).await?,
        None => None,
    };
    for page in first..last {
        let place = as_index((page - first) * PAGE);
        let part = |bytes: &Option<Vec<u8>>| {
            bytes.as_ref().map(|bytes| padded(&bytes[place..bytes.len().min(place + PAGE_SIZE)]))
        };
        let is_right = match expected.get(page) {
            Some(wanted) => {
                part(&found).map_or(PageDigest::ZERO_PAGE, |page| digest(&page)) == wanted
            }
            None => is_same(part(&found), part(&under)),
        };
        if !is_right {
            difference.push(page * PAGE..((page + 1) * PAGE).min(end));
        }
    }
    Ok(())
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut page = bytes.to_vec();
    page.resize(PAGE_SIZE, 0);
    page
}

/// None is zero.
fn is_same(one: Option<Vec<u8>>, other: Option<Vec<u8>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one == other,
        (Some(bytes), None) | (None, Some(bytes)) => is_zero(&bytes),
        (None, None) => true,
    }
}

/// The files that stand for layers on this host, block by block.
pub(super) async fn compare_layers(
    source: &Source,
    local: &LocalLayers,
) -> Result<Vec<Difference>> {
    let mut all: BTreeMap<ContentDigest, PathBuf> = BTreeMap::new();
    for layer in source.manifest().layers() {
        all.insert(layer.digest, local.path(layer).to_owned());
    }
    let mut found = Vec::new();
    for (digest, path) in all {
        let layer = StoredLayer::open(source.repository(), &digest).await?;
        let progress = Arc::clone(source.progress());
        let compare = move || compare_layer(&path, &layer, progress.as_ref());
        found.extend(
            tokio::task::spawn_blocking(compare)
                .await
                .context("internal error: comparing a layer panicked")??
                .found(),
        );
    }
    Ok(found)
}

fn compare_layer(path: &Path, layer: &StoredLayer, progress: &dyn Progress) -> Result<Difference> {
    let (block_size, len) = (u64::from(layer.manifest.block_size), layer.len().0);
    let about = || format!("reading the layer {}", path.display());
    let mut difference = Difference::new(format!("layer:{}", layer.manifest.digest));
    let file = File::open(path).with_context(about)?;
    let now = file.metadata().with_context(about)?.len();
    if now != len {
        difference.note =
            Some(format!("its file {} has {now} bytes, {len} are right", path.display()));
        return Ok(difference);
    }
    let progress = progress.begin("layer", len);
    let bytes_of = |number: u64| number * block_size..((number + 1) * block_size).min(len);
    let mut stored = layer.table.stored().peekable();
    layers::image::each_block::<std::io::Error>(
        &file,
        len,
        layers::image::Blocks::NoHoles,
        |number, block| {
            // Blocks of the layer that are holes of the file.
            while let Some((missed, _)) = stored.next_if(|(next, _)| *next < number) {
                difference.push(bytes_of(missed));
            }
            let is_right = match stored.next_if(|(next, _)| *next == number) {
                None => is_zero(block),
                Some((_, at)) => ContentDigest::of(&layers::image::padded(block)) == at.digest,
            };
            if !is_right {
                difference.push(bytes_of(number));
            }
            progress.advance(block.len() as u64);
            Ok(())
        },
    )
    .with_context(about)?;
    stored.for_each(|(missed, _)| difference.push(bytes_of(missed)));
    Ok(difference)
}

/// For tests: see [`crate::kill_point::damage`].
pub(super) fn invert_byte(path: &Path, offset: u64) -> Result<()> {
    let about = || format!("damaging {}", path.display());
    let file = File::options().read(true).write(true).open(path).with_context(about)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).with_context(about)?;
    file.write_all_at(&[!byte[0]], offset).with_context(about)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("the path {} is not valid UTF-8", path.display()))
}
