//! What follows when the guest of a restored VM may run and a helper serves it. Nothing of it
//! undoes the restore: what fails is a note.

use super::Restore;
use super::guest_time::Channel;
use super::hooks::{self, Hooks};
use anyhow::Result;
use qmp_bridge::Qmp;
use std::ffi::OsString;
use vm::error::refused;
use vm::running::Vm;

/// To be completed beside the helper's service: a hook may ask the helper.
pub struct Afterwards {
    qmp: Qmp,
    /// Of a guest that runs and has an agent.
    agent: Option<Channel>,
    hooks: Hooks,
    facts: Vec<(&'static str, OsString)>,
}

impl Afterwards {
    /// Returns what the operator should know.
    pub async fn complete(self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(agent) = self.agent {
            notes.push(agent.set_clock(&self.qmp).await);
        }
        if let Some(program) = &self.hooks.after
            && let Err(error) = hooks::run(program, self.facts, self.hooks.timeout).await
        {
            notes.push(format!("the hook after the restore: {error:#}"));
        }
        notes
    }
}

impl Restore {
    /// The last step before anything is made.
    pub(super) async fn hook_before(&mut self) -> Result<()> {
        self.request.hooks = std::mem::take(&mut self.request.hooks).located()?;
        let Hooks { before, timeout, .. } = &self.request.hooks;
        let Some(program) = before else { return Ok(()) };
        hooks::run(program, self.facts("before"), *timeout).await.map_err(|error| {
            refused(format!("nothing is restored, because of the hook before it: {error:#}"))
        })
    }

    pub(super) fn afterwards(&self, vm: &Vm) -> Afterwards {
        let sets_clock = self.run_state.wanted.is_live() && !self.request.keep_clock;
        let mut facts = self.facts("after");
        facts.push(("STILLPOINT_RUN_STATE", self.run_state.wanted.name().into()));
        facts.push(("STILLPOINT_QEMU_PID", vm.pid.to_string().into()));
        Afterwards {
            qmp: vm.qmp.clone(),
            agent: if sets_clock { Channel::of(&vm.file) } else { None },
            hooks: self.request.hooks.clone(),
            facts,
        }
    }

    /// The environment of a hook, as docs/copies.md has it.
    fn facts(&self, when: &str) -> Vec<(&'static str, OsString)> {
        let restored = format!("{}@{}", self.request.checkpoint.vm, self.id);
        let base = self.runtime.path().parent().unwrap_or(self.runtime.path());
        vec![
            ("STILLPOINT_HOOK", when.into()),
            ("STILLPOINT_NAME", self.name().as_str().into()),
            ("STILLPOINT_CHECKPOINT", restored.into()),
            ("STILLPOINT_STORE", self.source.repository().url().into()),
            ("STILLPOINT_DIR", self.dir.clone().into()),
            ("STILLPOINT_RUNTIME_DIR", base.into()),
            ("STILLPOINT_IS_COPY", if self.is_copy() { "1" } else { "0" }.into()),
        ]
    }
}
