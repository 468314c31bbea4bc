//! The restored VM's disks: new images in `--dir` or where `--map` puts them, in the format that
//! they had, on their layers.

use super::chain::{Chain, Layer, image_format};
use super::layers::LocalLayers;
use super::lazy_disks::LazyDisks;
use super::source::Source;
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, DiskRecord, Manifest, PageRange, Qcow2Record, as_index};
use futures::{StreamExt, TryStreamExt};
use qmp_bridge::disks::{ImageFormat, Qcow2Layout};
use qmp_bridge::images::{BackingMode, ImageSpec, ImageWorker, ImageWorkers};
use qmp_bridge::nbd::{NbdClient, ZeroMode};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use vm::error::{damaged, refused};
use vm::launch::paths::NewPaths;

/// Writes of one image under way.
const WRITES: usize = 8;
/// Bytes between two flushes: a slow disk gets them down within the time of one NBD request.
const FLUSH_EVERY: u64 = 256 << 20;

/// Where each disk of a checkpoint comes to be.
pub struct Places<'a> {
    /// Of the checkpoint.
    pub manifest: &'a Manifest,
    /// Where images are made that `map` has nowhere else.
    pub dir: &'a Path,
    /// `--map OLD=NEW`, each split into its two values.
    pub map: &'a [(String, String)],
}

impl Places<'_> {
    /// The file or block device that the drive of the restored VM has: an image of its own, or for
    /// a read-only disk that is one layer, that layer.
    pub(crate) fn file(&self, layers: &LocalLayers, disk: &DiskRecord) -> Result<PathBuf> {
        Ok(if needs_image(layers, disk)? {
            self.image(disk)
        } else {
            layers.path(&disk.backing[0]).to_owned()
        })
    }

    /// Where the image of a disk is made, if it gets one.
    pub(crate) fn image(&self, disk: &DiskRecord) -> PathBuf {
        let directory = Path::new(&self.manifest.vm_record.directory);
        let mapped = self
            .map
            .iter()
            .rev()
            .find(|(old, _)| directory.join(old) == directory.join(&disk.file));
        self.dir.join(mapped.map_or_else(|| file_name(disk), |(_, new)| new.clone()))
    }

    /// Every file that may be made: images, and links of their chains. A block device is there
    /// already.
    pub(crate) fn made(&self) -> Vec<PathBuf> {
        let mut made = Vec::new();
        for disk in
            self.manifest.disks.iter().filter(|disk| !disk.read_only || disk.format == "qcow2")
        {
            let image = self.image(disk);
            made.extend((0..disk.backing.len()).map(|number| link(&image, disk, number)));
            made.push(image);
        }
        made.retain(|path| !is_block_device(path));
        made
    }
}

/// An image in the chain of another one; see [`Chain`].
fn link(image: &Path, disk: &DiskRecord, number: usize) -> PathBuf {
    image.with_file_name(format!("{}.link-{number}.qcow2", stem(disk)))
}

/// A read-only disk that is one layer is that layer. One on a chain gets an image of its own, which
/// holds nothing and names the chain, since the layer's own header names files of another host.
fn needs_image(layers: &LocalLayers, disk: &DiskRecord) -> Result<bool> {
    match disk.backing.as_slice() {
        _ if !disk.read_only => Ok(true),
        [] => Err(damaged(format!("the read-only disk {} has no layer", disk.node))),
        [_] if disk.format == "raw" => Ok(false),
        [layer] => {
            Ok(layer.format != disk.format || Layer::read(layer, layers.path(layer))?.names_backing)
        }
        _ if disk.format == "raw" => {
            Err(damaged(format!("the raw disk {} is on a backing chain", disk.node)))
        }
        _ => Ok(true),
    }
}

/// Makes and fills the images; those that `lazy` takes stay empty. `binary` serves as the worker,
/// `runtime` holds its sockets.
pub(crate) async fn restore(
    source: &Source,
    layers: &LocalLayers,
    places: &Places<'_>,
    binary: &Path,
    runtime: &Path,
    mut lazy: Option<&mut LazyDisks>,
) -> Result<NewPaths> {
    let manifest = source.manifest();
    let mut paths = NewPaths::new(Path::new(&manifest.vm_record.directory));
    // Command lines that were saved by an earlier version name layers, too.
    manifest
        .disks
        .iter()
        .flat_map(|disk| &disk.backing)
        .for_each(|layer| paths.add_layer(&layer.path, layers.path(layer)));
    manifest
        .vm_record
        .files
        .iter()
        .for_each(|layer| paths.add_boot_file(&layer.path, layers.path(layer)));
    let mut workers = ImageWorkers::new(binary, runtime);
    for (number, disk) in manifest.disks.iter().enumerate() {
        let path = places.file(layers, disk)?;
        if needs_image(layers, disk)? {
            let lazy = lazy.as_deref_mut().map(|lazy| (number, lazy));
            let restored = restore_one(source, layers, &mut workers, (disk, &path), lazy).await;
            restored.with_context(|| format!("restoring disk {}", disk.node))?;
        }
        paths.add_disk(&disk.file, &path);
    }
    workers.shutdown().await;
    Ok(paths)
}

/// A name of the new image: the node's, since two disks may have had files of one name in different
/// directories.
pub(crate) fn file_name(disk: &DiskRecord) -> String {
    format!("{}.{}", stem(disk), disk.format)
}

fn stem(disk: &DiskRecord) -> String {
    let safe = |letter: char| {
        if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '_' }
    };
    let stem: String = disk.node.chars().map(safe).collect();
    stem.trim_start_matches('.').to_owned()
}

async fn restore_one(
    source: &Source,
    layers: &LocalLayers,
    workers: &mut ImageWorkers,
    (disk, path): (&DiskRecord, &Path),
    lazy: Option<(usize, &mut LazyDisks)>,
) -> Result<()> {
    let format = image_format(&disk.format)?;
    let found = disk
        .backing
        .iter()
        .map(|layer| Layer::read(layer, layers.path(layer)))
        .collect::<Result<Vec<_>>>()?;
    if format == ImageFormat::Raw && !found.is_empty() {
        return Err(damaged("a raw disk is on a backing chain, which no raw image has"));
    }
    let chain = Chain::of(&found, |number| link(path, disk, number))?;
    for link in &chain.links {
        make(workers, link).await?;
        sync(&link.path)?;
    }
    let layout = disk.qcow2.as_ref().map(layout);
    let spec = ImageSpec {
        path: path.to_owned(),
        format,
        virtual_size: disk.virtual_size.0,
        backing: chain.backing,
        layout,
    };
    if disk.read_only {
        make(workers, &spec).await?;
        return sync(path);
    }
    if is_block_device(path) {
        check_device(&spec)?;
        workers
            .run(async |worker: &mut ImageWorker| fill_device(source, disk, worker, &spec).await)
            .await?;
        return Ok(());
    }
    if let Some((number, lazy)) = lazy
        && let Some(first) = lazy.add(number, disk, spec.backing.as_ref())?
    {
        make(workers, &ImageSpec { backing: Some(first), ..spec }).await?;
        return sync(path);
    }
    refuse_existing(path)?;
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

fn layout(record: &Qcow2Record) -> Qcow2Layout {
    Qcow2Layout {
        cluster_size: record.cluster_size.0,
        compat: record.compat.clone(),
        lazy_refcounts: record.lazy_refcounts,
        refcount_bits: record.refcount_bits,
        extended_l2: record.extended_l2,
        compression: record.compression.clone(),
    }
}

/// Without data of its own.
async fn make(workers: &mut ImageWorkers, spec: &ImageSpec) -> Result<()> {
    refuse_existing(&spec.path)?;
    let mut begun = false;
    let create = async |worker: &mut ImageWorker| {
        if std::mem::replace(&mut begun, true) && spec.path.exists() {
            std::fs::remove_file(&spec.path)
                .with_context(|| format!("removing {}", spec.path.display()))?;
        }
        Ok::<_, anyhow::Error>(worker.create(spec).await?)
    };
    workers.run(create).await
}

fn refuse_existing(path: &Path) -> Result<()> {
    if path.exists() {
        return Err(refused(format!(
            "{} exists already; name another directory by --dir, or remove it",
            path.display()
        )));
    }
    Ok(())
}

pub(crate) fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|facts| facts.file_type().is_block_device())
}

/// The guest sees the length of the device.
fn check_device(spec: &ImageSpec) -> Result<()> {
    let about = || format!("opening {}", spec.path.display());
    let length = std::fs::File::open(&spec.path)
        .and_then(|mut device| device.seek(SeekFrom::End(0)))
        .with_context(about)?;
    if spec.format != ImageFormat::Raw {
        return Err(refused(format!(
            "{} is a block device, and this disk is a qcow2 image; map it to a file",
            spec.path.display()
        )));
    }
    if length != spec.virtual_size {
        return Err(refused(format!(
            "{} has {length} bytes, and the disk has {}; map it to a device of that size or to a file",
            spec.path.display(),
            spec.virtual_size
        )));
    }
    Ok(())
}

async fn fill_device(
    source: &Source,
    disk: &DiskRecord,
    worker: &mut ImageWorker,
    spec: &ImageSpec,
) -> Result<()> {
    let device = worker.open(&spec.path, spec.format, BackingMode::Alone).await?;
    device.client.write_zeroes(0, spec.virtual_size, ZeroMode::Allocated).await?;
    fill(source, disk, &device.client).await?;
    worker.close(device).await?;
    Ok(())
}

async fn write_image(
    source: &Source,
    disk: &DiskRecord,
    worker: &mut ImageWorker,
    spec: &ImageSpec,
) -> Result<()> {
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
        std::fs::File::open(file)
            .and_then(|file| file.sync_all())
            .with_context(|| format!("syncing {}", file.display()))?;
    }
    Ok(())
}

async fn fill(source: &Source, disk: &DiskRecord, client: &NbdClient) -> Result<()> {
    let name = disk.space.as_ref().context("a writable disk without a space")?;
    let map = source.map(name).await?;
    // Without a layer below, what is not written is zero already.
    if !disk.backing.is_empty() {
        for zeros in map.zeros() {
            let (start, len) = clip(zeros, disk.virtual_size)?;
            client.write_zeroes(start, len, ZeroMode::Allocated).await?;
        }
    }
    let progress = source.progress().begin(&format!("disk {}", disk.node), disk.virtual_size.0);
    let mut runs = std::pin::pin!(source.read(&map));
    let mut unflushed = 0;
    while let Some(batch) = runs.next().await {
        let mut writes = Vec::new();
        for (pages, bytes) in batch? {
            let (start, len) = clip(pages, disk.virtual_size)?;
            unflushed += len;
            writes.push(client.write(start, bytes.slice(..as_index(len))));
        }
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
fn clip(pages: PageRange, size: ByteLen) -> Result<(u64, u64)> {
    let range = pages.bytes();
    let end = range.end.min(size.0);
    let len = end.checked_sub(range.start).filter(|len| *len > 0);
    let len = len.ok_or_else(|| {
        damaged(format!("it has content at byte {}, and the disk ends at {size}", range.start))
    })?;
    Ok((range.start, len))
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::PageIndex;

    #[test]
    fn content_beyond_the_disk_is_damage() {
        let pages = |first, end| PageRange::new(PageIndex(first), PageIndex(end));
        assert_eq!(clip(pages(1, 3), ByteLen(4096 * 2 + 512)).unwrap(), (4096, 4096 + 512));
        for (first, end, size) in [(3, 4, 4096 * 2 + 512), (2, 3, 4096 * 2), (0, 1, 0)] {
            let error = clip(pages(first, end), ByteLen(size)).unwrap_err();
            assert_eq!(vm::error::class_of(&error), vm::error::Class::Damaged, "{error}");
        }
    }
}
