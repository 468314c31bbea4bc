//! What tracking costs: figures to print, not limits to hold.
//!
//! `cargo test --release -p dirty-tracker --test measure -- --ignored --nocapture`

mod support;

use std::time::Instant;

use checkpoint_format::{PageCount, PageSet};
use dirty_tracker::{RegionId, Tracker};
use support::{PAGE, Receipt, StandIn};

const PAGES: u64 = (1 << 30) / PAGE;

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = action();
    println!("{:>9.3} ms  {what}", started.elapsed().as_secs_f64() * 1e3);
    result
}

fn lease(tracker: &mut Tracker, region: RegionId, what: &str) -> PageSet {
    let mut lease = tracker.begin_lease();
    let pages = timed(what, || tracker.lease(region, &mut lease).unwrap());
    println!("              {} pages, {} ranges", pages.count(), pages.ranges().count());
    lease.settle(&Receipt::new());
    pages
}

fn read_all(tracker: &Tracker, region: RegionId, pages: &PageSet, what: &str) {
    let mut buffer = vec![0; (256 * PAGE) as usize];
    timed(what, || {
        for range in pages.ranges().flat_map(|range| range.chunks(PageCount(256))) {
            let part = &mut buffer[..range.byte_len().as_usize()];
            tracker.read_pages(region, range, part).unwrap();
        }
    });
}

fn measure(memory: char, prepared: bool) {
    let kind = if memory == 's' { "shared" } else { "private" };
    println!("1 GiB of {kind} memory{}", if prepared { ", prepared" } else { "" });
    let mut guest = StandIn::start(PAGES, PAGES);
    guest.write(memory, &(0..PAGES / 2).collect::<Vec<_>>());
    let (mut tracker, shared, private) = timed("connect and attach", || guest.attach());
    if prepared {
        timed("prepare", || tracker.prepare().unwrap());
    }
    let region = if memory == 's' { shared } else { private };
    lease(&mut tracker, region, "first lease: find what exists, protect all");
    lease(&mut tracker, region, "lease: nothing written");
    timed("look: nothing written", || tracker.scan(region).unwrap());
    guest.write(memory, &(0..PAGES / 2).step_by(64).collect::<Vec<_>>());
    let scattered = lease(&mut tracker, region, "lease: every 64th page of the first half written");
    read_all(&tracker, region, &scattered, "read these");
    guest.write(memory, &(0..PAGES / 2).collect::<Vec<_>>());
    let half = lease(&mut tracker, region, "lease: all of the first half written");
    read_all(&tracker, region, &half, "read these");
    guest.write(memory, &(0..PAGES).step_by(2).collect::<Vec<_>>());
    lease(&mut tracker, region, "lease: every other page written, the worst case for the kernel's answer");
}

#[test]
#[ignore = "takes 2 GiB of memory and prints figures"]
fn costs() {
    for prepared in [false, true] {
        measure('s', prepared);
        measure('p', prepared);
    }
}
