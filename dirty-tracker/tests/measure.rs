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

/// A VM of 12 GiB, of which so much is in use: what watching for holes adds to a lease, and what it costs before.
#[test]
#[ignore = "takes 4 GiB of memory and prints figures"]
fn costs_of_watching_for_holes() {
    for (used, watched) in [(1, false), (1, true), (4, false), (4, true)] {
        println!("12 GiB of shared memory, {used} GiB in use, {}", if watched { "watched for holes" } else { "not watched" });
        let mut guest = StandIn::start(12 * PAGES, 1);
        (0..used).for_each(|gib| guest.write('s', &(gib * 2 * PAGES..(gib * 2 + 1) * PAGES).collect::<Vec<_>>()));
        let (mut tracker, shared, _) = if watched { guest.attach_watching() } else { guest.attach() };
        timed("prepare", || tracker.prepare().unwrap());
        lease(&mut tracker, shared, "first lease");
        timed("look: nothing happened", || tracker.scan(shared).unwrap());
        lease(&mut tracker, shared, "lease: nothing happened");
        guest.write('s', &(0..PAGES).step_by(64).collect::<Vec<_>>());
        lease(&mut tracker, shared, "lease: every 64th page of 1 GiB written");
        if watched {
            (0..PAGES / 4).step_by(16).for_each(|page| guest.act('x', 's', &[page, 8]));
            timed("look: 128 MiB given back in runs of 8 pages", || tracker.scan(shared).unwrap());
            lease(&mut tracker, shared, "lease of these");
            (PAGES / 4..PAGES / 2).step_by(16).for_each(|page| guest.act('x', 's', &[page, 8]));
            lease(&mut tracker, shared, "lease without a look: 128 MiB given back in runs of 8 pages");
        }
    }
}
