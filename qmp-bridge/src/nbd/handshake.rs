//! The NBD handshake: fixed newstyle, structured replies, meta contexts, then `NBD_OPT_GO`.

use std::collections::BTreeSet;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::NbdError;
use super::wire::*;

/// What the server told about the export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ExportInfo {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Longest request it takes.
    pub(super) max_request: u32,
    /// Ids and names of the meta contexts, in the order in which they were asked for.
    pub(super) contexts: Vec<(u32, String)>,
}

/// Most replies to one option; each asked context and each info is one.
const MAX_REPLIES: usize = 64;

pub(super) async fn negotiate<S>(
    stream: &mut S,
    export: &str,
    contexts: &[&str],
) -> Result<ExportInfo, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    check_name("the export name", export)?;
    contexts.iter().try_for_each(|context| check_name("a meta context", context))?;
    greet(stream).await?;
    option(stream, OPT_STRUCTURED_REPLY, &[]).await?;
    read_replies(stream, OPT_STRUCTURED_REPLY, "structured replies").await?;
    let contexts = set_contexts(stream, export, contexts).await?;
    let info = go(stream, export).await?;
    Ok(ExportInfo { contexts, ..info })
}

/// A client that only wanted to know who is there leaves in order, or QEMU complains on its output.
pub(super) async fn leave<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
) -> Result<(), NbdError> {
    greet(stream).await?;
    option(stream, OPT_ABORT, &[]).await?;
    read_replies(stream, OPT_ABORT, "to leave").await.map(drop)
}

fn check_name(what: &str, name: &str) -> Result<(), NbdError> {
    if name.len() <= MAX_STRING as usize {
        return Ok(());
    }
    Err(NbdError::Refused {
        what: what.into(),
        why: format!("it is longer than {MAX_STRING} bytes"),
    })
}

fn closed(error: std::io::Error) -> NbdError {
    NbdError::Closed(format!("in the handshake: {error}"))
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), NbdError> {
    if stream.read_u64().await.map_err(closed)? != MAGIC
        || stream.read_u64().await.map_err(closed)? != OPTION_MAGIC
    {
        return Err(NbdError::Protocol("its greeting is not that of a newstyle NBD server".into()));
    }
    let flags = stream.read_u16().await.map_err(closed)?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Protocol("it does not speak fixed newstyle".into()));
    }
    let answer = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    stream.write_u32(u32::from(answer)).await.map_err(closed)
}

async fn option<S: AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    data: &[u8],
) -> Result<(), NbdError> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    push_length(&mut message, data.len());
    message.extend(data);
    stream.write_all(&message).await.map_err(closed)
}

/// Reads replies until the acknowledgement; returns the others.
async fn read_replies<S: AsyncRead + Unpin>(
    stream: &mut S,
    option: u32,
    what: &str,
) -> Result<Vec<(u32, Vec<u8>)>, NbdError> {
    let mut replies = Vec::new();
    while replies.len() < MAX_REPLIES {
        let (kind, data) = read_reply(stream, option).await?;
        if kind == REP_ACK {
            return Ok(replies);
        }
        if kind & REP_ERROR != 0 {
            let text = String::from_utf8_lossy(&data);
            let why = if text.is_empty() {
                format!("error {}", kind & !REP_ERROR)
            } else {
                text.into_owned()
            };
            return Err(NbdError::Refused { what: what.into(), why });
        }
        replies.push((kind, data));
    }
    Err(NbdError::Protocol(format!("more than {MAX_REPLIES} replies to one option")))
}

async fn read_reply<S: AsyncRead + Unpin>(
    stream: &mut S,
    option: u32,
) -> Result<(u32, Vec<u8>), NbdError> {
    let mut header = [0; 20];
    stream.read_exact(&mut header).await.map_err(closed)?;
    let mut fields = Fields(&header);
    let (magic, echoed, kind, length) = (fields.u64(), fields.u32(), fields.u32(), fields.u32());
    if magic != Some(OPTION_REPLY_MAGIC) || echoed != Some(option) {
        return Err(NbdError::Protocol(format!("a reply to option {option} has a wrong header")));
    }
    let length = length.filter(|length| *length <= MAX_OPTION_REPLY);
    let (Some(kind), Some(length)) = (kind, length) else {
        return Err(NbdError::Protocol(format!(
            "a reply to option {option} is longer than {MAX_OPTION_REPLY} bytes"
        )));
    };
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await.map_err(closed)?;
    Ok((kind, data))
}

#[expect(clippy::cast_possible_truncation, reason = "names and lists of names that we make")]
fn push_length(message: &mut Vec<u8>, length: usize) {
    message.extend((length as u32).to_be_bytes());
}

fn push_string(message: &mut Vec<u8>, text: &str) {
    push_length(message, text.len());
    message.extend(text.as_bytes());
}

async fn set_contexts<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
    wanted: &[&str],
) -> Result<Vec<(u32, String)>, NbdError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut data = Vec::new();
    push_string(&mut data, export);
    push_length(&mut data, wanted.len());
    wanted.iter().for_each(|context| push_string(&mut data, context));
    option(stream, OPT_SET_META_CONTEXT, &data).await?;
    let what = format!("meta contexts of export `{export}`");
    let replies = read_replies(stream, OPT_SET_META_CONTEXT, &what).await?;
    let given: Vec<(u32, String)> =
        replies.iter().filter_map(|(kind, data)| parse_context(*kind, data)).collect();
    let find = |name: &&str| {
        let found = given.iter().find(|(_, given)| given == name);
        found
            .cloned()
            .ok_or_else(|| NbdError::NoContext { export: export.into(), context: (*name).into() })
    };
    let found: Vec<(u32, String)> = wanted.iter().map(find).collect::<Result<_, _>>()?;
    let ids: BTreeSet<u32> = found.iter().map(|(id, _)| *id).collect();
    if ids.len() < found.len() {
        return Err(NbdError::Protocol("it gave two meta contexts one id".into()));
    }
    Ok(found)
}

fn parse_context(kind: u32, data: &[u8]) -> Option<(u32, String)> {
    let mut fields = Fields(data);
    let id = fields.u32()?;
    let name = String::from_utf8(fields.0.to_vec()).ok()?;
    (kind == REP_META_CONTEXT).then_some((id, name))
}

async fn go<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
) -> Result<ExportInfo, NbdError> {
    let mut data = Vec::new();
    push_string(&mut data, export);
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    option(stream, OPT_GO, &data).await?;
    let replies = read_replies(stream, OPT_GO, &format!("export `{export}`")).await?;
    let mut info = ExportInfo { max_request: MAX_REQUEST, ..ExportInfo::default() };
    let mut described = false;
    for (_, data) in replies.iter().filter(|(kind, _)| *kind == REP_INFO) {
        described |= apply_info(&mut info, data)
            .ok_or_else(|| NbdError::Protocol("an export info is too short".into()))?;
    }
    if described {
        Ok(info)
    } else {
        Err(NbdError::Protocol("the export's size is missing".into()))
    }
}

/// Whether this was the part with the size.
fn apply_info(info: &mut ExportInfo, data: &[u8]) -> Option<bool> {
    let mut fields = Fields(data);
    match fields.u16()? {
        INFO_EXPORT => {
            info.size = fields.u64()?;
            info.flags = fields.u16()?;
            Some(true)
        }
        INFO_BLOCK_SIZE => {
            let (_smallest, _preferred) = (fields.u32()?, fields.u32()?);
            info.max_request = fields.u32()?.clamp(4096, MAX_REQUEST);
            Some(false)
        }
        _ => Some(false),
    }
}
