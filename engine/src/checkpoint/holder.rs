//! Who holds a VM's writer epoch, and whether that writer can still be alive.
//!
//! The answer is used to take an epoch over without being told to, so it is "no" only where there
//! is no doubt. A host's name and its machine-id prove nothing: a cloned disk has both. A boot id
//! is of one kernel that runs now or ran before; hardware has an identifier of its own; and what
//! was written after this kernel booted, by another kernel, was not written here.

use anyhow::{Context, Result};
use checkpoint_store::WriterRecord;
use std::time::{Duration, SystemTime};
use vm::files;
use vm::launch::command::is_running;
use vm::process;

pub(super) type Holder = WriterRecord;

/// A clock that was set while the host ran moves the boot's time.
const CLOCK_STEP: Duration = Duration::from_secs(60);
/// What boards without a number of their own show.
const NO_NUMBER: &[&str] = &[
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "03000200-0400-0500-0006-000700080009",
    "12345678-1234-5678-90ab-cddeefaabbcc",
];

/// Whether `holder` has surely ended, as seen from the host of `here`.
pub(super) fn cannot_live(holder: &Holder, here: &Holder) -> bool {
    let is_other_hardware = holder
        .hardware
        .as_ref()
        .zip(here.hardware.as_ref())
        .is_some_and(|(theirs, ours)| theirs != ours);
    if holder.host != here.host || is_other_hardware {
        return false;
    }
    if holder.boot_id == here.boot_id {
        return sees_all_processes() && !is_running(&holder.instance);
    }
    let is_known = holder.hardware.is_some() && here.hardware.is_some();
    is_known && booted().is_some_and(|booted| is_older(holder, booted))
}

fn is_older(holder: &Holder, booted: SystemTime) -> bool {
    humantime::parse_rfc3339(&holder.claimed_at).is_ok_and(|claimed| claimed + CLOCK_STEP < booted)
}

/// With `hidepid` another user's QEMU looks as if it had ended.
fn sees_all_processes() -> bool {
    nix::unistd::geteuid().is_root()
        || process::open(1).and_then(|init| process::command_line(&init)).is_ok()
}

/// When this kernel booted, by today's clock.
fn booted() -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(procfs::boot_time_secs().ok()?))
}

/// This process as a writer of `instance`.
pub(super) fn record(instance: &str) -> Result<Holder> {
    let boot = process::boot_id()?;
    Ok(Holder {
        host: host(&boot)?,
        boot_id: boot,
        instance: instance.to_owned(),
        pid: std::process::id(),
        claimed_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hardware: files::read_text("/sys/class/dmi/id/product_uuid")
            .ok()
            .and_then(|uuid| hardware(&uuid)),
    })
}

/// A digest, since the number itself is for root's eyes only. Only root can read it, so an ordinary
/// user's records have none.
fn hardware(uuid: &str) -> Option<String> {
    let uuid = uuid.trim().to_ascii_lowercase();
    let is_one = !uuid.is_empty() && !NO_NUMBER.contains(&uuid.as_str());
    is_one.then(|| {
        blake3::hash(format!("stillpoint host {uuid}").as_bytes()).to_hex()[..32].to_owned()
    })
}

/// The host's name and machine-id, and which processes can be seen from here at all.
fn host(boot: &str) -> Result<String> {
    let name = nix::unistd::gethostname().context("asking for the host's name")?;
    let id = files::read_text("/etc/machine-id")
        .map(|id| id.trim().to_owned())
        .ok()
        .filter(|id| !id.is_empty());
    // Without an id only records of this very boot may look like this host.
    let id = id.unwrap_or_else(|| boot.to_owned());
    let processes =
        std::fs::read_link("/proc/self/ns/pid").context("asking for our process namespace")?;
    Ok(format!("{} (VM {id}, {})", name.to_string_lossy(), processes.display()))
}

#[cfg(test)]
mod test {
    use super::*;

    fn here() -> Holder {
        Holder { hardware: Some("board-1".to_owned()), ..record("i").unwrap() }
    }

    fn before_this_boot() -> String {
        humantime::format_rfc3339_seconds(booted().unwrap() - Duration::from_secs(3600)).to_string()
    }

    #[test]
    fn holder_of_an_earlier_boot_is_dead_only_on_this_hardware() {
        let here = here();
        let earlier = Holder {
            boot_id: "another".to_owned(),
            claimed_at: before_this_boot(),
            ..here.clone()
        };
        assert!(cannot_live(&earlier, &here));
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let doubtful = [
            ("a clone that runs now", Holder { claimed_at: now, ..earlier.clone() }),
            ("other hardware", Holder { hardware: Some("board-2".to_owned()), ..earlier.clone() }),
            ("a record of an older version", Holder { hardware: None, ..earlier.clone() }),
            ("another name", Holder { host: "another".to_owned(), ..earlier.clone() }),
            (
                "a time that is none",
                Holder { claimed_at: "yesterday".to_owned(), ..earlier.clone() },
            ),
        ];
        for (what, holder) in doubtful {
            assert!(!cannot_live(&holder, &here), "{what}");
        }
        let unknown = Holder { hardware: None, ..here };
        assert!(
            !cannot_live(&Holder { hardware: None, ..earlier.clone() }, &unknown),
            "unknown hardware is not the same"
        );
        assert!(!cannot_live(&earlier, &unknown));
    }

    #[test]
    fn holder_of_this_boot_is_dead_if_its_qemu_is() {
        let here = Holder { hardware: None, ..here() };
        let gone =
            Holder { instance: "6b9e6d2c-70a5-4f3e-9a4b-222222222222".to_owned(), ..here.clone() };
        assert_eq!(cannot_live(&gone, &here), sees_all_processes());
        assert!(!cannot_live(&Holder { host: "a container".to_owned(), ..gone.clone() }, &here));
        let started = vm::process::started(std::process::id()).unwrap();
        let alive = vm::launch::instance::of_process(
            std::process::id(),
            started,
            "file:///s",
            &"m".parse().unwrap(),
        )
        .unwrap();
        assert!(!cannot_live(&Holder { instance: alive, ..gone }, &here));
    }

    #[test]
    fn hardware_without_a_number_is_unknown() {
        assert_eq!(hardware("03000200-0400-0500-0006-000700080009\n"), None);
        assert_eq!(hardware("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"), None);
        assert_eq!(hardware("\n"), None);
        let one = hardware("4c4c4544-0051-3610-8052-b4c04f4d3532").unwrap();
        assert!(one.len() == 32 && !one.contains("4c4c4544"));
        assert_eq!(Some(one), hardware("4C4C4544-0051-3610-8052-B4C04F4D3532\n"));
    }
}
