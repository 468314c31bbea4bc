//! What this helper holds, and the most that it may hold (docs/limits.md has the sum).
//!
//! Only private memory counts: the guest's pages are mapped here too, but they are QEMU's.

use engine::restore::{disk_export, hydration};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vm::process::Process;
use vm::running::Vm;

/// The program, its threads and queues, and the digests of disks and device state.
const PROGRAM: u64 = 96 << 20;
/// Staged pages, and packs being filled and written.
const STAGING: u64 = 256 << 20;
/// Digests, page sets and the tracker's tables, for each page of the guest.
const A_PAGE: u64 = 20;
/// Between two looks at a checkpoint's memory.
const INTERVAL: Duration = Duration::from_millis(20);

static PEAK: AtomicU64 = AtomicU64::new(0);

/// The most that any look has found, in bytes. The kernel keeps such a peak only with shared pages
/// in it.
pub(crate) fn peak() -> Option<u64> {
    sample()?;
    Some(PEAK.load(Ordering::Relaxed))
}

/// `is_hydrating`: the guest's memory is still arriving; `exports`: blocks of its disks are.
pub(crate) fn limit(vm: &Vm, is_hydrating: bool, exports: bool) -> u64 {
    let hydration = if is_hydrating { hydration::MEMORY.0 } else { 0 };
    let exports = if exports { disk_export::MEMORY.0 } else { 0 };
    let pages: u64 =
        vm.blocks.iter().map(|block| block.used / checkpoint_format::PAGE_SIZE as u64).sum();
    PROGRAM + STAGING + hydration + exports + pages * A_PAGE
}

/// Looks at the memory often while it lives.
pub(crate) struct Watch(Arc<AtomicBool>);

impl Watch {
    pub(crate) fn begin() -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) && sample().is_some() {
                std::thread::sleep(INTERVAL);
            }
        });
        Self(ended)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn sample() -> Option<u64> {
    // Resident pages without those of files and shared memory.
    let pages = Process::myself().ok()?.statm().ok()?;
    let now = pages.resident.saturating_sub(pages.shared) * rustix::param::page_size() as u64;
    PEAK.fetch_max(now, Ordering::Relaxed);
    Some(now)
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::scene::{PAGES, Scene};
    use std::time::Instant;

    /// As docs/limits.md adds it up.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn helper_memory_limit_grows_with_the_guest_and_while_memory_arrives() {
        let vm = Scene::new().vm().await;
        let pages = (PAGES.0 + PAGES.1) as u64;
        assert_eq!(limit(&vm, false, false), (352 << 20) + 20 * pages);
        assert_eq!(limit(&vm, true, false) - limit(&vm, false, false), 160 << 20);
        assert_eq!(limit(&vm, true, true) - limit(&vm, true, false), 128 << 20);
    }

    #[test]
    fn helper_memory_peak_outlives_what_was_held() {
        const HELD: usize = 64 << 20;
        let before = sample().unwrap();
        let watch = Watch::begin();
        let held = std::hint::black_box(vec![1_u8; HELD]);
        let seen = || PEAK.load(Ordering::Relaxed) >= before + HELD as u64 / 2;
        let end = Instant::now() + Duration::from_secs(30);
        while !seen() {
            assert!(Instant::now() < end, "no look has seen what is held");
            std::thread::yield_now();
        }
        drop((held, watch));
        assert!(peak().unwrap() >= before + HELD as u64 / 2);
    }
}
