//! Software TPMs (`swtpm`) of a proof: empty ones, into which QEMU loads what the checkpoint has.
//!
//! The state of an emulated TPM is part of QEMU's device state, so it is loaded, written again and
//! compared as all of it. Each TPM is in a sandbox of its own and ends with the proof.

use super::sandbox;
use anyhow::{Context, Error, Result};
use qmp_bridge::poll::poll_until;
use qmp_bridge::said;
use std::fs::File;
use std::future::ready;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use vm::error::refused;

const PROGRAM: &str = "swtpm";
/// It is up within 50 ms; a loaded host takes longer.
const STARTUP: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Begins the permanent state of a TPM 2.0 in libtpms (`PERSISTENT_ALL_MAGIC`).
const TPM2_MAGIC: [u8; 4] = [0xab, 0x36, 0x47, 0x23];

/// Refuses a state that another TPM cannot take or does not write again as it was.
///
/// # Errors
/// Refused for a TPM 1.2, which forgets with the load that it has tested itself, and for a state
/// that swtpm encrypts with a key of its own.
pub(super) fn check_state(devices: &[u8]) -> Result<()> {
    if devices.windows(TPM2_MAGIC.len()).any(|part| part == TPM2_MAGIC) {
        return Ok(());
    }
    Err(refused(
        "the VM's TPM is a TPM 1.2, or its state is encrypted with a key of swtpm; only an unencrypted TPM 2.0 can be compared; \
         nothing was proven",
    ))
}

/// Ended when dropped.
pub(super) struct Tpm {
    _child: Child,
}

impl Tpm {
    /// A new TPM that waits for QEMU at `socket`, whose directory is made for it.
    ///
    /// # Errors
    /// Refused when there is no `swtpm` on this host, or it does not start.
    pub(super) async fn start(socket: &Path) -> Result<Self> {
        let directory =
            socket.parent().context("internal error: a TPM's socket without a directory")?;
        std::fs::create_dir_all(directory)
            .with_context(|| format!("making {}", directory.display()))?;
        let program = find()?;
        let log = directory.join("log");
        let output = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = Command::from(sandbox::command(directory, directory, &program)?);
        command.arg("socket").arg("--tpmstate").arg(format!("dir={}", directory.display()));
        command.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
        command
            .arg("--tpm2")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("starting {PROGRAM}"))?;
        let is_up = || {
            let has_ended = matches!(child.try_wait(), Ok(Some(_)) | Err(_));
            ready(if socket.exists() { Some(true) } else { has_ended.then_some(false) })
        };
        match poll_until(STARTUP, POLL_INTERVAL, is_up).await {
            Some(true) => Ok(Self { _child: child }),
            _ => Err(not_started(&log)),
        }
    }
}

fn not_started(log: &Path) -> Error {
    refused(format!(
        "the VM has a TPM, and {PROGRAM} does not start here: {}; nothing was proven",
        said::quote_log(log)
    ))
}

fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|file| file.is_file());
    let none = || {
        refused(format!(
            "the VM has a TPM, and a proof needs another one for its state, but there is no {PROGRAM} on this host's PATH; \
             install {PROGRAM}; nothing was proven"
        ))
    };
    found.ok_or_else(none)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn tpm_of_another_kind_is_refused() {
        assert!(check_state(b"head\x00\x02\xab\x36\x47\x23tail").is_ok());
        assert!(check_state(b"head\x00\x01tail").is_err());
    }
}
