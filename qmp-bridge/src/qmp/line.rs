//! What QEMU's monitor sends: bytes to lines, a line to a message. No I/O.

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _};
use serde_json::{Map, Value};
use thiserror::Error;

use super::QemuVersion;
use super::replies::{Greeting, VersionTriple};

/// Longest line accepted from QEMU; the largest known reply, `query-qmp-schema`, has 240 KB.
pub const MAX_LINE: usize = 32 << 20;

/// A line of the monitor.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The first one of a connection.
    Greeting(QemuVersion),
    /// An asynchronous message: its name and members.
    Event(String, Value),
    /// The reply to a command with this ID of ours: what it returns, or QEMU's class of the error
    /// and its description.
    Reply(u64, Result<Value, (String, String)>),
    /// An error without an ID: QEMU could not parse what it received.
    Unparsed(String),
    /// A reply to another client, who had the monitor before.
    Foreign,
}

/// A line that is no [`Message`].
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LineError {
    #[error("a line of more than {MAX_LINE} bytes")]
    TooLong,
    #[error("a line is not UTF-8: {0}")]
    Text(#[from] std::str::Utf8Error),
    #[error("a line is no QMP message: {0}")]
    Json(#[from] serde_json::Error),
    #[error("a line is neither greeting, event nor reply")]
    NoMessage,
}

#[derive(Deserialize)]
struct Members {
    #[serde(default, rename = "QMP", deserialize_with = "object_or_null")]
    greeting: Option<Greeting>,
    event: Option<String>,
    data: Option<Value>,
    #[serde(default, rename = "return", deserialize_with = "present")]
    result: Option<Value>,
    #[serde(default, deserialize_with = "object_or_null")]
    error: Option<Refusal>,
    id: Option<Id>,
}

/// Ours are numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Ours(u64),
    Foreign(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// A member that is `null` is there.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

/// A list would be taken for the members in their order.
pub(super) fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    from: D,
) -> Result<T, D::Error> {
    let members = Map::deserialize(from)?;
    serde_json::from_value(Value::Object(members)).map_err(D::Error::custom)
}

fn object_or_null<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    from: D,
) -> Result<Option<T>, D::Error> {
    match Value::deserialize(from)? {
        Value::Null => Ok(None),
        value => object(value).map(Some).map_err(D::Error::custom),
    }
}

impl Message {
    /// Reads one line.
    ///
    /// # Errors
    /// When the line is no JSON object, or not exactly one of greeting, event, result and error.
    pub fn parse(line: &[u8]) -> Result<Self, LineError> {
        let text = std::str::from_utf8(line)?;
        // A list would be taken for the members in their order.
        if !text.trim_start().starts_with('{') {
            return Err(LineError::NoMessage);
        }
        let members: Members = serde_json::from_str(text)?;
        let reply = |result| match members.id {
            Some(Id::Ours(id)) => Self::Reply(id, result),
            Some(Id::Foreign(_)) => Self::Foreign,
            None => result
                .map_or_else(|(_, description)| Self::Unparsed(description), |_| Self::Foreign),
        };
        match (members.greeting, members.event, members.result, members.error) {
            (Some(greeting), None, None, None) => Ok(Self::Greeting(greeting.into())),
            (None, Some(name), None, None) => {
                Ok(Self::Event(name, members.data.unwrap_or(Value::Null)))
            }
            (None, None, Some(value), None) => Ok(reply(Ok(value))),
            (None, None, None, Some(error)) => Ok(reply(Err((error.class, error.desc)))),
            _ => Err(LineError::NoMessage),
        }
    }
}

impl From<Greeting> for QemuVersion {
    fn from(greeting: Greeting) -> Self {
        let VersionTriple { major, minor, micro } = greeting.version.qemu;
        Self { major, minor, micro, package: greeting.version.package }
    }
}

/// Bytes as they arrive, cut into lines.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// How much of `bytes` is known to hold no newline.
    searched: usize,
}

impl LineBuffer {
    /// Where what has been read is to be appended.
    pub fn unread(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// The next line with its newline; none before more has been read.
    ///
    /// # Errors
    /// When the line is longer than [`MAX_LINE`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        let end = found.map(|found| self.searched + found + 1);
        if end.unwrap_or(self.bytes.len()) > MAX_LINE {
            return Err(LineError::TooLong);
        }
        let Some(end) = end else {
            self.searched = self.bytes.len();
            return Ok(None);
        };
        self.searched = 0;
        let rest = self.bytes.split_off(end);
        Ok(Some(std::mem::replace(&mut self.bytes, rest)))
    }
}
