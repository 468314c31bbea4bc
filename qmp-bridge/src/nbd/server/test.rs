//! Clients of all kinds: ours, old ones, and such that lie.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::Notify;

use super::*;
use crate::nbd::NbdClient;
use crate::nbd::context::{BASE_ALLOCATION, STATE_HOLE, STATE_ZERO};
use crate::nbd::wire::*;

const SIZE: u64 = 40 << 20;
/// Reading it fails.
const BAD: u64 = 8 << 20;
/// Reading it waits for [`Pattern::go`].
const SLOW: u64 = 16 << 20;
/// From here on all is a hole.
const HOLE: u64 = 32 << 20;

#[derive(Default)]
struct Pattern {
    go: Notify,
    reads: AtomicUsize,
}

fn pattern(range: Range<u64>) -> Vec<u8> {
    range.map(|at| if at >= HOLE { 0 } else { (at / 512 % 255) as u8 + 1 }).collect()
}

impl Export for Pattern {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        Box::pin(async move {
            self.reads.fetch_add(1, Ordering::Relaxed);
            assert!(range.start != 13, "a fault of the export");
            if range.contains(&BAD) {
                return Err(ExportError("the block is damaged".into()));
            }
            if range.contains(&SLOW) {
                self.go.notified().await;
            }
            Ok(pattern(range).into())
        })
    }

    fn status(&self, range: Range<u64>) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        let data = Extent { start: range.start, end: HOLE, flags: 0 };
        let hole =
            Extent { start: HOLE.max(range.start), end: SIZE, flags: STATE_HOLE | STATE_ZERO };
        let extents = if range.start < HOLE { vec![data, hole] } else { vec![hole] };
        Box::pin(async move { Ok(extents) })
    }
}

fn exports(export: Arc<Pattern>) -> Exports {
    let disk: Arc<dyn Export> = export;
    Exports::new([("disk".to_owned(), disk)].into()).expect("exports")
}

/// The client's end of a connection that is served.
fn connect(exports: &Exports) -> DuplexStream {
    let (ours, theirs) = duplex(256 << 10);
    let exports = exports.clone();
    tokio::spawn(async move {
        let (read, write) = tokio::io::split(theirs);
        exports.serve(read, write).await
    });
    ours
}

async fn client(exports: &Exports) -> NbdClient {
    let (read, write) = tokio::io::split(connect(exports));
    NbdClient::over(read, write, "disk", &[BASE_ALLOCATION]).await.expect("client")
}

#[tokio::test]
async fn server_reads_in_pieces_and_tells_holes() {
    let client = client(&exports(Arc::default())).await;
    assert_eq!((client.size(), client.is_read_only()), (SIZE, true));
    for (at, length) in [(0, 1), (511, 2 << 20), (17 << 20, 13 << 20), (SIZE - 700, 700)] {
        let data = client.read(at, length).await.expect("read");
        assert!(data == pattern(at..at + u64::from(length)), "{length} bytes at {at}");
    }
    let extents = client.block_status(4096, SIZE - 4096).await.expect("status");
    let ends: Vec<_> =
        extents[0].extents.iter().map(|run| (run.start, run.end, run.flags)).collect();
    assert_eq!(ends, [(4096, HOLE, 0), (HOLE, SIZE, STATE_HOLE | STATE_ZERO)]);
}

#[tokio::test]
async fn server_errors_and_panics_of_an_export_are_answers() {
    let client = client(&exports(Arc::default())).await;
    // The piece before it is sent already.
    let failed = client.read(BAD - (1 << 20), 2 << 20).await;
    let Err(NbdError::Failed { errno: EIO, message, .. }) = failed else { panic!("{failed:?}") };
    assert!(message.contains("damaged"), "{message}");
    let failed = client.read(13, 4096).await;
    assert!(matches!(failed, Err(NbdError::Failed { errno: EIO, .. })), "{failed:?}");
    assert_eq!(client.read(0, 512).await.expect("read"), [1; 512]);
}

#[tokio::test]
async fn server_answers_what_is_ready_first() {
    let export = Arc::new(Pattern::default());
    let exports = exports(export.clone());
    let (client, other) = (client(&exports).await, client(&exports).await);
    let mut slow = std::pin::pin!(client.read(SLOW, 512));
    tokio::select! {
        biased;
        _ = &mut slow => panic!("it waits"),
        fast = client.read(0, 512) => assert_eq!(fast.expect("fast"), [1; 512]),
    }
    assert_eq!(other.read(0, 512).await.expect("another connection"), [1; 512]);
    export.go.notify_one();
    assert_eq!(slow.await.expect("slow"), pattern(SLOW..SLOW + 512));
}

/// A client by hand.
struct Raw(DuplexStream);

impl Raw {
    async fn greeted(exports: &Exports) -> Self {
        let mut stream = connect(exports);
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.expect("greeting");
        stream.write_u32(1).await.expect("flags");
        Self(stream)
    }

    async fn option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.0.write_all(&message).await.expect("option");
    }

    /// Type and data.
    async fn reply(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0; 20];
        self.0.read_exact(&mut header).await.expect("reply");
        let length = u32::from_be_bytes(header[16..].try_into().expect("4"));
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data).await.expect("data");
        (u32::from_be_bytes(header[12..16].try_into().expect("4")), data)
    }

    async fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32) {
        self.0.write_all(&request(flags, command, 7, offset, length)).await.expect("request");
    }

    /// The number of a simple reply.
    async fn simple(&mut self) -> u32 {
        assert_eq!(self.0.read_u32().await.expect("magic"), SIMPLE_REPLY_MAGIC);
        let errno = self.0.read_u32().await.expect("errno");
        assert_eq!(self.0.read_u64().await.expect("cookie"), 7);
        errno
    }

    /// Whether the server hangs up.
    async fn is_left(&mut self) -> bool {
        self.0.read_to_end(&mut Vec::new()).await.is_ok()
    }
}

#[tokio::test]
async fn server_serves_a_client_of_the_oldest_kind() {
    let mut raw = Raw::greeted(&exports(Arc::default())).await;
    raw.option(OPT_EXPORT_NAME, b"disk").await;
    let mut info = [0; 10 + 124];
    raw.0.read_exact(&mut info).await.expect("info with its padding");
    assert_eq!(info[..8], SIZE.to_be_bytes());
    raw.request(0, CMD_READ, 512, 1024).await;
    let mut data = [0; 1024];
    assert_eq!(raw.simple().await, 0);
    raw.0.read_exact(&mut data).await.expect("data");
    assert_eq!(data[..], pattern(512..1536));
    // A write's data is skipped.
    raw.request(0, CMD_WRITE, 0, 4).await;
    raw.0.write_all(b"data").await.expect("data");
    assert_eq!(raw.simple().await, EPERM);
    let refused = [
        (0, CMD_TRIM, 0, 512, EPERM),
        (0, CMD_READ, SIZE, 1, EINVAL),
        (0, CMD_READ, u64::MAX, 2, EINVAL),
        (0, CMD_READ, 0, MAX_REQUEST + 1, EINVAL),
        (CMD_FLAG_DF, CMD_READ, 0, 512, EINVAL),
        (0, CMD_BLOCK_STATUS, 0, 512, EINVAL),
        (0, CMD_FLUSH, 0, 0, EINVAL),
        (0, 999, 0, 0, EINVAL),
        (0, CMD_READ, BAD, 512, EIO),
    ];
    for (flags, command, offset, length, errno) in refused {
        raw.request(flags, command, offset, length).await;
        assert_eq!(raw.simple().await, errno, "command {command} at {offset}");
    }
    raw.request(0, CMD_DISCONNECT, 0, 0).await;
    assert!(raw.is_left().await);
}

#[tokio::test]
async fn server_options_are_answered_one_by_one() {
    let mut raw = Raw::greeted(&exports(Arc::default())).await;
    let named = |name: &str, rest: &[u8]| {
        [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), rest].concat()
    };
    raw.option(OPT_LIST, &[]).await;
    assert_eq!(raw.reply().await, (REP_SERVER, named("disk", &[])));
    assert_eq!(raw.reply().await.0, REP_ACK);
    let refused = [
        (5, Vec::new(), REP_ERR_UNSUPPORTED),
        (11, Vec::new(), REP_ERR_UNSUPPORTED),
        (OPT_LIST, vec![0], REP_ERR_INVALID),
        (OPT_SET_META_CONTEXT, named("disk", &[0; 4]), REP_ERR_INVALID),
        (OPT_INFO, named("other", &[0; 2]), REP_ERR_UNKNOWN),
        (OPT_GO, named("disk", &[0, 1]), REP_ERR_INVALID),
        (OPT_GO, vec![255; 4], REP_ERR_INVALID),
    ];
    for (option, data, kind) in refused {
        raw.option(option, &data).await;
        assert_eq!(raw.reply().await.0, kind, "option {option}");
    }
    raw.option(OPT_STRUCTURED_REPLY, &[]).await;
    assert_eq!(raw.reply().await.0, REP_ACK);
    raw.option(OPT_LIST_META_CONTEXT, &named("disk", &[0; 4])).await;
    assert_eq!(raw.reply().await, (REP_META_CONTEXT, [&[0; 4][..], b"base:allocation"].concat()));
    assert_eq!(raw.reply().await.0, REP_ACK);
    let other = [&1u32.to_be_bytes()[..], &named("qemu:dirty-bitmap:x", &[])].concat();
    raw.option(OPT_SET_META_CONTEXT, &named("disk", &other)).await;
    assert_eq!(raw.reply().await.0, REP_ACK, "a context that is not there is left out");
    raw.option(OPT_INFO, &named("disk", &[0, 1, 0, 3])).await;
    assert_eq!(raw.reply().await.1[..10], [&[0, 0][..], &SIZE.to_be_bytes()].concat());
    assert_eq!(raw.reply().await.1[..2], [0, 3]);
    assert_eq!(raw.reply().await.0, REP_ACK);
    raw.option(OPT_ABORT, &[]).await;
    assert_eq!(raw.reply().await.0, REP_ACK);
    assert!(raw.is_left().await);
}

#[tokio::test]
async fn server_leaves_a_client_that_breaks_the_protocol() {
    let exports = exports(Arc::default());
    let mut raw = Raw::greeted(&exports).await;
    raw.option(OPT_EXPORT_NAME, b"none").await;
    assert!(raw.is_left().await, "an export that is not there");
    let mut raw = Raw::greeted(&exports).await;
    raw.0
        .write_all(&[&OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 3, 255, 255, 255, 255]].concat())
        .await
        .expect("option");
    assert!(raw.is_left().await, "an option of 4 GiB");
    let mut raw = Raw::greeted(&exports).await;
    raw.option(OPT_EXPORT_NAME, b"disk").await;
    raw.0.read_exact(&mut [0; 134]).await.expect("info");
    raw.request(0, CMD_WRITE, 0, MAX_REQUEST + 1).await;
    assert!(raw.is_left().await, "a write of more than is possible");
}

#[tokio::test]
async fn server_does_not_read_for_a_client_that_takes_nothing() {
    let export = Arc::new(Pattern::default());
    let mut raw = Raw::greeted(&exports(export.clone())).await;
    raw.option(OPT_EXPORT_NAME, b"disk").await;
    raw.0.read_exact(&mut [0; 134]).await.expect("info");
    for _ in 0..1000 {
        raw.request(0, CMD_READ, 17 << 20, 8 << 20).await;
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let most = BUFFERED_BYTES as usize / (8 << 20);
    assert!(export.reads.load(Ordering::Relaxed) <= most, "{most} reads are buffered at most");
}
