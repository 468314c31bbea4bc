//! `migrate-incoming`: a stream is loaded into a QEMU that was started with `-incoming defer`.

use std::io::{self, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::json;

use crate::ram::PAGE;
use crate::state::{Refusal, Reply};
use crate::stream::{DEVICES, flag, mark};
use crate::{Shared, State, lock};

/// What is loaded, or is to be.
#[derive(Default)]
pub struct Incoming {
    /// The words with which QEMU refuses what it has read.
    pub refusal: Option<String>,
    /// Bytes that have been read.
    pub bytes: u64,
    /// Given by `migrate-incoming` and not yet taken by a thread.
    listener: Option<UnixListener>,
}

impl State {
    pub(crate) fn migrate_incoming(&mut self, uri: &str) -> Reply {
        if self.run_state != "inmigrate" || self.migration.is_running() {
            return Err(Refusal::generic("'-incoming' was not specified on the command line"));
        }
        let path = uri.strip_prefix("unix:").unwrap_or_default();
        let listener = UnixListener::bind(Path::new(path))
            .map_err(|error| Refusal::generic(format!("Failed to bind to {path}: {error}")))?;
        self.incoming.listener = Some(listener);
        self.set_migration("setup");
        Ok(json!({}))
    }

    /// As QEMU does that was started with `-S`: a guest that ran is paused.
    fn loaded(&mut self, run_state: &str) {
        match self.incoming.refusal.take() {
            Some(why) => self.load_failed(&why),
            None => {
                self.enter(if run_state == "running" { "paused" } else { run_state });
                self.set_migration("completed");
            }
        }
    }

    fn load_failed(&mut self, why: &str) {
        self.migration.error = Some(why.to_owned());
        self.set_migration("failed");
    }
}

/// Starts the thread of a load that was just ordered.
pub(crate) fn start_if_due(shared: &Shared) {
    let Some(listener) = lock(shared).incoming.listener.take() else { return };
    let shared = shared.clone();
    std::thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else { return };
        lock(&shared).set_migration("active");
        let has_addresses = lock(&shared).capabilities["x-ignore-shared"];
        let mut loader = Loader { shared, stream: BufReader::new(stream), has_addresses };
        let ended = loader.load();
        let mut state = lock(&loader.shared);
        match ended {
            Ok(run_state) => state.loaded(&run_state),
            Err(error) => state.load_failed(&format!("load of migration failed: {error}")),
        }
    });
}

struct Loader {
    shared: Shared,
    stream: BufReader<UnixStream>,
    /// Each RAM block in the head comes with its address.
    has_addresses: bool,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Loader {
    /// Returns the run state that is in the stream.
    fn load(&mut self) -> io::Result<String> {
        if self.array()? != crate::stream::HEADER {
            return Err(malformed("not a migration stream"));
        }
        let mut run_state = String::new();
        loop {
            match self.byte()? {
                mark::CONFIGURATION => drop(self.text_of_length()?),
                mark::SUBSECTION => self.capabilities()?,
                mark::START => {
                    let (_section, _name) = (self.number()?, self.name()?);
                    let (_instance, _version) = (self.number()?, self.number()?);
                    self.memory()?;
                }
                mark::PART | mark::LAST => {
                    self.number()?;
                    self.memory()?;
                }
                mark::FULL => run_state = self.device()?.unwrap_or(run_state),
                mark::FOOTER => drop(self.number()?),
                mark::END => break,
                other => return Err(malformed(&format!("Unknown savevm section type {other}"))),
            }
        }
        // What follows describes the sections; QEMU reads past it.
        if self.byte()? == mark::DESCRIPTION {
            self.text_of_length()?;
        }
        Ok(run_state)
    }

    fn capabilities(&mut self) -> io::Result<()> {
        self.name()?;
        let (_version, count) = (self.number()?, self.number()?);
        (0..count).try_for_each(|_| self.name().map(drop))
    }

    /// Records up to the end of a section.
    fn memory(&mut self) -> io::Result<()> {
        let mut block = String::new();
        loop {
            let word = u64::from_be_bytes(self.array()?);
            let (at, kind) = (word & !(PAGE as u64 - 1), word & (PAGE as u64 - 1));
            if kind & flag::END != 0 {
                return Ok(());
            }
            if kind & flag::SIZES != 0 {
                self.sizes(at)?;
                continue;
            }
            if kind & flag::CONTINUES == 0 {
                block = self.name()?;
            }
            let content =
                if kind & flag::ZERO != 0 { vec![self.byte()?; PAGE] } else { self.bytes(PAGE)? };
            let state = lock(&self.shared);
            let part = state.ram.parts.iter().position(|part| part.name == block);
            let part = part.ok_or_else(|| malformed(&format!("Unknown ramblock \"{block}\"")))?;
            state.ram.write(part, usize::try_from(at).expect("64 bits") / PAGE, &content);
        }
    }

    fn sizes(&mut self, mut left: u64) -> io::Result<()> {
        while left > 0 {
            let name = self.name()?;
            let bytes = u64::from_be_bytes(self.array()?);
            if self.has_addresses {
                self.array::<8>()?;
            }
            let state = lock(&self.shared);
            if !state.ram.parts.iter().any(|part| part.name == name && part.bytes == bytes) {
                return Err(malformed(&format!("Size mismatch: {name}: {bytes:#x}")));
            }
            left = left.saturating_sub(bytes);
        }
        Ok(())
    }

    /// The run state, of the section that has it.
    fn device(&mut self) -> io::Result<Option<String>> {
        self.number()?;
        let name = self.name()?;
        let (_instance, _version) = (self.number()?, self.number()?);
        let known = DEVICES.iter().find(|(device, _)| *device == name);
        let (_, bytes) = known.ok_or_else(|| malformed(&format!("Unknown section '{name}'")))?;
        let content = self.bytes(*bytes)?;
        if name != crate::stream::RUN_STATE {
            return Ok(None);
        }
        let text = content[4..].split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Some(String::from_utf8_lossy(text).into_owned()))
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn number(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn name(&mut self) -> io::Result<String> {
        let length = self.byte()?.into();
        Ok(String::from_utf8_lossy(&self.bytes(length)?).into_owned())
    }

    fn text_of_length(&mut self) -> io::Result<Vec<u8>> {
        let length = self.number()? as usize;
        self.bytes(length)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        lock(&self.shared).incoming.bytes += N as u64;
        Ok(bytes)
    }

    fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        lock(&self.shared).incoming.bytes += length as u64;
        Ok(bytes)
    }
}
