//! Peers that lie: whatever they send, the caller gets an error or exactly what it asked for.

use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::nbd::context;

const SIZE: u64 = 1 << 20;

fn info() -> ExportInfo {
    let contexts = vec![(1, context::BASE_ALLOCATION.to_owned())];
    ExportInfo { size: SIZE, flags: EXPORT_SEND_FLUSH, max_request: MAX_REQUEST, contexts }
}

/// A client behind its handshake, and the peer's end.
fn connected() -> (NbdClient, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let (read, write) = ours.into_split();
    (NbdClient::start(read, write, info()), theirs)
}

fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let head = [
        &CHUNK_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
    ];
    [&head.concat()[..], &(body.len() as u32).to_be_bytes(), body].concat()
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

/// Sends `reply` after the first request and hangs up; the first cookie is 1.
async fn read_with(reply: Vec<u8>) -> Result<Vec<u8>, NbdError> {
    let (client, mut peer) = connected();
    let script = async move {
        let mut request = [0; 28];
        peer.read_exact(&mut request).await.expect("request");
        let _ = peer.write_all(&reply).await;
    };
    tokio::join!(client.read(4096, 8), script).0
}

#[tokio::test]
async fn chunks_in_any_order_and_holes() {
    let reply = [
        chunk(0, CHUNK_DATA, 1, &data(4100, &[7; 2])),
        chunk(0, CHUNK_DATA, 1, &data(4096, &[5; 4])),
        chunk(
            CHUNK_DONE,
            CHUNK_HOLE,
            1,
            &[&4102u64.to_be_bytes()[..], &2u32.to_be_bytes()].concat(),
        ),
    ];
    assert_eq!(read_with(reply.concat()).await.expect("read"), [5, 5, 5, 5, 7, 7, 0, 0]);
}

#[tokio::test]
async fn lies_are_errors() {
    let error_body = [&5u32.to_be_bytes()[..], &3u16.to_be_bytes(), b"bad"].concat();
    let replies = [
        chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(4096, &[5; 4])),
        chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(4095, &[5; 8])),
        chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(u64::MAX, &[5; 8])),
        chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(4096, &[5; 9])),
        [
            chunk(0, CHUNK_DATA, 1, &data(4096, &[5; 8])),
            chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(4096, &[5; 1])),
        ]
        .concat(),
        chunk(CHUNK_DONE, CHUNK_DATA, 1, &[]),
        chunk(CHUNK_DONE, CHUNK_STATUS, 1, &[0; 12]),
        chunk(CHUNK_DONE, 99, 1, &[]),
        chunk(CHUNK_DONE, CHUNK_NONE, 1, &[]),
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &1u64.to_be_bytes()].concat(),
        chunk(CHUNK_DONE, CHUNK_DATA, 2, &data(4096, &[5; 8])),
        vec![],
    ];
    for (number, reply) in replies.into_iter().enumerate() {
        let result = read_with(reply).await;
        assert!(
            matches!(result, Err(NbdError::Protocol(_) | NbdError::Closed(_))),
            "{number}: {result:?}"
        );
    }
    let failed = read_with(chunk(CHUNK_DONE, CHUNK_ERROR_BIT | 1, 1, &error_body)).await;
    assert!(
        matches!(&failed, Err(NbdError::Failed { errno: 5, message, .. }) if message == "bad"),
        "{failed:?}"
    );
}

/// Of contexts that were not asked for, as many as the peer likes to send.
#[tokio::test]
async fn block_states_of_too_many_contexts_are_an_error() {
    let (client, mut peer) = connected();
    let script = async move {
        let mut request = [0; 28];
        peer.read_exact(&mut request).await.expect("request");
        for id in 0u32.. {
            let body = [id.to_be_bytes(), 4096u32.to_be_bytes(), [0; 4]].concat();
            if peer.write_all(&chunk(0, CHUNK_STATUS, 1, &body)).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        result = client.block_status(0, 4096) => result,
        () = script => unreachable!("it never ends"),
    };
    assert!(matches!(result, Err(NbdError::Protocol(_))), "{result:?}");
}

#[tokio::test]
async fn two_contexts_with_one_id_are_an_error() {
    let reply = |option: u32, kind: u32, body: &[u8]| {
        let head = [option, kind, body.len() as u32].map(u32::to_be_bytes).concat();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, body].concat()
    };
    let given = |name: &str| [&1u32.to_be_bytes()[..], name.as_bytes()].concat();
    let bytes = [
        [MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat(),
        3u16.to_be_bytes().to_vec(),
        reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]),
        reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &given("a")),
        reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &given("b")),
        reply(OPT_SET_META_CONTEXT, REP_ACK, &[]),
    ];
    let (mut ours, mut theirs) = UnixStream::pair().expect("pair");
    theirs.write_all(&bytes.concat()).await.expect("write");
    let result = handshake::negotiate(&mut ours, "x", &["a", "b"]).await;
    assert!(
        matches!(&result, Err(NbdError::Protocol(why)) if why.contains("one id")),
        "{result:?}"
    );
}

#[tokio::test]
async fn an_abandoned_request_does_not_disturb_the_next() {
    let (client, mut peer) = connected();
    let script = async {
        let mut request = [0; 28];
        peer.read_exact(&mut request).await.expect("first");
        peer.read_exact(&mut request).await.expect("second");
        peer.write_all(&chunk(CHUNK_DONE, CHUNK_DATA, 1, &data(0, &[1; 8]))).await.expect("late");
        peer.write_all(&chunk(CHUNK_DONE, CHUNK_DATA, 2, &data(8, &[2; 8]))).await.expect("second");
        peer
    };
    let calls = async {
        let first = tokio::time::timeout(Duration::from_millis(20), client.read(0, 8)).await;
        assert!(first.is_err());
        client.read(8, 8).await
    };
    let (_peer, second) = tokio::join!(script, calls);
    assert_eq!(second.expect("second"), [2; 8]);
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn noise_after_a_request_is_survived(
        chunks in prop::collection::vec((any::<u16>(), 0u16..8, 0u64..3, prop::collection::vec(any::<u8>(), 0..40)), 0..6),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut reply: Vec<u8> = chunks.iter().flat_map(|(flags, kind, cookie, body)| chunk(*flags, *kind, *cookie, body)).collect();
        reply.extend(tail);
        if let Ok(bytes) = run(read_with(reply)) {
            prop_assert_eq!(bytes.len(), 8);
        }
    }

    #[test]
    fn noise_in_the_handshake_is_survived(
        replies in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..30)), 0..6),
        kinds in prop::collection::vec(0usize..4, 6),
    ) {
        let mut bytes = [MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
        bytes.extend(3u16.to_be_bytes());
        let options = [OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_GO];
        for (at, ((random, body), kind)) in replies.iter().zip(kinds).enumerate() {
            bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
            bytes.extend(options[at.min(2)].to_be_bytes());
            bytes.extend([REP_ACK, REP_INFO, REP_META_CONTEXT, *random][kind].to_be_bytes());
            bytes.extend((body.len() as u32).to_be_bytes());
            bytes.extend(body);
        }
        let result = run(async {
            let (mut ours, mut theirs) = UnixStream::pair().expect("pair");
            theirs.write_all(&bytes).await.expect("write");
            theirs.shutdown().await.expect("shutdown");
            handshake::negotiate(&mut ours, "x", &["base:allocation"]).await
        });
        prop_assert!(result.is_err() || !replies.is_empty());
    }
}
