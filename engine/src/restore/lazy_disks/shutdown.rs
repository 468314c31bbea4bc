//! A guest that shuts down before its disks have arrived: QEMU would end, and what the guest has
//! written would be in images that are not complete. So QEMU is kept, and ends when they are.

use super::POLL_INTERVAL;
use anyhow::{Context, Result};
use qmp_bridge::{Qmp, RunState};
use serde_json::{Value, json};
use vm::launch::arguments::QemuOption;

/// Whether QEMU ends when its guest shuts down, by its command line.
pub(super) fn ends_qemu(options: &[QemuOption]) -> bool {
    let stays = |option: &QemuOption| match option.name.as_str() {
        "no-shutdown" => true,
        "action" => option.keys().get("shutdown") == Some("pause"),
        _ => false,
    };
    !options.iter().any(stays)
}

/// What QEMU does when its guest shuts down.
pub(super) struct Shutdown<'a> {
    qmp: &'a Qmp,
    ends_qemu: bool,
}

impl<'a> Shutdown<'a> {
    pub(super) fn of(qmp: &'a Qmp, ends_qemu: bool) -> Self {
        Self { qmp, ends_qemu }
    }

    /// QEMU stays from now on, with the guest stopped.
    pub(super) async fn hold(&self) {
        if !self.ends_qemu {
            return;
        }
        loop {
            match self.set("pause").await {
                Ok(()) => return,
                Err(error) => tracing::warn!(error = format!("{error:#}"), "keeping QEMU"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// As its command line has it again; of a guest that has shut down QEMU ends now.
    pub(super) async fn release(&self) {
        if !self.ends_qemu {
            return;
        }
        loop {
            match self.end().await {
                Ok(()) => return,
                Err(error) => tracing::warn!(error = format!("{error:#}"), "not keeping QEMU"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn end(&self) -> Result<()> {
        self.set("poweroff").await?;
        if RunState::of(self.qmp).await? == RunState::Shutdown {
            tracing::info!("the guest has shut down, and its disks are complete: QEMU ends");
            self.qmp.execute_json("quit", Value::Null).await.context("ending QEMU")?;
        }
        Ok(())
    }

    async fn set(&self, action: &str) -> Result<()> {
        let arguments = json!({ "shutdown": action });
        let set = self.qmp.execute_json("set-action", arguments).await;
        set.map(drop).with_context(|| format!("setting the action at a shutdown to {action}"))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use vm::launch::arguments::parse;

    #[test]
    fn shutdown_of_the_guest_ends_qemu_unless_its_line_says_otherwise() {
        let ends = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            ends_qemu(&parse(&words).unwrap())
        };
        assert!(ends("-m 64") && ends("-no-reboot") && ends("-action panic=none"));
        assert!(!ends("-no-shutdown") && !ends("-action reboot=reset,shutdown=pause"));
    }
}
