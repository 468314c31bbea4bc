//! Looking at a store: `ls` and `show`. Nothing here changes it.

#[cfg(test)]
mod test;

use crate::cli::{LsArgs, ShowArgs};
use crate::terminal::{out, print_json};
use anyhow::{Context, Result};
use checkpoint_format::{CheckpointId, CheckpointKind, Manifest, VmName};
use checkpoint_store::Repository;
use engine::lineage;
use engine::progress::bytes;
use engine::proof::note;
use engine::run_state::of_record;
use engine::stores;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;

/// Manifests read at once.
const READS: usize = 8;

pub(crate) async fn ls(args: &LsArgs) -> Result<()> {
    let repository = stores::open_existing(&args.store.store).await?;
    match &args.name {
        Some(vm_name) => ls_checkpoints(&repository, vm_name, args.json).await,
        None => ls_vms(&repository, args.json).await,
    }
}

/// Names without a checkpoint (a first checkpoint or a restore that did not end) are listed
/// separately: they have nothing to restore.
async fn ls_vms(repository: &Repository, as_json: bool) -> Result<()> {
    let vms = repository.vms().await?;
    let looks = vms.into_iter().map(|vm_name| async move {
        repository.checkpoints(&vm_name).await.map(|ids| (vm_name, ids))
    });
    let all: Vec<(VmName, Vec<CheckpointId>)> =
        futures::stream::iter(looks).buffered(READS).try_collect().await?;
    let (rows, empty): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, ids)| !ids.is_empty());
    let empty: Vec<&str> = empty.iter().map(|(vm_name, _)| vm_name.as_str()).collect();
    if as_json {
        let rows: Vec<_> =
            rows.iter().map(|(vm_name, ids)| json!({"name": vm_name, "checkpoints": ids.len(), "newest": ids.last()})).collect();
        return print_json(
            &json!({ "store": repository.url(), "machines": rows, "without_checkpoints": empty }),
        );
    }
    out!("{:32} {:>11} {:>8}", "VM", "CHECKPOINTS", "NEWEST");
    for (vm_name, ids) in rows {
        let newest = ids.last().map(ToString::to_string).unwrap_or_default();
        out!("{:32} {:>11} {newest:>8}", vm_name.as_str(), ids.len());
    }
    if !empty.is_empty() {
        out!("names without a checkpoint: {}", empty.join(", "));
    }
    Ok(())
}

async fn ls_checkpoints(repository: &Repository, vm_name: &VmName, as_json: bool) -> Result<()> {
    let ids = lineage::checkpoints(repository, vm_name).await?;
    let reads = ids.into_iter().map(|id| lineage::manifest(repository, vm_name, id));
    let manifests: Vec<Manifest> =
        futures::stream::iter(reads).buffered(READS).try_collect().await?;
    if as_json {
        let rows: Vec<_> = manifests.iter().map(summary).collect();
        return print_json(&json!({ "name": vm_name, "checkpoints": rows }));
    }
    out!(
        "{:>6} {:>6} {:11} {:14} {:24} {:>12} {:>12}",
        "ID",
        "PARENT",
        "KIND",
        "STATE",
        "CREATED",
        "CHANGED",
        "STORED"
    );
    for manifest in &manifests {
        out!("{}", row(manifest));
    }
    Ok(())
}

fn kind(manifest: &Manifest) -> &'static str {
    match manifest.kind {
        CheckpointKind::Full => "full",
        CheckpointKind::Incremental => "incremental",
    }
}

/// What the guest was doing; none in a checkpoint of an earlier version.
fn run_state(manifest: &Manifest) -> Option<&'static str> {
    manifest.run_state.map(|state| of_record(state).name())
}

fn row(manifest: &Manifest) -> String {
    let parent = manifest.parent.map(|parent| parent.to_string()).unwrap_or_else(|| "-".to_owned());
    let changed = bytes(manifest.totals.bytes_changed.0);
    let stored = bytes(manifest.totals.bytes_stored.0);
    let (kind, state) = (kind(manifest), run_state(manifest).unwrap_or("-"));
    format!(
        "{:>6} {parent:>6} {kind:11} {state:14} {:24} {changed:>12} {stored:>12}",
        manifest.id.0, manifest.created_at
    )
}

fn summary(manifest: &Manifest) -> serde_json::Value {
    json!({
        "id": manifest.id,
        "parent": manifest.parent,
        "kind": kind(manifest),
        "run_state": manifest.run_state,
        "created_at": manifest.created_at,
        "bytes_changed": manifest.totals.bytes_changed,
        "bytes_stored_raw": manifest.totals.bytes_stored_raw,
        "bytes_stored": manifest.totals.bytes_stored,
        "packs": manifest.packs.len(),
    })
}

pub(crate) async fn show(args: &ShowArgs) -> Result<()> {
    let repository = stores::open_existing(&args.store.store).await?;
    let id = lineage::resolve(&repository, &args.checkpoint).await?;
    let manifest = lineage::manifest(&repository, &args.checkpoint.vm, id).await?;
    // A note is a help, never needed.
    let proofs = note::read(&repository, &args.checkpoint.vm, id).await.unwrap_or_default();
    if args.json {
        let mut value = serde_json::to_value(&manifest).context("encoding the manifest")?;
        value["proofs"] = serde_json::to_value(&proofs).context("encoding the notes of proofs")?;
        return print_json(&value);
    }
    out!("{}", describe(&manifest).trim_end());
    proofs.iter().for_each(|note| out!("  proven    {note}"));
    if proofs.is_empty() {
        out!("  proven    not yet: 'stillpoint verify --restore {}@{id}'", manifest.vm);
    }
    Ok(())
}

fn describe(manifest: &Manifest) -> String {
    let vm = &manifest.vm_record;
    let mut lines = vec![
        format!("{}@{}  {}  {}", manifest.vm, manifest.id, kind(manifest), manifest.created_at),
        format!(
            "  parent    {}",
            manifest.parent.map(|parent| parent.to_string()).unwrap_or_else(|| "none".to_owned())
        ),
        format!(
            "  VM        {}, {} vCPUs, {} RAM, {}",
            vm.machine_type,
            vm.vcpus,
            bytes(vm.ram_bytes.0),
            vm.accelerator
        ),
        format!("  QEMU      {}", vm.qemu_version),
        format!("  state     {}", run_state(manifest).unwrap_or("not recorded")),
        format!(
            "  changed   {} in {} dirty pages",
            bytes(manifest.totals.bytes_changed.0),
            manifest.totals.pages_dirty
        ),
        format!(
            "  stored    {} ({} before compression)",
            bytes(manifest.totals.bytes_stored.0),
            bytes(manifest.totals.bytes_stored_raw.0)
        ),
    ];
    for disk in &manifest.disks {
        let mode = if disk.read_only { "read-only" } else { "read-write" };
        lines.push(format!(
            "  disk      {} {mode} {} {}  {}",
            disk.node,
            disk.format,
            bytes(disk.virtual_size.0),
            disk.file
        ));
        lines.extend(
            disk.backing.iter().map(|layer| {
                format!("    layer   {}  {} {}", layer.digest, layer.format, layer.path)
            }),
        );
    }
    for pack in &manifest.packs {
        let copies = pack.replicas.map(|copies| format!(", {copies} replicas")).unwrap_or_default();
        lines.push(format!("  pack      {}  {}{copies}", pack.name, bytes(pack.info.len.0)));
    }
    lines.join("\n") + "\n"
}
