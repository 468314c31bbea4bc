//! The NBD server: fixed newstyle, structured replies, meta contexts. As much as our client asks.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use crate::state::blocks::{Blocks, Export, NbdFault};
use crate::{Shared, lock};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const ACK: u32 = 1;
const DONE: u16 = 1;
const EIO: u32 = 5;
/// Granule of a block status.
const STEP: u64 = 4096;
static ZEROS: [u8; 4096] = [0; 4096];

/// Serves clients until the listener is shut down.
pub(crate) fn serve(shared: Shared, listener: UnixListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let shared = shared.clone();
            std::thread::spawn(move || {
                let mut client = Client { shared, stream, export: None, contexts: Vec::new() };
                // The client may leave at any moment.
                let _ = client.run();
                let _ = client.stream.shutdown(std::net::Shutdown::Both);
            });
        }
    });
}

struct Client {
    shared: Shared,
    stream: UnixStream,
    export: Option<Export>,
    /// In the order in which they were asked for; a context's id is its place.
    contexts: Vec<String>,
}

impl Client {
    fn run(&mut self) -> io::Result<()> {
        self.stream.write_all(&MAGIC.to_be_bytes())?;
        self.stream.write_all(&OPTION_MAGIC.to_be_bytes())?;
        self.stream.write_all(&3u16.to_be_bytes())?;
        let _flags: [u8; 4] = self.take()?;
        while self.export.is_none() {
            if !self.option()? {
                return Ok(());
            }
        }
        while self.request()? {}
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether the handshake continues.
    fn option(&mut self) -> io::Result<bool> {
        let _magic: [u8; 8] = self.take()?;
        let (option, length) = (u32::from_be_bytes(self.take()?), u32::from_be_bytes(self.take()?));
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        match option {
            2 => self.reply(option, ACK, &[]).map(|()| false),
            8 => self.reply(option, ACK, &[]).map(|()| true),
            10 => self.set_contexts(&data).map(|()| true),
            7 => self.go(&data).map(|()| true),
            _ => self.reply(option, (1 << 31) | 1, b"unsupported").map(|()| true),
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).expect("short");
        let head = [
            &OPTION_REPLY_MAGIC.to_be_bytes()[..],
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &length.to_be_bytes(),
        ];
        self.stream.write_all(&[&head.concat(), data].concat())
    }

    fn find(&self, name: &str) -> Option<Export> {
        lock(&self.shared).blocks.exports.iter().find(|export| export.name == name).cloned()
    }

    fn set_contexts(&mut self, data: &[u8]) -> io::Result<()> {
        let mut strings = Strings(data);
        let name = strings.next();
        let count = strings.number();
        let Some(export) = self.find(&name) else {
            return self.reply(10, (1 << 31) | 6, b"no such export");
        };
        for _ in 0..count {
            let wanted = strings.next();
            let is_there = wanted == "base:allocation"
                || wanted == "qemu:allocation-depth" && export.has_depth
                || export
                    .bitmaps
                    .iter()
                    .any(|(_, name)| wanted == format!("qemu:dirty-bitmap:{name}"));
            if is_there {
                let id = u32::try_from(self.contexts.len()).expect("few");
                self.reply(10, 4, &[&id.to_be_bytes(), wanted.as_bytes()].concat())?;
                self.contexts.push(wanted);
            }
        }
        self.reply(10, ACK, &[])
    }

    fn go(&mut self, data: &[u8]) -> io::Result<()> {
        let name = Strings(data).next();
        let Some(export) = self.find(&name) else {
            return self.reply(7, (1 << 31) | 6, b"export not present");
        };
        let size = {
            let state = lock(&self.shared);
            state.blocks.content(&export.node).map_or(0, |content| content.len() as u64)
        };
        // Flags, read-only, flush.
        let flags: u16 = 1 | if export.is_writable { 0 } else { 2 } | 4;
        self.reply(
            7,
            3,
            &[&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat(),
        )?;
        self.reply(7, ACK, &[])?;
        let stream = Arc::new(self.stream.try_clone()?);
        lock(&self.shared).blocks.clients.push((export.id.clone(), stream));
        self.export = Some(export);
        Ok(())
    }

    /// Whether the connection continues.
    fn request(&mut self) -> io::Result<bool> {
        let magic = u32::from_be_bytes(self.take()?);
        assert_eq!(magic, REQUEST_MAGIC, "the client speaks NBD");
        let (_flags, command) =
            (u16::from_be_bytes(self.take()?), u16::from_be_bytes(self.take()?));
        let cookie = u64::from_be_bytes(self.take()?);
        let (offset, length) = (u64::from_be_bytes(self.take()?), u32::from_be_bytes(self.take()?));
        let fault = lock(&self.shared).blocks.nbd_fault;
        match (command, fault) {
            (2, _) => return Ok(false),
            (0, Some(NbdFault::ReadsCut)) => return Ok(false),
            (0, Some(NbdFault::ReadsHang)) | (3, Some(NbdFault::FlushHangs)) => return Ok(true),
            (0, Some(NbdFault::ReadsFail)) | (3, Some(NbdFault::FlushFails)) => {
                self.fail(cookie)?
            }
            (0, _) => self.read(cookie, offset, length)?,
            (1, _) => {
                let mut data = vec![0; length as usize];
                self.stream.read_exact(&mut data)?;
                let node = self.export().node.clone();
                let at = usize::try_from(offset).expect("small");
                lock(&self.shared).blocks.write_node(&node, at, &data);
                self.chunk(DONE, 0, cookie, &[])?;
            }
            (3, _) => self.chunk(DONE, 0, cookie, &[])?,
            (7, _) => self.status(cookie, offset, length)?,
            _ => self.fail(cookie)?,
        }
        Ok(true)
    }

    fn export(&self) -> &Export {
        self.export.as_ref().expect("the handshake is over")
    }

    fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(body.len()).expect("short");
        let head = [
            &CHUNK_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &length.to_be_bytes(),
        ];
        self.stream.write_all(&[&head.concat(), body].concat())
    }

    fn fail(&mut self, cookie: u64) -> io::Result<()> {
        self.chunk(
            DONE,
            (1 << 15) | 1,
            cookie,
            &[&EIO.to_be_bytes()[..], &0u16.to_be_bytes()].concat(),
        )
    }

    fn read(&mut self, cookie: u64, offset: u64, length: u32) -> io::Result<()> {
        let start = usize::try_from(offset).expect("small");
        let bytes = {
            let state = lock(&self.shared);
            let content = state.blocks.content(&self.export().node);
            content
                .and_then(|content| content.get(start..start + length as usize))
                .map(<[u8]>::to_vec)
        };
        match bytes {
            Some(bytes) => {
                self.chunk(DONE, 1, cookie, &[&offset.to_be_bytes()[..], &bytes].concat())
            }
            None => self.fail(cookie),
        }
    }

    fn status(&mut self, cookie: u64, offset: u64, length: u32) -> io::Result<()> {
        let bodies: Option<Vec<Vec<u8>>> = {
            let state = lock(&self.shared);
            let content = state.blocks.content(&self.export().node);
            content.map(|content| {
                let one = |(id, context): (usize, &String)| {
                    let flags = |at| flag(&state.blocks, self.export(), context, content, at);
                    extents(
                        u32::try_from(id).expect("few"),
                        offset,
                        offset + u64::from(length),
                        flags,
                    )
                };
                self.contexts.iter().enumerate().map(one).collect()
            })
        };
        let Some(bodies) = bodies else { return self.fail(cookie) };
        for body in bodies {
            self.chunk(0, 5, cookie, &body)?;
        }
        self.chunk(DONE, 0, cookie, &[])
    }
}

/// What a context says of one granule.
fn flag(blocks: &Blocks, export: &Export, context: &str, content: &[u8], at: u64) -> u32 {
    if context == "qemu:allocation-depth" {
        return 1;
    }
    if let Some(name) = context.strip_prefix("qemu:dirty-bitmap:") {
        let bitmap = export.bitmaps.iter().find(|(_, bitmap)| bitmap == name);
        let bitmap = bitmap.and_then(|(node, name)| blocks.bitmap(node, name));
        return u32::from(bitmap.is_some_and(|bitmap| bitmap.is_dirty(at)));
    }
    let start = usize::try_from(at).expect("small");
    let end = content.len().min(start + usize::try_from(STEP).expect("small"));
    if content[start..end] == ZEROS[..end - start] { 3 } else { 0 }
}

fn extents(id: u32, start: u64, end: u64, flags: impl Fn(u64) -> u32) -> Vec<u8> {
    let mut found: Vec<(u32, u32)> = Vec::new();
    let mut at = start;
    while at < end {
        let next = (at / STEP * STEP + STEP).min(end);
        let (length, flags) = (u32::try_from(next - at).expect("small"), flags(at));
        match found.last_mut() {
            Some(last) if last.1 == flags => last.0 += length,
            _ => found.push((length, flags)),
        }
        at = next;
    }
    let mut body = id.to_be_bytes().to_vec();
    for (length, flags) in found {
        body.extend(length.to_be_bytes());
        body.extend(flags.to_be_bytes());
    }
    body
}

/// Strings with their length before them.
struct Strings<'a>(&'a [u8]);

impl Strings<'_> {
    fn number(&mut self) -> u32 {
        let (head, rest) = self.0.split_at(4);
        self.0 = rest;
        u32::from_be_bytes(head.try_into().expect("four bytes"))
    }

    fn next(&mut self) -> String {
        let length = self.number() as usize;
        let (head, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8_lossy(head).into_owned()
    }
}
