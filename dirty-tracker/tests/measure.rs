//! What tracking costs: figures to print, not limits to hold.
//!
//! `cargo test --release -p dirty-tracker --test measure -- --ignored --nocapture`

mod support;

use std::time::Instant;

use checkpoint_format::{PageCount, PageSet};
use dirty_tracker::{BlockId, Tracker};
use support::{PAGE, StandIn, acknowledge, checkpoint};

const PAGES: u64 = (1 << 30) / PAGE;

fn timed<T>(what: &str, action: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = action();
    println!("{:>9.3} ms  {what}", started.elapsed().as_secs_f64() * 1e3);
    result
}

fn claim(tracker: &mut Tracker, block: BlockId, what: &str) -> PageSet {
    let mut claim = tracker.begin_claim(checkpoint());
    let pages = timed(what, || tracker.claim(block, &mut claim).unwrap());
    println!("              {} pages, {} ranges", pages.count(), pages.ranges().count());
    acknowledge(claim);
    pages
}

fn read_all(tracker: &Tracker, block: BlockId, pages: &PageSet, what: &str) {
    let mut buffer = vec![0; (256 * PAGE) as usize];
    timed(what, || {
        for range in pages.ranges().flat_map(|range| range.chunks(PageCount(256))) {
            let part = &mut buffer[..range.byte_len().as_usize()];
            tracker.read_pages(block, range, part).unwrap();
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
    let block = if memory == 's' { shared } else { private };
    claim(&mut tracker, block, "first claim: find what exists, protect all");
    claim(&mut tracker, block, "claim: nothing written");
    timed("look: nothing written", || tracker.scan(block).unwrap());
    guest.write(memory, &(0..PAGES / 2).step_by(64).collect::<Vec<_>>());
    let scattered = claim(&mut tracker, block, "claim: every 64th page of the first half written");
    read_all(&tracker, block, &scattered, "read these");
    guest.write(memory, &(0..PAGES / 2).collect::<Vec<_>>());
    let half = claim(&mut tracker, block, "claim: all of the first half written");
    read_all(&tracker, block, &half, "read these");
    guest.write(memory, &(0..PAGES).step_by(2).collect::<Vec<_>>());
    claim(
        &mut tracker,
        block,
        "claim: every other page written, the worst case for the kernel's answer",
    );
}

#[test]
#[ignore = "takes 2 GiB of memory and prints figures"]
fn costs() {
    for prepared in [false, true] {
        measure('s', prepared);
        measure('p', prepared);
    }
}

/// A VM of 12 GiB, of which so much is in use: what watching for holes adds to a claim, and what it
/// costs before.
#[test]
#[ignore = "takes 4 GiB of memory and prints figures"]
fn costs_of_watching_for_holes() {
    for (used, watched) in [(1, false), (1, true), (4, false), (4, true)] {
        println!(
            "12 GiB of shared memory, {used} GiB in use, {}",
            if watched { "watched for holes" } else { "not watched" }
        );
        let mut guest = StandIn::start(12 * PAGES, 1);
        (0..used).for_each(|gib| {
            guest.write('s', &(gib * 2 * PAGES..(gib * 2 + 1) * PAGES).collect::<Vec<_>>())
        });
        let (mut tracker, shared, _) =
            if watched { guest.attach_watching() } else { guest.attach() };
        timed("prepare", || tracker.prepare().unwrap());
        claim(&mut tracker, shared, "first claim");
        timed("look: nothing happened", || tracker.scan(shared).unwrap());
        claim(&mut tracker, shared, "claim: nothing happened");
        guest.write('s', &(0..PAGES).step_by(64).collect::<Vec<_>>());
        claim(&mut tracker, shared, "claim: every 64th page of 1 GiB written");
        if watched {
            (0..PAGES / 4).step_by(16).for_each(|page| guest.act('x', 's', &[page, 8]));
            timed("look: 128 MiB discarded in runs of 8 pages", || tracker.scan(shared).unwrap());
            claim(&mut tracker, shared, "claim of these");
            (PAGES / 4..PAGES / 2).step_by(16).for_each(|page| guest.act('x', 's', &[page, 8]));
            claim(
                &mut tracker,
                shared,
                "claim without a look: 128 MiB discarded in runs of 8 pages",
            );
        }
    }
}
