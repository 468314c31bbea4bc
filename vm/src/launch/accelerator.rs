//! Chooses KVM if it can run the guest, else TCG, and says why.
//!
//! That `/dev/kvm` opens is not enough: inside some VMs KVM runs real-mode code and hangs on
//! anything more. So a firmware of 142 bytes (`long_mode.S`) is run under KVM first: it switches to
//! long mode with paging, as every operating system does, and ends QEMU with an exit status that
//! nothing else produces. The result is cached until the next boot.

use super::arguments::{KeyList, QemuOption};
use super::form::Form;
use super::spawn::ended_within;
use crate::cache;
use crate::process;
use anyhow::{Context, Result};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const LONG_MODE: &[u8] = include_bytes!("long_mode.bin");
const ROM_BYTES: usize = 64 << 10;
/// `ljmp $0xF000, $0` at the reset vector.
const RESET_VECTOR: usize = 0xFFF0;
const JUMP: [u8; 5] = [0xEA, 0x00, 0x00, 0x00, 0xF0];
/// isa-debug-exit: (0x31 << 1) | 1.
const SUCCESS: i32 = 99;
/// The firmware needs 60 ms under TCG, less under KVM.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// What runs the guest, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accelerator {
    /// The value of `-accel`.
    pub name: String,
    /// In words for the user.
    pub reason: String,
}

/// The accelerator that the command line names; of several, as QEMU does, the first that this host
/// has. If it names none: KVM if it can run an operating system on this host, else TCG.
pub fn choose(options: &[QemuOption], qemu: &Path) -> Accelerator {
    let wanted = wanted(options);
    if let Some(name) = first(&wanted, has_kvm) {
        let reason = if wanted.len() > 1 {
            "the first of the command line that this host has"
        } else {
            "as the command line says"
        };
        return Accelerator { name: name.to_owned(), reason: reason.to_owned() };
    }
    let (name, reason) = match kvm_works(qemu) {
        Ok(()) => ("kvm", "it runs long mode on this host".to_owned()),
        Err(why) => ("tcg", format!("KVM cannot be used: {why}")),
    };
    Accelerator { name: name.to_owned(), reason }
}

/// One accelerator is taken as it is. If the host has none of several, the last is taken, which
/// QEMU reports as an error.
fn first(wanted: &[String], has_kvm: impl Fn() -> bool) -> Option<&str> {
    let is_there = |value: &&String| match value.split(',').next().unwrap_or_default() {
        "kvm" => has_kvm(),
        "tcg" => true,
        _ => false,
    };
    let hit = if wanted.len() > 1 { wanted.iter().find(is_there) } else { None };
    hit.or(wanted.last()).map(String::as_str)
}

/// Whether QEMU would consider KVM available.
fn has_kvm() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The `-accel` value of a running VM: as on its command line if that matches, else its name.
pub fn of_running(options: &[QemuOption], name: &str) -> String {
    let mut accels = options.iter().filter(|option| option.name == "accel").map(QemuOption::value);
    let named = accels.rfind(|value| value.split(',').next() == Some(name));
    named.unwrap_or(name).to_owned()
}

/// The options without the accelerator, which is given separately.
pub fn without(options: Vec<QemuOption>) -> Vec<QemuOption> {
    let kept = options
        .into_iter()
        .filter(|option| !["accel", "enable-kvm"].contains(&option.name.as_str()));
    kept.map(|option| match option.name.as_str() {
        "machine" | "M" => {
            QemuOption::with(&option.name, drop_key(&option.keys(), "accel").to_string())
        }
        _ => option,
    })
    .collect()
}

fn drop_key(list: &KeyList, unwanted: &str) -> KeyList {
    let mut kept = KeyList::default();
    for (key, value) in list.iter().filter(|(key, _)| *key != Some(unwanted)) {
        kept.push(key, value);
    }
    kept
}

/// In the order in which QEMU tries them, each as a value of `-accel`.
fn wanted(options: &[QemuOption]) -> Vec<String> {
    let asked = options.iter().flat_map(|option| match option.name.as_str() {
        "accel" => vec![option.value().to_owned()],
        "enable-kvm" => vec!["kvm".to_owned()],
        _ => Vec::new(),
    });
    let asked: Vec<String> = asked.collect();
    if !asked.is_empty() {
        return asked;
    }
    let vms = options.iter().filter(|option| ["machine", "M"].contains(&option.name.as_str()));
    let last =
        vms.filter_map(|option| Form::of(option).get("accel")).next_back().unwrap_or_default();
    last.split(':').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Checks that KVM runs a guest in long mode.
///
/// # Errors
/// Why it does not, as text for the user.
pub fn kvm_works(qemu: &Path) -> Result<(), String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm: {error}"));
    }
    let key = format!("{} {}", process::boot_id().unwrap_or_default(), qemu.display());
    let works = match cache::load::<bool>("kvm", &key) {
        Some(known) => Some(known),
        None => run_probe(qemu)
            .map_err(|error| format!("{error:#}"))?
            .inspect(|works| cache::save("kvm", &key, works)),
    };
    match works {
        Some(true) => Ok(()),
        Some(false) => Err("/dev/kvm opens, but a guest in long mode does not run".to_owned()),
        None => Err(format!("{} under KVM ended before the probe did", qemu.display())),
    }
}

/// Whether the probe ran; `None` if QEMU ended in a way that says nothing about KVM.
fn run_probe(qemu: &Path) -> Result<Option<bool>> {
    let mut rom = vec![0; ROM_BYTES];
    rom[..LONG_MODE.len()].copy_from_slice(LONG_MODE);
    rom[RESET_VECTOR..RESET_VECTOR + JUMP.len()].copy_from_slice(&JUMP);
    let mut file = tempfile::NamedTempFile::new().context("making the probe's firmware")?;
    file.write_all(&rom).context("writing the probe's firmware")?;
    let mut child = Command::new(qemu)
        .args([
            "-accel",
            "kvm",
            "-machine",
            "pc",
            "-m",
            "16",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args(["-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the probe")?;
    if let Some(status) = ended_within(&mut child, PROBE_TIMEOUT)? {
        return Ok((status.code() == Some(SUCCESS)).then_some(true));
    }
    child.kill().context("ending the probe")?;
    child.wait().context("waiting for the probe")?;
    Ok(Some(false))
}

#[cfg(test)]
mod test {
    use super::super::arguments::{parse, words};
    use super::*;

    fn options(line: &str) -> Vec<QemuOption> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_users_choice_is_found_wherever_it_stands() {
        for (line, list) in [
            ("-enable-kvm -m 1G", &["kvm"][..]),
            ("-accel tcg,thread=multi", &["tcg,thread=multi"]),
            ("-machine q35,accel=kvm", &["kvm"]),
            ("-machine q35,accel=kvm:tcg", &["kvm", "tcg"]),
            ("-M accel=tcg -M accel=kvm", &["kvm"]),
            ("-accel kvm -accel tcg,thread=single", &["kvm", "tcg,thread=single"]),
            ("-accel tcg -enable-kvm", &["tcg", "kvm"]),
            ("-m 1G", &[]),
        ] {
            assert_eq!(wanted(&options(line)), list, "{line}");
        }
    }

    #[test]
    fn of_several_the_first_that_is_there_is_taken() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let (kvm_first, tcg_first) =
            (list(&["kvm,x=1", "tcg,thread=multi"]), list(&["tcg", "kvm"]));
        assert_eq!(first(&kvm_first, || true), Some("kvm,x=1"));
        assert_eq!(first(&kvm_first, || false), Some("tcg,thread=multi"));
        assert_eq!(first(&tcg_first, || false), Some("tcg"));
        assert_eq!(first(&list(&["hvf", "kvm"]), || true), Some("kvm"));
        assert_eq!(first(&list(&["kvm"]), || false), Some("kvm"), "QEMU says itself why it cannot");
        assert_eq!(first(&[], || true), None);
    }

    #[test]
    fn a_running_vm_has_the_one_that_it_says() {
        assert_eq!(of_running(&options("-accel tcg,thread=multi"), "tcg"), "tcg,thread=multi");
        assert_eq!(of_running(&options("-M q35,accel=kvm:tcg"), "tcg"), "tcg");
        assert_eq!(
            of_running(&options("-accel kvm -accel tcg"), "kvm"),
            "kvm",
            "the one that came first ran"
        );
        assert_eq!(of_running(&options("-enable-kvm"), "kvm"), "kvm");
    }

    #[test]
    fn the_accelerator_is_taken_out() {
        let left = without(options("-M q35,accel=tcg,usb=off -accel tcg -enable-kvm -m 1G"));
        assert_eq!(words(&left).join(" "), "-M q35,usb=off -m 1G");
    }
}
