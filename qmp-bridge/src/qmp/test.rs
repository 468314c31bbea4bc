//! A scripted peer on a socket: the connection must survive what a real monitor may send.

use std::path::PathBuf;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":2,"minor":0,"major":10},"package":"x"},"capabilities":["oob"]}}"#;

/// A monitor that greets, accepts the negotiation and then does what the test's script says.
pub(crate) struct Peer {
    lines: tokio::io::Lines<BufReader<tokio::net::unix::OwnedReadHalf>>,
    write: tokio::net::unix::OwnedWriteHalf,
}

impl Peer {
    pub(crate) async fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().await.expect("accept");
        Self::greet(stream).await
    }

    pub(crate) async fn greet(stream: UnixStream) -> Self {
        let (read, write) = UnixStream::into_split(stream);
        let mut peer = Self { lines: BufReader::new(read).lines(), write };
        // QEMU does so when the connection of the previous client broke.
        peer.send(r#"{"return": {}, "id": 1}"#).await;
        peer.send(GREETING).await;
        let (command, id) = peer.command().await.expect("negotiation");
        assert_eq!(command["execute"], "qmp_capabilities");
        peer.answer(id, json!({})).await;
        peer
    }

    pub(crate) async fn send(&mut self, line: &str) {
        // The client may be gone, which is what some tests are about.
        let _ = self.write.write_all(format!("{line}\r\n").as_bytes()).await;
    }

    /// The next command and its id; `None` at the end of the connection.
    pub(crate) async fn command(&mut self) -> Option<(Value, u64)> {
        let line = self.lines.next_line().await.ok().flatten()?;
        let command: Value = serde_json::from_str(&line).expect("a command is JSON");
        let id = command["id"].as_u64().expect("a command has an id");
        Some((command, id))
    }

    pub(crate) async fn answer(&mut self, id: u64, value: Value) {
        self.send(&json!({ "return": value, "id": id }).to_string()).await;
    }
}

/// A connected pair; the directory holds the socket and must outlive it.
pub(crate) async fn pair() -> (Qmp, Peer, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("directory");
    let path: PathBuf = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bind");
    let (qmp, peer) =
        tokio::join!(Qmp::connect(&path, Duration::from_secs(5)), Peer::accept(&listener));
    (qmp.expect("connect"), peer, directory)
}

#[tokio::test]
async fn survives_unknown_events_late_replies_and_garbage() {
    let (qmp, mut peer, _directory) = pair().await;
    assert_eq!(qmp.version().to_string(), "10.0.2");
    let mut events = qmp.events();
    let impatient = qmp.with_timeout(Duration::from_millis(30));
    let script = async {
        let (_, late) = peer.command().await.expect("first");
        let (_, second) = peer.command().await.expect("second");
        peer.send(r#"{"event":"FROM_THE_FUTURE","data":{"a":1},"timestamp":{"seconds":1,"microseconds":2}}"#).await;
        peer.send("not json").await;
        peer.answer(late, json!({})).await;
        peer.send(&json!({"error":{"class":"BrandNewClass","desc":"no"},"id":second}).to_string())
            .await;
    };
    let calls = async {
        let first = impatient.execute_json("slow", Value::Null).await;
        assert!(matches!(first, Err(QmpError::Timeout { .. })), "{first:?}");
        qmp.execute_json("second", json!({"x": 1})).await
    };
    let (_, second) = tokio::join!(script, calls);
    assert!(
        matches!(&second, Err(QmpError::Refused { description, .. }) if description == "no"),
        "{second:?}"
    );
    assert_eq!(events.recv().await.expect("event").name, "FROM_THE_FUTURE");
}

#[tokio::test]
async fn the_end_of_the_peer_wakes_all() {
    let (qmp, peer, _directory) = pair().await;
    let call = qmp.execute_json("query-status", Value::Null);
    let (reply, ()) = tokio::join!(call, async { drop(peer) });
    assert!(reply.as_ref().is_err_and(QmpError::is_retryable), "{reply:?}");
    qmp.closed().await;
    assert!(matches!(qmp.execute_json("cont", Value::Null).await, Err(QmpError::Closed { .. })));
}

#[tokio::test]
async fn a_busy_monitor_is_named() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let _silent = UnixListener::bind(&path).expect("bind");
    let error = Qmp::connect(&path, Duration::from_millis(50)).await.expect_err("no greeting");
    assert!(error.to_string().contains("another client holds it"), "{error}");
}

#[tokio::test]
async fn a_foreign_greeting_is_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bind");
    let peer = async {
        let (mut stream, _) = listener.accept().await.expect("accept");
        stream.write_all(b"SSH-2.0-x\r\n").await.expect("write");
        stream
    };
    let (result, _stream) = tokio::join!(Qmp::connect(&path, Duration::from_secs(5)), peer);
    assert!(matches!(result, Err(QmpError::NotQmp { .. })));
}

/// QEMU answers so what it cannot parse. Waiting for a better answer would be waiting for ever.
#[tokio::test]
async fn a_command_that_arrived_garbled_fails_at_once() {
    let (qmp, mut peer, _directory) = pair().await;
    let script = async {
        peer.command().await.expect("a command");
        peer.send(r#"{"error": {"class": "GenericError", "desc": "JSON parse error, expected separator in dict"}}"#).await;
    };
    let (reply, ()) = tokio::join!(qmp.execute_json("blockdev-create", Value::Null), script);
    let error = reply.expect_err("it was lost");
    assert!(
        matches!(&error, QmpError::Closed { .. })
            && error.to_string().contains("expected separator"),
        "{error}"
    );
    assert!(error.is_retryable());
    qmp.closed().await;
}

#[tokio::test]
async fn a_socket_that_was_just_made_is_let_alone() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let late = async {
        // The client was polled before: nothing was there when it began.
        let listener = UnixListener::bind(&path).expect("bind");
        let bound = Instant::now();
        let _peer = Peer::accept(&listener).await;
        bound.elapsed()
    };
    let (qmp, young) = tokio::join!(Qmp::connect(&path, Duration::from_secs(20)), late);
    qmp.expect("connect");
    assert!(
        young >= Duration::from_millis(240),
        "a client came {young:?} after the socket was made"
    );
}

#[tokio::test]
async fn an_old_socket_is_connected_to_at_once() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bind");
    let past = TimeSpec::new(1_000_000_000, 0);
    utimensat(AT_FDCWD, &path, &past, &past, UtimensatFlags::NoFollowSymlink).expect("set");
    let begun = Instant::now();
    let (qmp, _peer) =
        tokio::join!(Qmp::connect(&path, Duration::from_secs(20)), Peer::accept(&listener));
    qmp.expect("connect");
    assert!(begun.elapsed() < Duration::from_millis(240), "it took {:?}", begun.elapsed());
}

/// QEMU has died since it made the socket; one that is being started makes its own.
#[tokio::test]
async fn a_deserted_socket_is_not_waited_for() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("qmp");
    drop(UnixListener::bind(&path).expect("bind"));
    let begun = Instant::now();
    let error = Qmp::connect(&path, Duration::from_secs(30)).await.expect_err("no listener");
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
    assert!((2..15).contains(&begun.elapsed().as_secs()), "it took {:?}", begun.elapsed());

    let late = async {
        // The client was polled before: it waits for the one that is not there any more.
        std::fs::remove_file(&path).expect("remove");
        let listener = UnixListener::bind(&path).expect("bind");
        Peer::accept(&listener).await
    };
    let (qmp, _peer) = tokio::join!(Qmp::connect(&path, Duration::from_secs(30)), late);
    qmp.expect("another QEMU took its place");
}

#[tokio::test]
async fn a_socket_that_qemu_was_given_needs_no_listener() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("set");
    let theirs = UnixStream::from_std(theirs).expect("a stream");
    let (qmp, mut peer) =
        tokio::join!(Qmp::over(ours, Duration::from_secs(20)), Peer::greet(theirs));
    let qmp = qmp.expect("negotiated");
    let script = async {
        let (_, id) = peer.command().await.expect("a command");
        peer.answer(id, json!("yes")).await;
    };
    let (reply, ()) = tokio::join!(qmp.execute_json("query", Value::Null), script);
    assert_eq!(reply.expect("answered"), json!("yes"));

    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    drop(theirs);
    let error = Qmp::over(ours, Duration::from_secs(20)).await.expect_err("the peer has closed");
    assert!(matches!(&error, QmpError::NoMonitor { why } if why.contains("closed")), "{error}");
}

/// While the host was suspended, QEMU could not answer either.
#[tokio::test]
async fn qmp_timeout_does_not_count_the_time_of_a_suspended_host() {
    let (qmp, mut peer, _directory) = pair().await;
    let timeout = Duration::from_millis(1600);
    let script = async {
        let (_, id) = peer.command().await.expect("a command");
        // Nothing else of this process runs meanwhile.
        std::thread::sleep(timeout * 2);
        tokio::time::sleep(timeout / 4).await;
        peer.answer(id, json!("at last")).await;
        let never = peer.command().await;
        (never, peer)
    };
    let patient = qmp.with_timeout(timeout);
    let calls = async {
        let reply = patient.execute_json("query", Value::Null).await;
        let begun = Instant::now();
        let none = patient.execute_json("unanswered", Value::Null).await;
        (reply, none, begun.elapsed())
    };
    let (_, (reply, none, waited)) = tokio::join!(script, calls);
    assert_eq!(reply.expect("it was answered soon after"), json!("at last"));
    assert!(
        matches!(none, Err(QmpError::Timeout { .. })) && waited >= timeout,
        "{none:?} after {waited:?}"
    );
}

/// What listens at a monitor's path may be no QEMU and send without end.
#[tokio::test]
async fn qmp_line_without_end_ends_the_connection() {
    let (qmp, mut peer, _directory) = pair().await;
    let endless =
        tokio::spawn(async move { while peer.write.write_all(&[b'x'; 1 << 20]).await.is_ok() {} });
    let failed = qmp.execute_json("query-status", Value::Null).await;
    assert!(
        failed.as_ref().is_err_and(|error| !matches!(error, QmpError::Timeout { .. })),
        "{failed:?}"
    );
    drop(qmp);
    endless.await.expect("the writer ends");
}
