//! The guest agent (`qemu-ga`): a program in the guest that answers on a character device of QEMU.
//!
//! What it answers is the guest's: it may be anything, late, or nothing. Each request has a limit
//! of time and of length, and a connection serves for one request.

use serde::Deserialize;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Take};
use tokio::net::UnixStream;

/// The agent's port has this name on every VM.
pub const PORT: &str = "org.qemu.guest_agent.0";

/// All that is read of one agent, in bytes: answers that others left unread come before ours.
const MAX_READ: u64 = 64 << 10;
/// Before the answer that is in step; the agent takes it as the end of whatever it was reading.
const DELIMITER: u8 = 0xff;

/// Why an agent has not done what it was asked.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum AgentError {
    #[error("the guest agent's socket {path} cannot be used: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("the guest agent did not answer within {} s", .within.as_secs_f64())]
    Silent { within: Duration },
    #[error("the guest agent's answer to {command} cannot be parsed")]
    Malformed { command: &'static str },
    #[error("the guest agent refused {command}: {reason}")]
    Refused { command: &'static str, reason: String },
}

/// Sets the guest's clock, and its real-time clock, to the time of this host.
///
/// # Errors
/// When the agent does not answer within that time, or refuses.
pub async fn set_time(socket: &Path, within: Duration) -> Result<(), AgentError> {
    let work = async {
        let mut agent = Agent::connect(socket).await?;
        agent.synchronize().await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        agent.call("guest-set-time", json!({ "time": time })).await
    };
    let done = tokio::time::timeout(within, work).await;
    done.unwrap_or(Err(AgentError::Silent { within })).map(drop)
}

struct Agent {
    path: PathBuf,
    stream: BufReader<Take<UnixStream>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Return(Value),
    Error { desc: String },
}

impl Agent {
    async fn connect(path: &Path) -> Result<Self, AgentError> {
        let stream = UnixStream::connect(path).await;
        let stream =
            stream.map_err(|source| AgentError::Socket { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), stream: BufReader::new(stream.take(MAX_READ)) })
    }

    /// The agent may be in the middle of a request that it got before the checkpoint, or its answer
    /// may still be on its way.
    async fn synchronize(&mut self) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-sync-delimited";
        let id = std::process::id();
        let socket = self.stream.get_mut().get_mut();
        let sent = socket.write_all(&[DELIMITER]).await;
        sent.map_err(|source| self.broken(source))?;
        self.send(COMMAND, json!({ "id": id })).await?;
        loop {
            let mut skipped = Vec::new();
            let read = self.stream.read_until(DELIMITER, &mut skipped).await;
            read.map_err(|source| self.broken(source))?;
            if skipped.last() != Some(&DELIMITER) {
                return Err(AgentError::Malformed { command: COMMAND });
            }
            // An answer that another client has not read is of another ID.
            if let Ok(found) = self.answer(COMMAND).await
                && found == id
            {
                return Ok(());
            }
        }
    }

    async fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, AgentError> {
        self.send(command, arguments).await?;
        self.answer(command).await
    }

    async fn send(&mut self, command: &str, arguments: Value) -> Result<(), AgentError> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let sent = self.stream.get_mut().get_mut().write_all(line.as_bytes()).await;
        sent.map_err(|source| self.broken(source))
    }

    async fn answer(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let mut line = Vec::new();
        let read = self.stream.read_until(b'\n', &mut line).await;
        read.map_err(|source| self.broken(source))?;
        match serde_json::from_slice(&line) {
            Ok(Answer::Return(value)) => Ok(value),
            Ok(Answer::Error { desc: reason }) => Err(AgentError::Refused { command, reason }),
            Err(_) => Err(AgentError::Malformed { command }),
        }
    }

    fn broken(&self, source: io::Error) -> AgentError {
        AgentError::Socket { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::io::{BufRead, Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);

    /// An agent for one client: what it says before the delimiter and after, each with `ID` for
    /// that of the request; `None` for an answer that does not come. Returns its requests.
    fn agent(
        place: &Path,
        before: &'static [u8],
        answers: &'static [Option<&'static str>],
    ) -> JoinHandle<Vec<Value>> {
        let listener = UnixListener::bind(place.join("agent.sock")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = std::io::BufReader::new(stream.try_clone().unwrap());
            let mut first = [0];
            lines.read_exact(&mut first).unwrap();
            assert_eq!(first, [DELIMITER]);
            let mut requests = Vec::new();
            for (number, answer) in answers.iter().enumerate() {
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                let id = request["arguments"]["id"].to_string();
                requests.push(request);
                if number == 0 {
                    stream.write_all(before).unwrap();
                }
                let Some(answer) = answer else { continue };
                let _ = stream.write_all(answer.replace("ID", &id).as_bytes());
            }
            // The client hangs up; one whose time is over has done so already.
            let _ = lines.read_line(&mut String::new());
            requests
        })
    }

    async fn set(place: &Path, within: Duration) -> Result<(), AgentError> {
        set_time(&place.join("agent.sock"), within).await
    }

    #[tokio::test]
    async fn agent_sets_the_time_of_this_host() {
        let place = tempfile::tempdir().unwrap();
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let agent =
            agent(place.path(), b"\xff", &[Some("{\"return\": ID}\n"), Some("{\"return\": {}}\n")]);
        set(place.path(), LONG).await.unwrap();
        let requests = agent.join().unwrap();
        assert_eq!(requests[0]["execute"], "guest-sync-delimited");
        assert_eq!(requests[1]["execute"], "guest-set-time");
        let time = requests[1]["arguments"]["time"].as_u64().unwrap();
        assert!((before..before + 60_000_000_000).contains(&time), "{time}");
    }

    /// What was on its way before the checkpoint, and a client that did not read its answer.
    #[tokio::test]
    async fn agent_that_is_out_of_step_is_synchronized() {
        let place = tempfile::tempdir().unwrap();
        let earlier =
            b"urn\": 7}\n{\"error\": {\"desc\": \"x\"}}\n\xff{\"return\": 1}\n\xffno JSON\n\xff";
        let agent =
            agent(place.path(), earlier, &[Some("{\"return\": ID}\n"), Some("{\"return\": {}}\n")]);
        set(place.path(), LONG).await.unwrap();
        agent.join().unwrap();
    }

    #[tokio::test]
    async fn agent_that_does_not_answer_is_not_waited_for() {
        for answers in [&[None][..], &[Some("{\"return\": ID}\n"), None], &[Some("{\"retu")]] {
            let place = tempfile::tempdir().unwrap();
            let agent = agent(place.path(), b"\xff", answers);
            let error = set(place.path(), SHORT).await.unwrap_err();
            assert!(matches!(error, AgentError::Silent { within } if within == SHORT), "{error}");
            agent.join().unwrap();
        }
    }

    #[tokio::test]
    async fn agent_that_refuses_is_quoted() {
        let place = tempfile::tempdir().unwrap();
        const REFUSAL: &str =
            "{\"error\": {\"class\": \"Generic\", \"desc\": \"hwclock failed\"}}\n";
        let agent = agent(place.path(), b"\xff", &[Some("{\"return\": ID}\n"), Some(REFUSAL)]);
        let error = set(place.path(), LONG).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest agent refused guest-set-time: hwclock failed");
        agent.join().unwrap();
    }

    #[tokio::test]
    async fn agent_that_sends_no_end_is_read_up_to_the_limit() {
        let place = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(place.path().join("agent.sock")).unwrap();
        let guest = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[b'x'; 4096]).is_ok() {}
        });
        let error = set(place.path(), LONG).await.unwrap_err();
        assert!(matches!(error, AgentError::Malformed { .. }), "{error}");
        guest.join().unwrap();
    }

    #[tokio::test]
    async fn agent_whose_socket_is_gone_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let error = set(place.path(), LONG).await.unwrap_err();
        assert!(matches!(error, AgentError::Socket { .. }), "{error}");
    }
}
