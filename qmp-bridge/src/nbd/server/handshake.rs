//! The server's side of the handshake: options until the client chooses an export or leaves.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Export, Exports};
use crate::nbd::NbdError;
use crate::nbd::context::BASE_ALLOCATION;
use crate::nbd::wire::*;

/// Most options of one client; QEMU sends five.
const MAX_OPTIONS: usize = 1024;
/// Longest option; the longest that is of use holds an export name and the names of contexts.
const MAX_OPTION: u32 = 16 << 10;
/// Most contexts asked for in one option.
const MAX_QUERIES: u32 = 64;
/// Every export has this one context, under this number.
pub(super) const ALLOCATION_ID: u32 = 1;
const FLAGS: u16 = EXPORT_HAS_FLAGS | EXPORT_READ_ONLY | EXPORT_CAN_MULTI_CONN;
/// Requests may begin and end at any byte.
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = 4096;
const EXPORT_NAME_PADDING: usize = 124;

/// What a client and its server have agreed on.
pub(super) struct Session {
    pub(super) export: Arc<dyn Export>,
    /// Replies to reads and errors come in chunks.
    pub(super) structured: bool,
    /// Block status may be asked for.
    pub(super) allocation: bool,
}

/// What the options so far have set.
#[derive(Default)]
struct Agreed {
    structured: bool,
    /// The export that block status was asked for.
    allocation_of: Option<String>,
    no_zeroes: bool,
}

/// An option's answer: replies, each of a type and its data.
type Replies = Vec<(u32, Vec<u8>)>;

enum Step {
    Reply(Replies),
    Leave,
    Begin(Replies, Session),
    /// Without any reply, as `NBD_OPT_EXPORT_NAME` has it.
    Bare(Session),
}

/// None if the client has left.
pub(super) async fn negotiate<S>(
    stream: &mut S,
    exports: &Exports,
) -> Result<Option<Session>, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut agreed = greet(stream).await?;
    for _ in 0..MAX_OPTIONS {
        let (option, data) = read_option(stream).await?;
        match agreed.step(exports, option, &data)? {
            Step::Reply(replies) => reply(stream, option, &replies).await?,
            Step::Leave => {
                reply(stream, option, &[ack()]).await?;
                return Ok(None);
            }
            Step::Begin(replies, session) => {
                reply(stream, option, &replies).await?;
                return Ok(Some(session));
            }
            Step::Bare(session) => {
                let mut answer = describe(&session.export, agreed.structured);
                answer.resize(answer.len() + agreed.padding(), 0);
                stream.write_all(&answer).await.map_err(closed)?;
                return Ok(Some(session));
            }
        }
    }
    Err(NbdError::Protocol(format!("the client sent more than {MAX_OPTIONS} options")))
}

fn closed(error: std::io::Error) -> NbdError {
    NbdError::Closed(format!("in the handshake: {error}"))
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Agreed, NbdError> {
    let mut greeting = MAGIC.to_be_bytes().to_vec();
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await.map_err(closed)?;
    let flags = stream.read_u32().await.map_err(closed)?;
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 || flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
        return Err(NbdError::Protocol(format!("the client has flags {flags:#x}")));
    }
    Ok(Agreed { no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0, ..Agreed::default() })
}

async fn read_option<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(u32, Vec<u8>), NbdError> {
    let mut header = [0; 16];
    stream.read_exact(&mut header).await.map_err(closed)?;
    let mut fields = Fields(&header);
    let (magic, option, length) = (fields.u64(), fields.u32(), fields.u32());
    let length = length.filter(|length| *length <= MAX_OPTION);
    let (Some(OPTION_MAGIC), Some(option), Some(length)) = (magic, option, length) else {
        return Err(NbdError::Protocol(format!(
            "an option has a wrong header or is longer than {MAX_OPTION} bytes"
        )));
    };
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await.map_err(closed)?;
    Ok((option, data))
}

async fn reply<S>(stream: &mut S, option: u32, replies: &[(u32, Vec<u8>)]) -> Result<(), NbdError>
where
    S: AsyncWrite + Unpin,
{
    let mut message = Vec::new();
    for (kind, data) in replies {
        message.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        message.extend(option.to_be_bytes());
        message.extend(kind.to_be_bytes());
        push_length(&mut message, data.len());
        message.extend(data);
    }
    stream.write_all(&message).await.map_err(closed)
}

#[expect(clippy::cast_possible_truncation, reason = "names, which are bounded, and numbers")]
fn push_length(message: &mut Vec<u8>, length: usize) {
    message.extend((length as u32).to_be_bytes());
}

fn ack() -> (u32, Vec<u8>) {
    (REP_ACK, Vec::new())
}

fn refusal(kind: u32, why: &str) -> Step {
    Step::Reply(vec![(kind, why.as_bytes().to_vec())])
}

/// Size and flags.
fn describe(export: &Arc<dyn Export>, structured: bool) -> Vec<u8> {
    let flags = if structured { FLAGS | EXPORT_SEND_DF } else { FLAGS };
    [&export.size().to_be_bytes()[..], &flags.to_be_bytes()].concat()
}

impl Agreed {
    fn step(&mut self, exports: &Exports, option: u32, data: &[u8]) -> Result<Step, NbdError> {
        Ok(match option {
            OPT_ABORT => Step::Leave,
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                Step::Reply(vec![ack()])
            }
            OPT_LIST if data.is_empty() => Step::Reply(list(exports)),
            OPT_STRUCTURED_REPLY | OPT_LIST => refusal(REP_ERR_INVALID, "it has no data"),
            OPT_INFO | OPT_GO => match parse_choice(data) {
                Some((name, infos)) => self.choose(exports, option, name, &infos),
                None => refusal(REP_ERR_INVALID, "malformed"),
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => match parse_queries(data) {
                Some((name, queries)) => self.contexts(exports, option, name, &queries),
                None => refusal(REP_ERR_INVALID, "malformed"),
            },
            // It knows no error but the end of the connection.
            OPT_EXPORT_NAME => {
                let name = String::from_utf8_lossy(data).into_owned();
                let session = self.session(exports, &name);
                Step::Bare(session.ok_or_else(|| unknown(&name))?)
            }
            _ => refusal(REP_ERR_UNSUPPORTED, ""),
        })
    }

    fn padding(&self) -> usize {
        if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING }
    }

    fn session(&self, exports: &Exports, name: &str) -> Option<Session> {
        Some(Session {
            export: exports.get(name)?.clone(),
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        })
    }

    fn choose(&self, exports: &Exports, option: u32, name: &str, infos: &[u16]) -> Step {
        let Some(session) = self.session(exports, name) else {
            return refusal(REP_ERR_UNKNOWN, "no such export");
        };
        let info = |kind: u16, data: &[u8]| (REP_INFO, [&kind.to_be_bytes()[..], data].concat());
        let mut replies = vec![info(INFO_EXPORT, &describe(&session.export, self.structured))];
        if infos.contains(&INFO_BLOCK_SIZE) {
            let sizes = [MIN_BLOCK, PREFERRED_BLOCK, MAX_REQUEST].map(u32::to_be_bytes);
            replies.push(info(INFO_BLOCK_SIZE, &sizes.concat()));
        }
        replies.push(ack());
        if option == OPT_GO { Step::Begin(replies, session) } else { Step::Reply(replies) }
    }

    fn contexts(&mut self, exports: &Exports, option: u32, name: &str, queries: &[&str]) -> Step {
        let is_set = option == OPT_SET_META_CONTEXT;
        if is_set {
            // Whatever comes of it, what was set before is void.
            self.allocation_of = None;
        }
        if !self.structured {
            return refusal(REP_ERR_INVALID, "structured replies come first");
        }
        if exports.get(name).is_none() {
            return refusal(REP_ERR_UNKNOWN, "no such export");
        }
        let wanted = |query: &&str| *query == BASE_ALLOCATION || (!is_set && *query == "base:");
        let found = (!is_set && queries.is_empty()) || queries.iter().any(wanted);
        let mut replies = Vec::new();
        if found {
            // In a list the number says nothing.
            let id = if is_set { ALLOCATION_ID } else { 0 };
            let data = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
            replies.push((REP_META_CONTEXT, data));
        }
        if found && is_set {
            self.allocation_of = Some(name.to_owned());
        }
        replies.push(ack());
        Step::Reply(replies)
    }
}

fn unknown(name: &str) -> NbdError {
    let why = "no such export".into();
    NbdError::Refused { what: format!("export `{}`", name.escape_debug()), why }
}

fn list(exports: &Exports) -> Replies {
    let entry = |name: &str| {
        let mut data = Vec::new();
        push_length(&mut data, name.len());
        data.extend(name.as_bytes());
        (REP_SERVER, data)
    };
    exports.names().map(entry).chain([ack()]).collect()
}

fn string<'a>(fields: &mut Fields<'a>) -> Option<&'a str> {
    let length = fields.u32().filter(|length| *length <= MAX_STRING)?;
    std::str::from_utf8(fields.take(length as usize)?).ok()
}

/// Of `NBD_OPT_INFO` and `NBD_OPT_GO`: the export's name and the information asked for.
fn parse_choice(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = string(&mut fields)?;
    let count = fields.u16()?;
    let infos = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
    fields.0.is_empty().then_some((name, infos))
}

/// Of the two options about contexts: the export's name and the names of contexts.
fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = string(&mut fields)?;
    let count = fields.u32().filter(|count| *count <= MAX_QUERIES)?;
    let queries = (0..count).map(|_| string(&mut fields)).collect::<Option<_>>()?;
    fields.0.is_empty().then_some((name, queries))
}
