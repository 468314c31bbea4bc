//! Whether this host can track, found out by trying.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use checkpoint_format::PAGE_SIZE;

use crate::sys::pagemap::{Categories, ScanBuffer, Then, scan};
use crate::sys::trial::TrialMemory;
use crate::sys::write_protect::{protect, register};
use plugin_protocol::uapi;
use plugin_protocol::uffd::{self, OpenUffd};
use plugin_protocol::wire::UffdSource;

/// One thing that tracking needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCheck {
    /// What is checked.
    pub name: &'static str,
    /// Whether the host has it.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What to do about it; `None` when it is fine.
    pub remedy: Option<&'static str>,
}

impl HostCheck {
    fn fine(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, ok: true, detail: detail.into(), remedy: None }
    }

    fn failed(name: &'static str, detail: impl Into<String>, remedy: &'static str) -> Self {
        Self { name, ok: false, detail: detail.into(), remedy: Some(remedy) }
    }
}

/// What the host allows this process; a QEMU that runs as the same user gets the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSupport {
    /// All checks, in the order in which they depend on each other.
    pub checks: Vec<HostCheck>,
    /// Dirty pages can be tracked.
    pub can_track: bool,
    /// Missing pages can be filled on demand: lazy restore.
    pub can_fill: bool,
}

const KERNEL_REMEDY: &str =
    "use Linux 6.7 or later, built with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP";
const FILL_REMEDY: &str = "give this user access to /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1; tracking works without";

/// Names of the features, for people.
const FEATURES: [(u64, &str); 5] = [
    (uapi::FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP"),
    (uapi::FEATURE_MISSING_SHMEM, "MISSING_SHMEM"),
    (uapi::FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM"),
    (uapi::FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED"),
    (uapi::FEATURE_WP_ASYNC, "WP_ASYNC"),
];

impl HostSupport {
    /// Opens a uffd as the plugin would, and tracks a few pages of its own with it. Changes nothing
    /// and takes about a millisecond.
    pub fn probe() -> Self {
        match uffd::open() {
            Ok(open) => Self::with_uffd(&open),
            Err(none) => {
                let missing = missing_features(none.offered_features);
                let detail = match none.offered_features {
                    0 => none.error.to_string(),
                    _ => format!("the kernel lacks {missing}"),
                };
                let check = HostCheck::failed("userfaultfd", detail, KERNEL_REMEDY);
                Self { checks: vec![check], can_track: false, can_fill: false }
            }
        }
    }

    fn with_uffd(open: &OpenUffd) -> Self {
        let found = HostCheck::fine("userfaultfd", "all features of write tracking");
        let fill = match open.source {
            UffdSource::UserModeOnly | UffdSource::None => HostCheck::failed(
                "filling pages on demand",
                "userfaultfd for user-mode faults only",
                FILL_REMEDY,
            ),
            UffdSource::Device => {
                HostCheck::fine("filling pages on demand", "through /dev/userfaultfd")
            }
            UffdSource::Syscall => {
                HostCheck::fine("filling pages on demand", "through userfaultfd(2)")
            }
        };
        let scan = match track_a_few_pages(open) {
            Ok(()) => HostCheck::fine("PAGEMAP_SCAN", "finds exactly the pages that were written"),
            Err(error) => HostCheck::failed("PAGEMAP_SCAN", error.to_string(), KERNEL_REMEDY),
        };
        let (can_track, can_fill) = (scan.ok, fill.ok);
        Self { checks: vec![found, scan, fill], can_track, can_fill }
    }
}

fn missing_features(offered: u64) -> String {
    let missing: Vec<_> =
        FEATURES.iter().filter(|(bit, _)| offered & bit == 0).map(|(_, name)| *name).collect();
    missing.join(", ")
}

/// The whole way on four pages of shared memory: register, protect, write one, find it.
fn track_a_few_pages(open: &OpenUffd) -> io::Result<()> {
    let mut trial = TrialMemory::new(4 * PAGE_SIZE)?;
    let addresses = trial.addresses();
    let pagemap = File::open("/proc/self/pagemap")?;
    register(open.fd.as_fd(), &addresses)?;
    protect(open.fd.as_fd(), &addresses)?;
    trial.write_byte(PAGE_SIZE);
    let page = PAGE_SIZE as u64;
    let expected = addresses.start + page..addresses.start + 2 * page;
    match written(&pagemap, &addresses)?.as_slice() {
        [found] if *found == expected => {}
        other => {
            return Err(io::Error::other(format!(
                "one page was written, the kernel reports {}",
                other.len()
            )));
        }
    }
    match written(&pagemap, &addresses)?.is_empty() {
        true => Ok(()),
        false => Err(io::Error::other("pages do not become clean again")),
    }
}

fn written(pagemap: &File, addresses: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut buffer = ScanBuffer::new();
    scan(pagemap, addresses.clone(), Categories::WRITTEN, Then::Protect, &mut buffer, |run| {
        found.push(run)
    })?;
    Ok(found)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_host_that_runs_these_tests_can_track() {
        let support = HostSupport::probe();
        assert!(support.can_track, "{support:#?}");
        assert!(support.checks.iter().all(|check| check.ok == check.remedy.is_none()));
        assert_eq!(support.checks.len(), 3);
    }

    #[test]
    fn missing_features_are_named() {
        assert_eq!(missing_features(!uapi::FEATURE_WP_ASYNC), "WP_ASYNC");
        assert_eq!(missing_features(uapi::WANTED_FEATURES), "");
    }
}
