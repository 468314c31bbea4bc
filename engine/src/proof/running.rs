//! Lets the restored guest run on for a while, and watches whether it can.

use crate::checkpoint::outcome::whole_milliseconds;
use anyhow::{Context, Result};
use qmp_bridge::Qmp;
use qmp_bridge::paused::run_state;
use qmp_bridge::qmp::QmpEvent;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

/// Events that a guest which was brought back whole does not cause.
const TROUBLE: &[&str] = &[
    "BLOCK_IO_ERROR",
    "GUEST_CRASHLOADED",
    "GUEST_PANICKED",
    "MEMORY_FAILURE",
    "RESET",
    "SHUTDOWN",
    "WATCHDOG",
];

/// How the guest ran.
pub struct Ran {
    /// From `cont` until it was looked at last.
    pub time: Duration,
    /// Events and states that a restored guest must not show; none if it ran on.
    pub trouble: Vec<String>,
}

impl Ran {
    pub(super) fn json(&self) -> Value {
        json!({ "ms": whole_milliseconds(self.time), "trouble": self.trouble })
    }
}

/// Starts the guest and looks on for `time`.
pub(super) async fn watch(qmp: &Qmp, time: Duration) -> Result<Ran> {
    let mut events = qmp.events();
    let mut trouble = Vec::new();
    qmp.execute_json("cont", Value::Null).await.context("starting the guest")?;
    let begun = Instant::now();
    let end = begun + time;
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = qmp.closed() => {
                trouble.push("QEMU ended".to_owned());
                break;
            }
            () = tokio::time::sleep_until(end) => break,
        };
        match event {
            Ok(event) if TROUBLE.contains(&event.name.as_str()) => trouble.push(describe(&event)),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => break,
        }
    }
    if trouble.is_empty() {
        let state = run_state(qmp).await.context("asking whether the guest runs")?;
        if state != "running" {
            trouble.push(format!("the guest is {state}"));
        }
    }
    Ok(Ran { time: begun.elapsed(), trouble })
}

fn describe(event: &QmpEvent) -> String {
    if event.data.is_null() { event.name.clone() } else { format!("{} {}", event.name, event.data) }
}
