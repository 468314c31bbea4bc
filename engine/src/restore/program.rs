//! Which QEMU of this host restores a VM.
//!
//! The checkpoint names the QEMU program that it was taken with, but every user who can write the
//! store can write that name. So only its last part counts, if it is that of a QEMU, and is
//! searched for in this host's program directories.

use anyhow::Result;
use checkpoint_format::VmRecord;
use qmp_bridge::quirks::Release;
use std::path::{Path, PathBuf};
use vm::error::refused;
use vm::launch;
use vm::launch::qemu_binary::{self, QemuFacts};

const DEFAULT: &str = "qemu-system-x86_64";
/// Where scripts/install-deps puts a second QEMU.
const BESIDE: &str = "/opt/stillpoint";

/// The program that its user names, else the first of this host that knows the machine type and is
/// as new as the QEMU that the checkpoint was taken of: an older one may lack what the device state
/// has, and not every machine type has a version in its name.
pub(crate) fn find(
    named: Option<&str>,
    record: &VmRecord,
    plugin: &Path,
) -> Result<(PathBuf, QemuFacts)> {
    let programs = match named {
        Some(name) => vec![launch::find_program(name)?],
        None => candidates(base_name(&record.program))?,
    };
    let mut older = None;
    for program in programs {
        match qemu_binary::probe(&program, plugin) {
            Ok(facts)
                if knows(&facts, &record.machine_type)
                    && (named.is_some() || !is_older(&facts.version, &record.qemu_version)) =>
            {
                return Ok((program, facts));
            }
            Ok(facts) => older = older.or(Some(Ok(facts))),
            Err(error) => older = older.or(Some(Err(error))),
        }
    }
    let facts = older
        .unwrap_or_else(|| Err(refused("this host has no QEMU; name one by --qemu").into()))?;
    Err(too_old(&facts, record))
}

fn knows(facts: &QemuFacts, machine_type: &str) -> bool {
    facts.machine_types.iter().any(|known| known.name == machine_type)
}

/// By major and minor version, as QEMU counts what it can load. What cannot be read is no reason.
fn is_older(version: &str, recorded: &str) -> bool {
    let releases = Release::parse(version).zip(Release::parse(recorded));
    releases.is_some_and(|(release, recorded)| release < recorded)
}

/// A QEMU too old for the machine type would build another VM.
fn too_old(facts: &QemuFacts, record: &VmRecord) -> anyhow::Error {
    if knows(facts, &record.machine_type) {
        return refused(format!(
            "this host's QEMU {} is older than QEMU {}, of which the checkpoint was taken: name one as new as that by --qemu \
             (an older one named there is tried)",
            facts.version, record.qemu_version
        ));
    }
    refused(format!(
        "QEMU {} does not know the machine type {}; the checkpoint was taken with QEMU {}: name a QEMU as new as that by --qemu",
        facts.version, record.machine_type, record.qemu_version
    ))
}

/// The name to look for, never a path.
fn base_name(recorded: &str) -> &str {
    let name = recorded.rsplit('/').next().unwrap_or_default();
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    let is_qemu = name == "kvm" || name == "qemu-kvm" || name.starts_with("qemu-system-");
    if is_qemu && name.chars().all(is_letter) { name } else { DEFAULT }
}

/// On the PATH, then beside it.
fn candidates(name: &str) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = launch::find_program(name).into_iter().collect();
    if name != DEFAULT {
        found.extend(launch::find_program(DEFAULT));
    }
    let prefix = std::env::var_os("STILLPOINT_QEMU_PREFIX")
        .filter(|prefix| !prefix.is_empty())
        .map(PathBuf::from);
    let mut beside: Vec<PathBuf> = std::fs::read_dir(BESIDE)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    beside.sort();
    found.extend(
        prefix
            .into_iter()
            .chain(beside)
            .map(|prefix| prefix.join("usr/bin").join(DEFAULT))
            .filter(|program| program.is_file()),
    );
    if found.is_empty() {
        launch::find_program(DEFAULT)?;
    }
    Ok(found)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn older_qemu_is_found_by_major_and_minor_version() {
        for (version, recorded, older) in [
            ("7.2.22", "10.0.2", true),
            ("10.0.2", "7.2.22", false),
            ("7.2.1", "7.2.22", false),
            ("10.0.2", "10.1.0", true),
            ("10.0.2", "?", false),
        ] {
            assert_eq!(is_older(version, recorded), older, "{version} {recorded}");
        }
    }

    #[test]
    fn the_recorded_program_is_a_name_at_most() {
        for (recorded, name) in [
            ("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64"),
            ("/tmp/evil/qemu-system-i386", "qemu-system-i386"),
            ("/usr/bin/kvm", "kvm"),
            ("/bin/sh", DEFAULT),
            ("/tmp/qemu-system-x86_64 -x", DEFAULT),
            ("../../qemu-system-..", "qemu-system-.."),
            ("", DEFAULT),
        ] {
            assert_eq!(base_name(recorded), name, "{recorded}");
        }
    }
}
