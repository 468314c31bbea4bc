//! What an NBD client sends: its flags, options, then requests.

use bytes::Bytes;
use futures::future::BoxFuture;
use qmp_bridge::nbd::Extent;
use qmp_bridge::nbd::server::{Export, ExportError, Exports};
use std::cell::LazyCell;
use std::ops::Range;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};

const SIZE: u64 = 64 << 10;
/// From here on all is zeros.
const HOLE: u64 = 48 << 10;
/// Cannot be read.
const BAD: u64 = 8 << 10;
const GREETING: usize = 18;
const OPTION_REPLY: [u8; 8] = 0x0003_e889_0455_65a9_u64.to_be_bytes();
const CHUNK: [u8; 4] = 0x668e_33ef_u32.to_be_bytes();
const SIMPLE: [u8; 4] = 0x6744_6698_u32.to_be_bytes();
/// Bytes of the export are below, so that none of them begins a reply.
const BYTES: u64 = 100;
/// Of size and flags, with and without padding.
const BARE: [usize; 2] = [134, 10];

thread_local! {
    static RUNTIME: LazyCell<Runtime> = LazyCell::new(|| {
        Builder::new_current_thread().enable_time().build().expect("a runtime of one thread")
    });
}

struct Disk;

fn byte(at: u64) -> u8 {
    if at >= HOLE { 0 } else { (at * 7 / 512 % BYTES) as u8 }
}

impl Export for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        assert!(range.start < range.end && range.end <= SIZE, "{range:?}");
        Box::pin(async move {
            // Others are served before it.
            tokio::task::yield_now().await;
            if range.contains(&BAD) {
                return Err(ExportError("damaged".into()));
            }
            Ok(range.map(byte).collect::<Vec<u8>>().into())
        })
    }

    fn status(&self, range: Range<u64>) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        assert!(range.start < range.end && range.end <= SIZE, "{range:?}");
        let data = Extent { start: range.start, end: HOLE, flags: 0 };
        let hole = Extent { start: HOLE.max(range.start), end: SIZE, flags: 3 };
        let extents = if range.start < HOLE { vec![data, hole] } else { vec![hole] };
        Box::pin(async move { Ok(extents) })
    }
}

/// Serves that client; whether it left in order.
pub(crate) fn check(input: &[u8]) -> bool {
    RUNTIME.with(|runtime| runtime.block_on(serve(input)))
}

async fn serve(input: &[u8]) -> bool {
    let disk: Arc<dyn Export> = Arc::new(Disk);
    let exports = Exports::new([("disk".to_owned(), disk)].into()).expect("exports");
    let (write, mut answers) = tokio::io::duplex(1 << 20);
    let mut answered = Vec::new();
    let (served, read) =
        tokio::join!(exports.serve(input, write), answers.read_to_end(&mut answered));
    read.expect("from memory");
    assert_answers(&answered, served.is_ok());
    served.is_ok()
}

/// Whatever the client sent, the server keeps to the protocol and tells the truth.
fn assert_answers(answers: &[u8], is_whole: bool) {
    assert!(answers.starts_with(b"NBDMAGICIHAVEOPT"));
    let mut rest = &answers[GREETING..];
    while let Some(after) = rest.strip_prefix(&OPTION_REPLY) {
        let Some((head, after)) = after.split_at_checked(12) else { return assert!(!is_whole) };
        let length = u32::from_be_bytes(head[8..].try_into().expect("4")) as usize;
        assert!(length <= 4096 + 8);
        let Some((_, after)) = after.split_at_checked(length) else { return assert!(!is_whole) };
        rest = after;
    }
    // The answer to the oldest way to choose an export.
    if rest.starts_with(&SIZE.to_be_bytes()) {
        let padded =
            |length: &usize| rest.get(10..*length).is_some_and(|pad| pad.iter().all(|b| *b == 0));
        let length = BARE.into_iter().find(padded).expect("size and flags");
        rest = &rest[length..];
    }
    while !rest.is_empty() {
        let next = match rest.first_chunk::<4>() {
            Some(&CHUNK) => after_chunk(rest),
            Some(&SIMPLE) => after_simple(rest),
            other => panic!("a reply begins with {other:x?}"),
        };
        // What a broken connection cut off is no answer.
        let Some(next) = next else { return assert!(!is_whole) };
        rest = next;
    }
}

fn after_simple(reply: &[u8]) -> Option<&[u8]> {
    let (head, rest) = reply.split_at_checked(16)?;
    let data = rest.iter().take_while(|byte| u64::from(**byte) < BYTES).count();
    let errno = u32::from_be_bytes(head[4..8].try_into().expect("4"));
    assert!(errno == 0 || (data == 0 && [1, 5, 22, 75].contains(&errno)), "error {errno}");
    Some(&rest[data..])
}

fn after_chunk(reply: &[u8]) -> Option<&[u8]> {
    let (head, rest) = reply.split_at_checked(20)?;
    let kind = u16::from_be_bytes(head[6..8].try_into().expect("2"));
    let length = u32::from_be_bytes(head[16..].try_into().expect("4")) as usize;
    let (body, rest) = rest.split_at_checked(length)?;
    match kind {
        0 => assert!(body.is_empty()),
        1 => {
            let (offset, data) = body.split_first_chunk().expect("an offset");
            let offset = u64::from_be_bytes(*offset);
            assert!(!data.is_empty() && offset + data.len() as u64 <= SIZE);
            assert!((offset..).zip(data).all(|(at, found)| *found == byte(at)));
        }
        5 => {
            assert!(length >= 12 && length % 8 == 4);
            assert!(body[4..].chunks(8).all(|extent| extent[..4] != [0; 4]));
        }
        0x8001 => {
            let errno = u32::from_be_bytes(body[..4].try_into().expect("4"));
            let text = usize::from(u16::from_be_bytes(body[4..6].try_into().expect("2")));
            assert!([1, 5, 22, 75].contains(&errno) && text == body.len() - 6);
        }
        other => panic!("a chunk of type {other}"),
    }
    Some(rest)
}
