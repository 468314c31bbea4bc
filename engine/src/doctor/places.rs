//! The directories that a running VM needs: where its sockets lie, and where old disk blocks wait.

use super::Row;
use crate::progress::bytes;
use anyhow::{Context, Result};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use vm::launch::fleecing_dir;
use vm::runtime_dir::RuntimeDir;

/// What a guest overwrites on its disks during one checkpoint waits in the fleecing directory.
const COMFORTABLE_ROOM: u64 = 1 << 30;

const RUNTIME: &str = "runtime directory";
const FLEECING: &str = "fleecing directory";
const OTHER_RUNTIME: &str = "make it writable for this user, or name another (a short path) by --runtime-dir or STILLPOINT_RUNTIME_DIR";
const OTHER_FLEECING: &str =
    "make it a writable directory, or name another by --fleecing-dir or STILLPOINT_FLEECING_DIR";

pub(super) fn check() -> Vec<Row> {
    let named =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    vec![
        runtime(named("STILLPOINT_RUNTIME_DIR").as_deref()),
        fleecing(named("STILLPOINT_FLEECING_DIR").as_deref()),
    ]
}

fn runtime(base: Option<&Path>) -> Row {
    match try_runtime(base) {
        Ok(place) => Row::ok(RUNTIME, format!("{} can hold sockets", place.display())),
        Err(error) => Row::no(RUNTIME, format!("{error:#}"), OTHER_RUNTIME),
    }
}

/// A socket where the directory is, or where `run` would make it.
fn try_runtime(base: Option<&Path>) -> Result<PathBuf> {
    // A name of ordinary length: the path of a VM's sockets must fit into an address.
    let vm = RuntimeDir::new(base, &"a-machine".parse().context("naming a VM")?)?;
    let wanted = vm.path().parent().unwrap_or(vm.path()).to_owned();
    let place = existing(&wanted);
    let about = || {
        format!(
            "{} cannot be used: no directory can be made in {}",
            wanted.display(),
            place.display()
        )
    };
    let trial =
        tempfile::Builder::new().prefix(".stillpoint-").tempdir_in(place).with_context(about)?;
    let socket = trial.path().join("s");
    UnixListener::bind(&socket)
        .with_context(|| format!("{} does not take sockets", place.display()))?;
    Ok(wanted)
}

/// The path itself, or as much of it as is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}

fn fleecing(wanted: Option<&Path>) -> Row {
    match try_fleecing(wanted) {
        Ok(row) => row,
        Err(error) => Row::no(FLEECING, format!("{error:#}"), OTHER_FLEECING),
    }
}

fn try_fleecing(wanted: Option<&Path>) -> Result<Row> {
    let path = fleecing_dir(wanted)?;
    let about = || format!("{} cannot be written", path.display());
    tempfile::tempfile_in(&path).and_then(|mut file| file.write_all(b"x")).with_context(about)?;
    let facts =
        statfs(&path).with_context(|| format!("querying the free space of {}", path.display()))?;
    let room = facts.blocks_available().saturating_mul(facts.block_size().unsigned_abs());
    Ok(judge_fleecing(&path, room, facts.filesystem_type()))
}

fn judge_fleecing(path: &Path, room: u64, kind: FsType) -> Row {
    let detail = format!("{} has {} free", path.display(), bytes(room));
    if kind == TMPFS_MAGIC {
        return Row::warn(
            FLEECING,
            format!("{detail}, but it is a tmpfs"),
            "name a directory on a disk by --fleecing-dir or STILLPOINT_FLEECING_DIR",
        );
    }
    if room < COMFORTABLE_ROOM {
        let remedy = "free some, or name a directory on another disk by --fleecing-dir or STILLPOINT_FLEECING_DIR";
        return Row::warn(
            FLEECING,
            format!("{detail}; a checkpoint needs space for what the guest overwrites meanwhile"),
            remedy,
        );
    }
    Row::ok(FLEECING, detail)
}

#[cfg(test)]
mod test {
    use super::super::State;
    use super::*;
    use nix::sys::statfs::EXT4_SUPER_MAGIC;

    #[test]
    fn directories_that_can_be_made_are_fine_and_none_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("not/yet");
        assert_eq!(runtime(Some(&base)).state, State::Ok);
        assert_eq!(fleecing(Some(directory.path())).check, FLEECING);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn unusable_directories_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        // Root may write anywhere, but not below a file.
        for row in [
            runtime(Some(&file.join("run"))),
            fleecing(Some(&file)),
            fleecing(Some(&directory.path().join("none"))),
        ] {
            assert!(
                row.state == State::No && row.detail.contains(directory.path().to_str().unwrap()),
                "{row:?}"
            );
        }
        let long = directory.path().join("x".repeat(100));
        assert!(runtime(Some(&long)).detail.contains("too long"));
    }

    #[test]
    fn memory_and_little_room_are_warned_of() {
        let judge = |room, kind| judge_fleecing(Path::new("/s"), room, kind).state;
        assert_eq!(judge(COMFORTABLE_ROOM, EXT4_SUPER_MAGIC), State::Ok);
        assert_eq!(judge(COMFORTABLE_ROOM - 1, EXT4_SUPER_MAGIC), State::Warn);
        assert_eq!(judge(1 << 40, TMPFS_MAGIC), State::Warn);
    }
}
