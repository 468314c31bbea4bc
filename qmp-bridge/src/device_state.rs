//! The state of all devices and vCPUs at one instant, by `xen-save-devices-state`.
//!
//! Despite its name the command needs no Xen and is in every QEMU. With `live: false` it writes the
//! device sections of a migration stream to a file and touches neither RAM nor disks, which makes
//! it several times faster than any `migrate`. What it lacks of a stream, [`crate::stream`] adds at
//! restore.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use thiserror::Error;

use crate::fdset::FdSet;
use crate::paused::Paused;
use crate::qmp::{Qmp, QmpError};
use crate::run_state::RunState;
use crate::stream_format::STREAM_HEADER;
use crate::stream_format::mark::{END_OF_STREAM, SECTION_FULL};

/// Largest device state accepted; an ordinary VM has 0.1 to 1 MiB, one with virtio-gpu up to some
/// dozen.
pub const MAX_DEVICE_STATE: u64 = 256 << 20;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum DeviceStateError {
    #[error("cannot save the device state: {0}")]
    Save(#[from] QmpError),
    #[error("cannot keep the device state in {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the device state in {path} is larger than {MAX_DEVICE_STATE} bytes")]
    TooLarge { path: PathBuf },
    #[error("this is no device state: {why}")]
    Malformed { why: &'static str },
}

/// Where one device state goes: a file without a name, which QEMU has as a descriptor. Best in a
/// memory file system: QEMU writes it while the guest is paused.
#[derive(Debug)]
pub struct DeviceStateFile {
    /// The directory, for messages.
    path: PathBuf,
    file: File,
    /// What QEMU writes through; the position is one for both.
    writing: File,
    set: FdSet,
    qmp: Qmp,
}

static FILES: AtomicU64 = AtomicU64::new(0);
/// Kind of the descriptor that QEMU has.
const FD_KIND: &str = "state";

impl DeviceStateFile {
    /// Makes the file in `directory` and hands it to QEMU.
    ///
    /// # Errors
    /// When the file cannot be made, or QEMU does not take it.
    pub async fn prepare(qmp: &Qmp, directory: &Path) -> Result<Self, DeviceStateError> {
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("device-state.{}.{number}", std::process::id()));
        let (writing, file) = unnamed(&path)
            .map_err(|source| DeviceStateError::Read { path: path.clone(), source })?;
        let set = FdSet::add(qmp, writing.as_fd(), FD_KIND).await?;
        Ok(Self { path: directory.into(), file, writing, set, qmp: qmp.clone() })
    }

    /// Lets QEMU write it: one round trip. What an earlier call wrote is replaced.
    ///
    /// # Errors
    /// When QEMU refuses to save its devices, or the pause is over.
    pub async fn save(&self, paused: &Paused) -> Result<(), DeviceStateError> {
        let emptied = self.writing.set_len(0).and_then(|()| (&self.writing).rewind());
        emptied.map_err(|source| DeviceStateError::Read { path: self.path.clone(), source })?;
        // With `live: true` QEMU would inactivate the disks, as if it handed them over to another
        // host.
        let arguments = json!({ "filename": self.set.filename(), "live": false });
        paused.qmp().execute_json("xen-save-devices-state", arguments).await?;
        Ok(())
    }

    /// Reads it, after the guest was resumed.
    ///
    /// # Errors
    /// When the file cannot be read, is too long, or is not of the form that QEMU writes.
    pub fn read(self) -> Result<DeviceState, DeviceStateError> {
        let error = |source| DeviceStateError::Read { path: self.path.clone(), source };
        let mut bytes = Vec::new();
        (&self.file).take(MAX_DEVICE_STATE + 1).read_to_end(&mut bytes).map_err(error)?;
        if bytes.len() as u64 > MAX_DEVICE_STATE {
            return Err(DeviceStateError::TooLarge { path: self.path.clone() });
        }
        DeviceState::from_bytes(bytes)
    }
}

impl Drop for DeviceStateFile {
    fn drop(&mut self) {
        if let Err(error) = self.set.remove_detached(&self.qmp) {
            tracing::debug!(%error, "the descriptor for the device state stays in QEMU");
        }
    }
}

/// One end to write and one to read: QEMU takes a descriptor only with the access mode by which it
/// would open the file.
fn unnamed(path: &Path) -> std::io::Result<(File, File)> {
    let writing = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let reading = File::open(path);
    std::fs::remove_file(path)?;
    Ok((writing, reading?))
}

/// Device sections between a stream header and an end mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    bytes: Vec<u8>,
}

impl DeviceState {
    /// Checks the frame; what is inside only QEMU can judge.
    ///
    /// # Errors
    /// When the bytes are not of the form that QEMU writes.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, DeviceStateError> {
        let malformed = |why| Err(DeviceStateError::Malformed { why });
        if !bytes.starts_with(&STREAM_HEADER) {
            return malformed("it does not begin with the header of a migration stream, version 3");
        }
        match &bytes[STREAM_HEADER.len()..] {
            [SECTION_FULL, .., END_OF_STREAM] => Ok(Self { bytes }),
            [.., END_OF_STREAM] => malformed("its first section is not that of a device"),
            _ => malformed("it is cut off before the end mark"),
        }
    }

    /// All of it, as saved.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes as QEMU wrote them.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The same with another run state, which QEMU enters when it has loaded it (a live one: when
    /// it was started without `-S`).
    ///
    /// `xen-save-devices-state` always writes `running`, and a migration what the guest did before
    /// QEMU stopped it for that.
    ///
    /// # Errors
    /// When the state has no section of the run state.
    pub fn with_run_state(mut self, state: RunState) -> Result<Self, DeviceStateError> {
        let at = global_state(&self.bytes)?;
        let name = state.name().as_bytes();
        let length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.bytes[at..at + 4].copy_from_slice(&length.to_be_bytes());
        let field = &mut self.bytes[at + 4..at + 4 + RUN_STATE_BYTES];
        field.fill(0);
        field[..name.len()].copy_from_slice(name);
        Ok(self)
    }

    /// The sections alone.
    pub fn sections(&self) -> &[u8] {
        &self.bytes[STREAM_HEADER.len()..self.bytes.len() - 1]
    }
}

/// The section `globalstate`, instance 0, version 1: a length and a text of 100 bytes, of which
/// QEMU 8.2 and later use 32 for the run state and some for flags.
const GLOBAL_STATE: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
const GLOBAL_STATE_BYTES: usize = 4 + 100;
const RUN_STATE_BYTES: usize = 32;
/// Mark and number of the section, before its name.
const SECTION_HEAD: usize = 5;

/// Where the content of that section begins.
fn global_state(bytes: &[u8]) -> Result<usize, DeviceStateError> {
    let is_section = |at: &usize| {
        let content = at + GLOBAL_STATE.len();
        let head = at.checked_sub(SECTION_HEAD).and_then(|head| bytes.get(head..*at));
        bytes[*at..].starts_with(GLOBAL_STATE)
            && head.is_some_and(|head| head[0] == SECTION_FULL)
            && bytes.len() > content + GLOBAL_STATE_BYTES
    };
    let mut found = (0..bytes.len()).filter(is_section);
    match (found.next(), found.next()) {
        (Some(at), None) => Ok(at + GLOBAL_STATE.len()),
        _ => Err(DeviceStateError::Malformed { why: "it has no section that holds the run state" }),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn run_state_is_written_over() {
        let text = |state: &str| [state.as_bytes(), &vec![0; 32 - state.len()]].concat();
        let section = |length: u8, state: &str| {
            let head = [SECTION_FULL, 0, 0, 0, 9];
            [
                &head[..],
                GLOBAL_STATE,
                &[0, 0, 0, length],
                &text(state),
                &[1, 1],
                &[0; 66],
                &[0x7e, 0, 0, 0, 9],
            ]
            .concat()
        };
        let whole = |section: &[u8]| [STREAM_HEADER.as_slice(), section, &[END_OF_STREAM]].concat();
        let state = DeviceState::from_bytes(whole(&section(8, "running"))).expect("good");
        let shut_down = state.with_run_state(RunState::GuestPanicked).expect("a place");
        // The flags behind it stay.
        assert_eq!(shut_down.as_bytes(), whole(&section(15, "guest-panicked")));
        let paused = shut_down.with_run_state(RunState::Paused).expect("a place");
        assert_eq!(paused.as_bytes(), whole(&section(7, "paused")));
        let two = [section(8, "running"), section(8, "running")].concat();
        for bad in [&[SECTION_FULL, 1, 2][..], &two] {
            assert!(
                DeviceState::from_bytes(whole(bad))
                    .expect("a frame")
                    .with_run_state(RunState::Paused)
                    .is_err()
            );
        }
    }

    #[test]
    fn the_frame_is_checked() {
        let good = [STREAM_HEADER.as_slice(), &[SECTION_FULL, 1, 2, END_OF_STREAM]].concat();
        let state = DeviceState::from_bytes(good.clone()).expect("good");
        assert_eq!(state.sections(), [SECTION_FULL, 1, 2]);
        for bad in [
            good[..10].to_vec(),
            good[1..].to_vec(),
            good[..8].to_vec(),
            vec![],
            [&STREAM_HEADER[..], &[7, 0]].concat(),
        ] {
            assert!(DeviceState::from_bytes(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
