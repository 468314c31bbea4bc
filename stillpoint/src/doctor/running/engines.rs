//! Which engine can take the memory of a running machine, and for how long the guest would stand still.

use super::super::Row;
use super::cannot;
use crate::engine::{Engine, is_live_pre_copy_exact};
use crate::helper::unprepared::look::Look;
use crate::launch::foreign::Foreign;
use anyhow::Error;
use qmp_bridge::migration::StreamOptions;
use serde_json::{Value, json};

/// `stop`, the disks' transaction, the devices' state and `cont`, in milliseconds; docs/attach.md has the measurements.
const BASE_MS: u64 = 10;
/// Finding and protecting written pages.
const TRACKER_MS_PER_GIB: u64 = 1;
/// Write-protecting memory that the guest has touched.
const PROTECT_MS_PER_GIB: u64 = 10;
/// Reading and comparing it all.
const READ_MS_PER_GIB: u64 = 600;
const GIB: u64 = 1 << 30;

const HAVE_PLUGIN: &str = "not needed; to have it, start QEMU with -plugin file=libstillpoint_plugin.so,socket=PATH, or use 'stillpoint adopt'";
const OTHER_ENGINE: &str = "not needed where another engine is possible (docs/attach.md)";

pub async fn check(look: &Look, found: Option<&Foreign>, engines: &mut Value) -> Vec<Row> {
    let tracker = match found {
        Some(found) => look.tracker(found).await,
        None => Err("the machine is not understood".to_owned()),
    };
    let support = match look.support().await {
        Ok(support) => support,
        Err(error) => return vec![cannot("engine", &error, "wait until that migration has ended, and try again")],
    };
    let all = [
        (Engine::Tracker, tracker),
        (Engine::PreCopy, live_pre_copy(look).and(support.pre_copy.clone())),
        (Engine::Stopped, support.pre_copy),
        (Engine::BackgroundSnapshot, support.background_snapshot),
    ];
    *engines = all.iter().map(|(engine, can)| (engine.name().to_owned(), json!({ "possible": can.is_ok(), "why_not": can.as_ref().err() }))).collect();
    let is_possible = all.iter().any(|(_, can)| can.is_ok());
    all.into_iter().map(|(engine, can)| row(look, engine, can, is_possible)).collect()
}

fn row(look: &Look, engine: Engine, can: Result<(), String>, is_another_possible: bool) -> Row {
    let check = format!("engine {}", engine.name());
    let remedy = if engine == Engine::Tracker { HAVE_PLUGIN } else { OTHER_ENGINE };
    match can {
        Ok(()) => Row::ok(check, pause(engine, look.blocks.iter().map(|block| block.used).sum())),
        Err(why) if is_another_possible => Row::warn(check, why, remedy),
        Err(why) => cannot(check, &Error::msg(why), "see docs/attach.md"),
    }
}

fn live_pre_copy(look: &Look) -> Result<(), String> {
    match is_live_pre_copy_exact(&look.facts) {
        true => Ok(()),
        false => Err(format!("QEMU {} under TCG loses pages when it reads the memory of a running guest", look.facts.qemu)),
    }
}

/// An estimate: the guest is not stopped to find out.
fn pause(engine: Engine, ram_bytes: u64) -> String {
    let per_gib = |ms: u64| BASE_MS + ms * ram_bytes.div_ceil(GIB);
    match engine {
        Engine::Tracker => format!("possible; pauses of about {} ms", per_gib(TRACKER_MS_PER_GIB)),
        Engine::BackgroundSnapshot => {
            format!("possible; pauses of about {} ms, and the guest is slower while its memory is read", per_gib(PROTECT_MS_PER_GIB))
        }
        Engine::Stopped => format!("possible; pauses of about {} ms: all memory is read meanwhile", per_gib(READ_MS_PER_GIB)),
        Engine::PreCopy => {
            let rest = StreamOptions::default().max_pause.as_millis();
            format!("possible; pauses of about {BASE_MS} ms and what the guest writes at the end, {rest} ms at most")
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn pauses_grow_with_memory_where_memory_is_walked() {
        let background = |bytes| pause(Engine::BackgroundSnapshot, bytes);
        assert!(background(GIB).contains("about 20 ms") && background(4 * GIB).contains("about 50 ms"));
        assert!(pause(Engine::Tracker, 2 * GIB).contains("about 12 ms"));
        assert!(pause(Engine::PreCopy, 64 * GIB).contains("100 ms at most"));
    }
}
