//! What QEMU's monitor sends.
//!
//! An input is the bytes of a connection as they come from QEMU, in pieces whose size the first
//! byte says.

use qmp_bridge::qmp::line::{LineBuffer, Message};
use serde_json::{Map, Value, json};

/// Reads all lines; whether there are some and each is a message.
pub(crate) fn check(input: &[u8]) -> bool {
    let Some((first, bytes)) = input.split_first() else { return false };
    let (lines, rest) = lines(bytes, 1 + usize::from(*first) * 16);
    assert_eq!([lines.concat(), rest].concat(), bytes, "no byte is lost");
    !lines.is_empty() & lines.iter().fold(true, |is_sound, line| message(line) & is_sound)
}

/// Whole lines, and what is left without a newline.
fn lines(bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, Vec<u8>) {
    let (mut buffer, mut lines) = (LineBuffer::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        buffer.unread().extend(piece);
        while let Some(line) = buffer.next_line().expect("an input is shorter than the limit") {
            assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
            lines.push(line);
        }
    }
    (lines, std::mem::take(buffer.unread()))
}

/// A line is one message, and says itself which, or an error.
fn message(line: &[u8]) -> bool {
    let Ok(message) = Message::parse(line) else { return false };
    let members = match serde_json::from_slice(line) {
        Ok(Value::Object(members)) => members,
        Ok(_) => panic!("{message:?} is no JSON object"),
        // A number that is out of range, in a member that nothing reads.
        Err(error) => {
            assert!(error.to_string().contains("out of range"), "{error}");
            return true;
        }
    };
    let has = |name: &str| members.get(name).is_some_and(|value| !value.is_null());
    let kinds = ["QMP", "event", "error"].iter().filter(|name| has(name)).count()
        + usize::from(members.contains_key("return"));
    assert_eq!(kinds, 1, "{message:?}");
    match &message {
        Message::Greeting(version) => {
            assert_eq!(members["QMP"]["version"]["qemu"]["major"], version.major);
        }
        Message::Event(name, data) => {
            assert_eq!((&members["event"], data), (&json!(name), &data_of(&members)))
        }
        Message::Reply(id, result) => {
            assert_eq!(members["id"], *id);
            assert_eq!(members.get("return"), result.as_ref().ok());
            if let Err((class, description)) = result {
                assert_eq!(members["error"]["class"], *class);
                assert_eq!(members["error"]["desc"], *description);
            }
        }
        Message::Unparsed(description) => assert_eq!(members["error"]["desc"], *description),
        Message::Foreign => assert!(!members.get("id").is_some_and(Value::is_u64)),
    }
    true
}

fn data_of(members: &Map<String, Value>) -> Value {
    members.get("data").cloned().unwrap_or(Value::Null)
}
