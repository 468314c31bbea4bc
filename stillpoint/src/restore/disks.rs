//! The restored machine's disks: new images in a directory of its own, in the format that they had, on their layers.

use super::layers::LocalLayers;
use super::source::Source;
use crate::launch::paths::NewPaths;
use crate::terminal::Progress;
use anyhow::{Context, Result, bail};
use checkpoint_format::{ByteLen, DiskRecord, LayerRef, PageRange};
use futures::{StreamExt, TryStreamExt};
use qmp_bridge::disks::ImageFormat;
use qmp_bridge::images::{Backing, BackingMode, ImageSpec, ImageWorker, ImageWorkers};
use qmp_bridge::nbd::{NbdClient, ZeroMode};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Writes of one image under way.
const WRITES: usize = 8;
/// Bytes between two flushes: a slow disk gets them down within the time of one NBD request.
const FLUSH_EVERY: u64 = 256 << 20;

/// Makes and fills the writable images. `binary` serves as the worker, `runtime` holds its sockets.
pub async fn restore(source: &Source, layers: &LocalLayers, dir: &Path, binary: &Path, runtime: &Path) -> Result<NewPaths> {
    let manifest = source.manifest();
    let mut paths = NewPaths::new(Path::new(&manifest.machine.directory));
    manifest.disks.iter().flat_map(|disk| &disk.backing).for_each(|layer| paths.add_disk(&layer.path, layers.path(layer)));
    manifest.machine.files.iter().for_each(|layer| paths.add_boot_file(&layer.path, layers.path(layer)));
    let mut workers = ImageWorkers::new(binary, runtime);
    for disk in manifest.disks.iter().filter(|disk| !disk.read_only) {
        let path = dir.join(file_name(disk));
        restore_one(source, layers, &mut workers, disk, &path).await.with_context(|| format!("restoring disk {}", disk.node))?;
        paths.add_disk(&disk.file, &path);
    }
    workers.shutdown().await;
    Ok(paths)
}

/// A name of the new image: the node's, since two disks may have had files of one name in different directories.
pub fn file_name(disk: &DiskRecord) -> String {
    let safe = |letter: char| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '_' };
    let stem: String = disk.node.chars().map(safe).collect();
    format!("{}.{}", stem.trim_start_matches('.'), disk.format)
}

async fn restore_one(source: &Source, layers: &LocalLayers, workers: &mut ImageWorkers, disk: &DiskRecord, path: &Path) -> Result<()> {
    if path.exists() {
        bail!("{} exists already; name another directory by --dir, or remove it", path.display());
    }
    let format = image_format(&disk.format)?;
    let backing = backing(layers, &disk.backing)?;
    let spec = ImageSpec { path: path.to_owned(), format, virtual_size: disk.virtual_size.0, backing };
    let mut begun = false;
    let write = async |worker: &mut ImageWorker| {
        if std::mem::replace(&mut begun, true) && path.exists() {
            // What a worker left that was lost over it.
            std::fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
        }
        write_image(source, disk, worker, &spec).await
    };
    workers.run(write).await?;
    sync(path)
}

async fn write_image(source: &Source, disk: &DiskRecord, worker: &mut ImageWorker, spec: &ImageSpec) -> Result<()> {
    worker.create(spec).await?;
    let image = worker.open(&spec.path, spec.format, BackingMode::Chain).await?;
    fill(source, disk, &image.client).await?;
    worker.close(image).await?;
    Ok(())
}

/// QEMU has flushed the file; its name must survive a crash too.
fn sync(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    for file in [path, folder] {
        std::fs::File::open(file).and_then(|file| file.sync_all()).with_context(|| format!("syncing {}", file.display()))?;
    }
    Ok(())
}

async fn fill(source: &Source, disk: &DiskRecord, client: &NbdClient) -> Result<()> {
    let name = disk.space.as_ref().context("a writable disk without a space")?;
    let map = source.map(name)?;
    // Without a layer below, what is not written is zero already.
    if !disk.backing.is_empty() {
        for zeros in map.zeros() {
            let (start, len) = clip(zeros, disk.virtual_size);
            client.write_zeroes(start, len, ZeroMode::Allocated).await?;
        }
    }
    let progress = Progress::bytes(&format!("disk {}", disk.node), disk.virtual_size.0);
    let mut runs = std::pin::pin!(source.read(&map));
    let mut unflushed = 0;
    while let Some(batch) = runs.next().await {
        let writes = batch?.into_iter().map(|(pages, bytes)| {
            let (start, len) = clip(pages, disk.virtual_size);
            unflushed += len;
            client.write(start, bytes.slice(..len as usize))
        });
        futures::stream::iter(writes).buffer_unordered(WRITES).try_collect::<Vec<()>>().await?;
        progress.advance(0);
        if unflushed >= FLUSH_EVERY {
            client.flush().await?;
            unflushed = 0;
        }
    }
    client.flush().await?;
    Ok(())
}

/// The last page of a disk may be short.
fn clip(pages: PageRange, size: ByteLen) -> (u64, u64) {
    let range = pages.bytes();
    (range.start, range.end.min(size.0) - range.start)
}

fn image_format(name: &str) -> Result<ImageFormat> {
    match name {
        "qcow2" => Ok(ImageFormat::Qcow2),
        "raw" => Ok(ImageFormat::Raw),
        other => bail!("disks of format {other} cannot be made"),
    }
}

/// One layer by its path; a deeper chain as a description of all of it, because the layers' own headers name the paths of
/// another host.
fn backing(layers: &LocalLayers, chain: &[LayerRef]) -> Result<Option<Backing>> {
    let Some(top) = chain.first() else { return Ok(None) };
    let format = image_format(&top.format)?;
    let file = match chain.len() {
        1 => path_text(layers.path(top))?,
        _ => format!("json:{}", describe(layers, chain)?),
    };
    Ok(Some(Backing { file, format }))
}

fn describe(layers: &LocalLayers, chain: &[LayerRef]) -> Result<Value> {
    let mut below = Value::Null;
    for layer in chain.iter().rev() {
        let mut node = json!({ "driver": layer.format, "file": { "driver": "file", "filename": path_text(layers.path(layer))? } });
        if layer.format == "qcow2" {
            node["backing"] = below;
        }
        below = node;
    }
    Ok(below)
}

fn path_text(path: &Path) -> Result<String> {
    let path: PathBuf = std::path::absolute(path).with_context(|| format!("making {} absolute", path.display()))?;
    path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("the path {path:?} is not valid UTF-8"))
}
