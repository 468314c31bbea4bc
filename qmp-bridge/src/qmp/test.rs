//! A scripted peer on a socket: the connection must survive what a real monitor may send.

use std::path::PathBuf;

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
        let (read, write) = UnixStream::into_split(stream);
        let mut peer = Self { lines: BufReader::new(read).lines(), write };
        // As QEMU does when the client before was cut off.
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
    let (qmp, peer) = tokio::join!(Qmp::connect(&path, Duration::from_secs(5)), Peer::accept(&listener));
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
        peer.send(&json!({"error":{"class":"BrandNewClass","desc":"no"},"id":second}).to_string()).await;
    };
    let calls = async {
        let first = impatient.execute_json("slow", Value::Null).await;
        assert!(matches!(first, Err(QmpError::Timeout { .. })), "{first:?}");
        qmp.execute_json("second", json!({"x": 1})).await
    };
    let (_, second) = tokio::join!(script, calls);
    assert!(matches!(&second, Err(QmpError::Refused { description, .. }) if description == "no"), "{second:?}");
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
    let error = Qmp::connect(&path, Duration::from_millis(50)).await.expect_err("nobody greets");
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
