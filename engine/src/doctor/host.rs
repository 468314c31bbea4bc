//! The kernel and the tools that the launcher calls.

use super::Row;
use dirty_tracker::{GuestMemory, HostCheck, HostSupport};
use std::process::{Command, Stdio};
use vm::files;

/// Large enough to be sealed and mapped as a VM's memory is.
const TRIAL_MEMORY: u64 = 1 << 20;

pub(super) fn check() -> Vec<Row> {
    let support = HostSupport::probe();
    let mut rows = vec![kernel(&support)];
    rows.extend(support.checks.iter().map(|check| tracking(check, support.can_track)));
    rows.push(memory());
    rows.push(setsid());
    rows
}

fn kernel(support: &HostSupport) -> Row {
    const CHECK: &str = "kernel";
    let release = files::read_text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = format!("Linux {}", release.trim());
    if support.can_track {
        Row::ok(CHECK, release)
    } else {
        Row::no(
            CHECK,
            format!("{release} cannot track written pages for Stillpoint"),
            "see the rows below",
        )
    }
}

/// What tracking can do without is a warning.
fn tracking(check: &HostCheck, can_track: bool) -> Row {
    match check.remedy {
        None => Row::ok(check.name, &check.detail),
        Some(remedy) if can_track => Row::warn(check.name, &check.detail, remedy),
        Some(remedy) => Row::no(check.name, &check.detail, remedy),
    }
}

fn memory() -> Row {
    const CHECK: &str = "sealed memory files";
    let tried =
        GuestMemory::create("doctor", TRIAL_MEMORY).and_then(|memory| memory.write(0, &[1]));
    match tried {
        Ok(()) => Row::ok(CHECK, "memfd_create and sealing work"),
        Err(error) => Row::no(
            CHECK,
            error.to_string(),
            "use a kernel with CONFIG_MEMFD_CREATE, and allow this user enough memory",
        ),
    }
}

fn setsid() -> Row {
    const CHECK: &str = "setsid";
    const REMEDY: &str = "install util-linux (Debian: apt-get install util-linux); 'stillpoint run' starts the helper with it";
    let tried = Command::new("setsid")
        .args(["--fork", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) if status.success() => {
            Row::ok(CHECK, "starts a process in a session of its own")
        }
        Ok(status) => Row::no(CHECK, format!("'setsid --fork' fails ({status})"), REMEDY),
        Err(error) => Row::no(CHECK, format!("it cannot be started: {error}"), REMEDY),
    }
}

#[cfg(test)]
mod test {
    use super::super::State;
    use super::*;

    #[test]
    fn a_lack_counts_only_as_far_as_tracking_needs_it() {
        let lack =
            HostCheck { name: "x", ok: false, detail: "none".to_owned(), remedy: Some("get one") };
        assert_eq!(tracking(&lack, true).state, State::Warn);
        assert_eq!(tracking(&lack, false).state, State::No);
        let fine = HostCheck { remedy: None, ok: true, ..lack };
        assert_eq!(tracking(&fine, false).state, State::Ok);
    }
}
