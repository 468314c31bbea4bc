//! Pages that come when they are touched: the toucher waits, reads what was installed, and no page
//! that exists is replaced.

mod support;

use std::os::fd::AsFd;
use std::sync::mpsc;

use checkpoint_format::{PageIndex, PageRange};
use dirty_tracker::{BlockId, MissingPages, Tracker, TrackerError};
use support::{PAGE, StandIn, acknowledge, checkpoint, numbers};

const PAGES: u64 = 600;

fn range(start: u64, end: u64) -> PageRange {
    PageRange::new(PageIndex(start), PageIndex(end))
}

/// A process whose memory waits in 0..100 and 200..300, and is zero between and after.
fn begin() -> (StandIn, Tracker, BlockId, MissingPages) {
    let mut guest = StandIn::start(PAGES, 1);
    // Of no worth: what a new QEMU has put there before.
    guest.write('s', &[7]);
    let (mut tracker, shared, _) = guest.attach();
    let block = tracker.block(shared).unwrap().clone();
    let parts = [range(0, 100), range(200, 300)];
    let missing = MissingPages::begin(tracker.handles(), block, &parts).unwrap();
    tracker.protect_all().unwrap();
    tracker.set_arriving(shared, true).unwrap();
    (guest, tracker, shared, missing)
}

fn faults(missing: &MissingPages) -> Vec<u64> {
    let (stopped, _stop) = std::io::pipe().unwrap();
    let faults = missing.wait_for_faults(stopped.as_fd()).unwrap().expect("a fault");
    faults.into_iter().map(PageIndex::get).collect()
}

/// There is no fault to be read.
fn assert_quiet(missing: &MissingPages) {
    let (stopped, stop) = std::io::pipe().unwrap();
    drop(stop);
    assert_eq!(missing.wait_for_faults(stopped.as_fd()).unwrap(), None);
}

/// Lets the process do `line`, and says when it is done.
fn meanwhile<T>(guest: &mut StandIn, line: &str, work: impl FnOnce(&mpsc::Receiver<()>) -> T) -> T {
    let (done, is_done) = mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            assert_eq!(guest.tell(line), "ok");
            done.send(()).unwrap();
        });
        let result = work(&is_done);
        is_done.recv_timeout(support::TIMEOUT).expect("it waits for ever");
        result
    })
}

fn claim(tracker: &mut Tracker, block: BlockId) -> Vec<u64> {
    let mut claim = tracker.begin_claim(checkpoint());
    let pages = numbers(&tracker.claim(block, &mut claim).unwrap());
    acknowledge(claim);
    pages
}

fn page_of(guest: &StandIn, page: u64) -> [u8; 2] {
    let mut bytes = [0; 2];
    guest.memory.read(page * PAGE, &mut bytes).unwrap();
    bytes
}

#[test]
fn missing_page_is_waited_for_and_counts_as_not_written() {
    let (mut guest, mut tracker, shared, missing) = begin();
    assert_quiet(&missing);
    let content = [[3; PAGE as usize], [4; PAGE as usize]].concat();
    meanwhile(&mut guest, "r s 7", |is_done| {
        assert_eq!(faults(&missing), [7], "what was there before is gone");
        assert!(is_done.try_recv().is_err(), "it did not wait");
        assert_eq!(missing.install(PageIndex(7), &content).unwrap(), 2 * PAGE);
    });
    assert_eq!(claim(&mut tracker, shared), [0; 0], "read, and installed beside it");
    meanwhile(&mut guest, "w s 250", |_| {
        assert_eq!(faults(&missing), [250]);
        missing.install(PageIndex(250), &content[..PAGE as usize]).unwrap();
    });
    // Installed before it is touched; and a page outside of the parts.
    guest.write('s', &[8, 150]);
    assert_eq!(claim(&mut tracker, shared), [8, 150, 250]);
    let bytes = [7, 8, 150, 250].map(|page| page_of(&guest, page));
    assert_eq!(bytes, [[3, 3], [5, 4], [1, 0], [4, 3]]);
    assert_eq!(missing.missing_in(range(0, 100)).unwrap(), [range(0, 7), range(9, 100)]);
}

#[test]
fn missing_page_that_exists_is_never_replaced() {
    let (mut guest, mut tracker, shared, missing) = begin();
    let page = [9; PAGE as usize];
    missing.install(PageIndex(20), &page).unwrap();
    guest.write('s', &[20]);
    let many = vec![1; 100 * PAGE as usize];
    assert_eq!(missing.install(PageIndex(0), &many).unwrap(), 99 * PAGE, "all but one");
    assert_eq!(page_of(&guest, 20), [10, 9]);
    assert_eq!(missing.missing_in(range(0, 100)).unwrap(), []);
    assert_eq!(missing.install(PageIndex(0), &many).unwrap(), 0);
    assert_eq!(claim(&mut tracker, shared), [20]);
    // Across parts, and memory outside of them.
    let most = vec![2; 250 * PAGE as usize];
    assert_eq!(missing.install(PageIndex(90), &most).unwrap(), 240 * PAGE);
    assert!(matches!(
        missing.install(PageIndex(PAGES - 1), &many),
        Err(TrackerError::OutOfRange { .. })
    ));
}

#[test]
fn missing_page_that_a_dead_process_has_read_comes_from_the_next() {
    let (mut guest, tracker, shared, missing) = begin();
    let block = tracker.block(shared).unwrap().clone();
    let handles = guest.handles();
    meanwhile(&mut guest, "w s 5", |is_done| {
        assert_eq!(faults(&missing), [5]);
        // It has read the fault and ends.
        drop((missing, tracker));
        let next = MissingPages::resume(&handles, block).unwrap();
        assert_quiet(&next);
        assert!(is_done.try_recv().is_err(), "it did not wait");
        next.wake_all().unwrap();
        assert_eq!(faults(&next), [5]);
        next.install(PageIndex(5), &[6; PAGE as usize]).unwrap();
    });
    assert_eq!(page_of(&guest, 5), [7, 6]);
}

#[test]
fn missing_pages_are_no_zeros_for_the_tracker() {
    let (mut guest, mut tracker, shared, missing) = begin();
    assert!(matches!(tracker.populated(shared), Err(TrackerError::Arriving { .. })));
    // A tracker that knows nothing would need all.
    let (mut other, again, _) = guest.attach();
    other.set_arriving(again, true).unwrap();
    assert!(matches!(other.prepare(), Err(TrackerError::Arriving { .. })));
    let mut claim = other.begin_claim(checkpoint());
    assert!(matches!(other.claim(again, &mut claim), Err(TrackerError::Arriving { .. })));
    tracker.set_arriving(shared, false).unwrap();
    assert!(tracker.populated(shared).is_ok());
    guest.kill();
    let error = missing.install(PageIndex(0), &[1; PAGE as usize]).unwrap_err();
    assert!(error.is_process_gone(), "{error:?}");
}
