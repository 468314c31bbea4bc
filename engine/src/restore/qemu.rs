//! The QEMU process of a restored VM: started detached, ended again if the restore fails.

use anyhow::{Error, Result};
use dirty_tracker::GuestMemory;
use qmp_bridge::said;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;
use vm::launch::spawn;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// From the end of its connections to its own: the kernel frees its memory in between.
const LAST_MOMENTS: Duration = Duration::from_millis(200);

/// Dropping it ends QEMU, unless it was left to itself.
pub(crate) struct NewQemu {
    child: Option<Child>,
    log: std::path::PathBuf,
}

impl NewQemu {
    /// In a session of its own.
    pub(crate) fn start(
        file: &VmFile,
        runtime: &RuntimeDir,
        plugin: &Path,
        memory: &GuestMemory,
    ) -> Result<Self> {
        Self::spawn(spawn::in_own_session(&file.qemu), file, runtime, Some(plugin), memory)
    }

    /// `command` becomes the QEMU that its arguments follow.
    pub(crate) fn spawn(
        command: Command,
        file: &VmFile,
        runtime: &RuntimeDir,
        plugin: Option<&Path>,
        memory: &GuestMemory,
    ) -> Result<Self> {
        let child = spawn::qemu(command, file, runtime, plugin, memory)?;
        Ok(Self { child: Some(child), log: runtime.qemu_log() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// It runs on by itself, also when this process ends.
    pub(crate) fn leave(mut self) {
        if let Some(mut child) = self.child.take() {
            // When it ends it must not stay a zombie for as long as this process lives.
            std::thread::spawn(move || child.wait());
        }
    }

    /// The error with what QEMU itself said, and how it ended if it crashed: then it says nothing.
    pub(crate) fn explain(mut self, error: Error) -> Error {
        let said = said::quote_log(&self.log);
        match self.crash() {
            Some(status) => {
                error.context(format!("QEMU crashed ({status}); this is a fault of QEMU"))
            }
            None if said.is_empty() => error,
            None => error.context(format!("QEMU said: {said}{}", advice(&said))),
        }
    }

    /// How it ended, if a signal ended it.
    fn crash(&mut self) -> Option<ExitStatus> {
        let status = spawn::ended_within(self.child.as_mut()?, LAST_MOMENTS).ok()??;
        status.signal().is_some().then_some(status)
    }
}

/// What helps against what QEMU says; a tap may have been taken since it was looked at.
fn advice(said: &str) -> String {
    let tap = || {
        let (name, rest) =
            said.split_once("could not configure /dev/net/tun (")?.1.split_once(')')?;
        rest.starts_with(": Device or resource busy")
            .then(|| format!("; tap {name} is in use: use --map {name}=NEW"))
    };
    tap().unwrap_or_default()
}

impl Drop for NewQemu {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It has no guest yet; nothing is lost.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn tap_in_use_by_qemus_words_has_advice() {
        let said = "-netdev tap,id=n,ifname=t0: could not configure /dev/net/tun (t0): ";
        assert!(advice(&format!("{said}Device or resource busy")).contains("--map t0=NEW"));
        for other in
            [&format!("{said}Operation not permitted"), "could not configure /dev/net/tun (t0", ""]
        {
            assert_eq!(advice(other), "", "{other}");
        }
    }

    fn explained(script: &str) -> String {
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(log.path(), "its words\n").unwrap();
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let qemu = NewQemu { child: Some(child), log: log.path().to_owned() };
        format!("{:#}", qemu.explain(Error::msg("it ended")))
    }

    #[test]
    fn crash_of_qemu_is_named() {
        let text = explained("kill -SEGV $$");
        assert!(text.contains("SIGSEGV") && text.ends_with("it ended"), "{text}");
        assert_eq!(explained("exit 1"), "QEMU said: its words: it ended");
    }
}
