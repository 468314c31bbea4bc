//! What an NBD server sends: the handshake, then replies to requests.
//!
//! The first byte of an input says which meta contexts the client asks for. Then come parts, each
//! with its length (16 bits) in front: what the server sends at once. The client gets the next part
//! when it has written something since the last, or waits for it.

mod script;

use qmp_bridge::nbd::{
    Content, ContextExtents, MAX_REQUEST, NbdClient, NbdError, ZeroMode, content_ranges, context,
};
use script::{Answered, Script};
use std::cell::LazyCell;
use tokio::runtime::{Builder, Runtime};

const EXPORT: &str = "x";
/// Bytes of a disk whose extents are asked for.
const WINDOW: u64 = 1 << 20;
const PAGE: u64 = 4096;

thread_local! {
    static RUNTIME: LazyCell<Runtime> = LazyCell::new(|| {
        Builder::new_current_thread().enable_time().build().expect("a runtime of one thread")
    });
}

/// Lets a client talk to that server; whether it got all that it asked for.
pub(crate) fn check(input: &[u8]) -> bool {
    let Some((first, parts)) = input.split_first() else { return false };
    let bitmap = context::dirty_bitmap("b0");
    let contexts: &[&str] = match first % 4 {
        0 => &[],
        1 => &[context::BASE_ALLOCATION],
        2 => &[context::BASE_ALLOCATION, context::ALLOCATION_DEPTH],
        _ => &[context::BASE_ALLOCATION, &bitmap],
    };
    let script = Script::new(parts);
    let answered = script.answered();
    RUNTIME.with(|runtime| runtime.block_on(converse(script, &answered, contexts))).is_ok()
}

async fn converse(script: Script, answered: &Answered, contexts: &[&str]) -> Result<(), NbdError> {
    let (read, write) = script.halves();
    let client = NbdClient::over(read, write, EXPORT, contexts).await?;
    assert!((4096..=MAX_REQUEST).contains(&client.max_request()));
    assert_data(&client, answered, 1, 4096, 8192).await?;
    let status = async {
        if contexts.is_empty() {
            return Ok(Vec::new());
        }
        client.block_status(0, client.size().min(WINDOW)).await
    };
    let (first, second, extents) = tokio::join!(
        assert_data(&client, answered, 2, 0, 4096),
        assert_data(&client, answered, 3, 65024, 512),
        status,
    );
    first.and(second)?;
    let extents = extents?;
    assert_extents(&extents, contexts, client.size().min(WINDOW));
    client.flush().await?;
    if client.is_read_only() {
        return Ok(());
    }
    client.write_zeroes(0, 8192, ZeroMode::Allocated).await?;
    client.trim(8192, 4096).await?;
    client.write(0, vec![b'w'; 512].into()).await
}

/// A read yields what the server sent for these very bytes, all of them, and no others.
async fn assert_data(
    client: &NbdClient,
    answered: &Answered,
    cookie: u64,
    offset: u64,
    length: u32,
) -> Result<(), NbdError> {
    let data = client.read(offset, length).await?;
    assert_eq!(data.len(), length as usize);
    for (at, byte) in (offset..).zip(&data) {
        assert!(answered.holds(cookie, at, *byte), "byte {at} was not sent as {byte:#x}");
    }
    assert!(answered.is_done(cookie), "the server did not say that it was all");
    Ok(())
}

/// Extents cover what was asked for, without gap, and no more.
fn assert_extents(known: &[ContextExtents], contexts: &[&str], end: u64) {
    let names: Vec<&str> = known.iter().map(|context| context.context.as_str()).collect();
    assert_eq!(names, contexts);
    for ContextExtents { extents, .. } in known {
        let mut next = 0;
        for extent in extents {
            assert!(extent.start == next && extent.end > next, "{extents:?}");
            next = extent.end;
        }
        assert_eq!(next, end);
        assert!(extents.windows(2).all(|pair| pair[0].flags != pair[1].flags), "{extents:?}");
    }
    if let [allocation, changes] = known {
        assert_ranges(allocation, changes, end);
    }
}

/// Each byte that belongs to a capture is in one range, as zero only if it is.
fn assert_ranges(allocation: &ContextExtents, changes: &ContextExtents, end: u64) {
    let ranges = content_ranges(allocation, changes, PAGE, end);
    let mut next = 0;
    for range in &ranges {
        let is_aligned = |offset: u64| offset.is_multiple_of(PAGE) || offset == end;
        assert!(range.start >= next && range.end > range.start && range.end <= end);
        assert!(is_aligned(range.start) && is_aligned(range.end), "{range:?}");
        next = range.end;
    }
    let by_depth = changes.context == context::ALLOCATION_DEPTH;
    let belongs = |flags: u32| {
        if by_depth { (1..=2).contains(&flags) } else { flags & context::STATE_DIRTY != 0 }
    };
    for extent in changes.extents.iter().filter(|extent| belongs(extent.flags)) {
        let mut at = extent.start;
        for range in ranges.iter().filter(|range| range.end > extent.start) {
            if at >= extent.end {
                break;
            }
            assert!(range.start <= at, "byte {at} is in no range");
            at = range.end;
        }
        assert!(at >= extent.end, "byte {at} is in no range");
    }
    for zero in ranges.iter().filter(|range| range.content == Content::Zero) {
        let holds =
            |state: &&qmp_bridge::nbd::Extent| state.start < zero.end && zero.start < state.end;
        let mut states = allocation.extents.iter().filter(holds);
        assert!(states.all(|state| state.flags & context::STATE_ZERO != 0), "{zero:?}");
    }
}
